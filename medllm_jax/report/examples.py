"""What is shown of exams and outputs: the questions that the user asks to see, and no other."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.grading import Grade
from medllm_jax.report.answers import Cell, changed
from medllm_jax.report.scored import CONDITION_NAMES, Scored
from medllm_jax.report.tables import Table, table

_log = logging.getLogger(__name__)

# Instead of an id: the questions that any of the models ...
KINDS = {
    "all": "was asked",
    "wrong": "answered wrongly",
    "unreadable": "gave no readable answer to",
    "lost": "answered rightly alone and wrongly with an explanation",
    "gained": "answered rightly with an explanation alone",
}
_MEANT: dict[str, Callable[[Grade], bool]] = {
    "all": lambda grade: True,
    "wrong": lambda grade: not grade.correct,
    "unreadable": lambda grade: grade.problem not in (None, "wrong_count"),
}


class Shown(NamedTuple):
    """A model's answer: whose, under which condition, what was read and whether it is right, the raw outputs."""

    model: str
    condition: str
    verdict: str
    texts: list[str]


class Example(NamedTuple):
    """A question as it is shown. `question` and `right` are known where the exam was given, else None and ""."""

    place: str
    id: str
    question: Question | None
    right: str
    shown: list[Shown]

    @property
    def letters(self) -> frozenset[str]:
        """Of the choices that are part of a right answer."""
        return frozenset[str]().union(*self.question.gold) if self.question else frozenset()


class Examples(NamedTuple):
    """Those of one exam: answers side by side, and each question with the outputs."""

    name: str
    side_by_side: Table
    questions: list[Example]

    @property
    def places(self) -> dict[str, str]:
        """Id -> where it is shown."""
        return {each.id: each.place for each in self.questions}


def chosen(
    asked: Sequence[str], exams: Sequence[tuple[str, Sequence[Scored]]], texts: Sequence[Exam]
) -> list[Examples]:
    """The questions that were asked for, by exam.

    Args:
      asked: ids of questions, and `KINDS`.
      exams: names, and the models' results.
      texts: exams to take questions and right answers from; each must hold all questions of one of the results.

    Raises:
      UserError: an id is none of these results, or an exam is of other questions, or is given without examples.
    """
    if texts and not asked:
        raise UserError(
            "--exam shows questions beside the outputs to them: name some by --example ID, or --example all"
        )
    ids = [list(dict.fromkeys(grade.id for each in models for grade in _graded(each))) for _, models in exams]
    exam_of = [_exam_of(texts, found) for found in ids]
    for exam in texts:
        if exam not in exam_of:
            raise UserError(f"--exam {exam.name}: these results are of other questions than it holds")
    wanted = [_wanted(asked, found, models) for found, (_, models) in zip(ids, exams, strict=True)]
    for each in dict.fromkeys(asked):
        if not any(each in found for found in ids) and each not in KINDS:
            raise UserError(
                f"--example {each}: no question of these results has this id, and it is none of {', '.join(KINDS)}"
            )
        if each in KINDS and not any(_of_kind(each, models) for _, models in exams):
            _log.warning(f"warning: --example {each}: there is no question that a model {KINDS[each]}")
    found = zip(exams, wanted, exam_of, strict=True)
    return [
        _examples(number, name, models, show, exam) for number, ((name, models), show, exam) in enumerate(found) if show
    ]


def _graded(model: Scored) -> list[Grade]:
    return [grade for grades in model.results.grades.values() for grade in grades]


def _exam_of(texts: Sequence[Exam], ids: Sequence[str]) -> Exam | None:
    return next((exam for exam in texts if set(ids) <= {question.id for question in exam.questions}), None)


def _wanted(asked: Sequence[str], ids: Sequence[str], models: Sequence[Scored]) -> list[str]:
    """In the order in which they were asked for; an id goes before a kind of the same name."""
    found: dict[str, None] = {}
    for each in asked:
        if each in ids:
            found[each] = None
        elif each in KINDS:
            kind = _of_kind(each, models)
            found |= dict.fromkeys(i for i in ids if i in kind)
    return list(found)


def _of_kind(kind: str, models: Sequence[Scored]) -> set[str]:
    found: set[str] = set()
    for model in models:
        if kind in ("lost", "gained"):
            of = changed(model)
            found.update(i for reason, ids in of.items() if (reason == "gained") == (kind == "gained") for i in ids)
        else:
            found.update(grade.id for grade in _graded(model) if _MEANT[kind](grade))
    return found


def _examples(number: int, name: str, models: Sequence[Scored], ids: Sequence[str], exam: Exam | None) -> Examples:
    questions = {question.id: question for question in exam.questions} if exam else {}
    by_id = {
        (place, condition): {grade.id: grade for grade in grades}
        for place, model in enumerate(models)
        for condition, grades in model.results.grades.items()
    }
    columns = [f"{models[place].name}, {CONDITION_NAMES[condition]}" for place, condition in by_id]
    rows: list[list[Cell | str]] = [["question", *(["right answer"] if exam else []), *columns]]
    examples = []
    for n, each in enumerate(ids):
        question = questions.get(each)
        right = _right(question) if question else ""
        place = f"exam{number}-question{n}"
        found = {key: grades[each] for key, grades in by_id.items() if each in grades}
        answers = [_answer(found[key]) if key in found else "-" for key in by_id]
        rows.append([Cell(each, f"#{place}"), *([right] if exam else []), *answers])
        shown = [
            Shown(
                models[model].name,
                CONDITION_NAMES[condition],
                _verdict(grade),
                [sample.text for sample in models[model].results.outputs(each, condition)],
            )
            for (model, condition), grade in found.items()
        ]
        examples.append(Example(place, each, question, right, shown))
    return Examples(name, table("Answers side by side", rows), examples)


def _right(question: Question) -> str:
    if question.credited:
        return "any"
    if question.kind == "number":
        return question.numbers[-1]
    return " or ".join(sorted(",".join(sorted(letters)) for letters in question.gold))


def _answer(grade: Grade) -> str:
    read = grade.answer or "nothing"
    if grade.problem is not None:
        named = {"wrong_count": f" ({grade.answer})", "unparseable": f" (mentions {grade.answer})"}
        read = grade.problem.replace("_", " ") + (named.get(grade.problem, "") if grade.answer else "")
    return f"{read} {'✓' if grade.correct else '✗'}"


def _verdict(grade: Grade) -> str:
    read = grade.answer or "nothing"
    how = f" by {grade.rule}" if grade.rule else ""
    return f"{'right' if grade.correct else 'wrong'}; read: {read}{how}" + (
        f"; {grade.problem}" if grade.problem else ""
    )

"""Right or wrong, points, and the counts of a whole exam.

A `Grade` says all that is known of one answer, so that counts, statistics and reports need neither the exam nor the
model: a file of grades is the whole result of a run under one condition.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_type_hints

from etils import epath

from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.extract import PROBLEMS, Extraction, extract
from medllm_jax.evaluation.extraction.numbers import same_number
from medllm_jax.storage.json_lines import read_rows
from medllm_jax.storage.remote import write_whole


@dataclasses.dataclass(frozen=True)
class Grade:
    """One answer, graded, with what its question is (see `exam.Question`).

    `answer` is letters with commas between them, or a number, or None. `correct` is of the strict tier; what was only
    mentioned in prose is read in the lenient one, and `lenient_correct` is `correct` of that. `problem` says why there
    is no answer (extract.PROBLEMS), or is None: in the strict tier a lenient answer is unparseable. `max_points` are
    the question's, `contraindicated` says that a choice was taken that endangers the patient.
    """

    id: str
    kind: str
    k: int
    max_points: int
    text_only: bool
    exam: str
    section: str
    year: int | None
    category: str
    case: str
    answer: str | None
    correct: bool
    lenient_correct: bool
    contraindicated: bool
    rule: str
    problem: str | None
    truncated: bool

    @property
    def points(self) -> int:
        """What the answer earns in the strict tier."""
        return self.max_points if self.correct else 0

    @property
    def follow_up(self) -> bool:
        """Whether the question is about a case that an earlier one told."""
        return bool(self.case) and self.case != self.id


@dataclasses.dataclass(frozen=True)
class Group:
    """Some questions of an exam: how many are right, and their points. Accuracies are in [0, 1].

    Every question is in the denominators. `accuracy` counts questions, also those that are worth no points;
    `weighted_accuracy` counts points, and is the accuracy that papers on IgakuQA report.
    """

    n: int
    correct: int
    points: int
    max_points: int

    @classmethod
    def of(cls, grades: Sequence[Grade]) -> "Group":
        right = sum(g.correct for g in grades)
        return cls(len(grades), right, sum(g.points for g in grades), sum(g.max_points for g in grades))

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else 0.0

    @property
    def weighted_accuracy(self) -> float:
        return self.points / self.max_points if self.max_points else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the counts and the accuracies."""
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(Group)}
        return {**counts, "accuracy": self.accuracy, "weighted_accuracy": self.weighted_accuracy}


@dataclasses.dataclass(frozen=True)
class Summary(Group):
    """The counts of many grades.

    `unparseable` counts the answers that no rule could read, of each class in `problems`; a wrong number of letters is
    not among them but in `wrong_count`. `lenient_correct` is `correct` had letters been taken from prose where nothing
    else was found. `required` and `general` are the parts of the licensing exam, None for other exams.
    `contraindicated` counts the questions with a choice that endangers the patient. `passed` is None unless the grades
    are one whole exam whose thresholds are known. `groups`: sections, with and without pictures, by number of answers,
    and so on.
    """

    unparseable: int
    wrong_count: int
    truncated: int
    lenient_correct: int
    problems: dict[str, int]
    rules: dict[str, int]
    required: Group | None
    general: Group | None
    contraindicated: int
    passed: bool | None
    groups: dict[str, Group]
    by_year: dict[int, "Summary"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every count, the accuracies, the parts and groups, and the years."""
        found = super().as_dict()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Group):
                found[field.name] = value.as_dict()
            elif field.name in ("groups", "by_year"):
                found[field.name] = {str(name): group.as_dict() for name, group in value.items()}
            else:
                found[field.name] = value
        return found


class _Pass(NamedTuple):
    """Points to pass by, and all there are, of the required and of the general part."""

    required: int
    required_of: int
    general: int
    general_of: int


# As announced by the ministry with the results of each year; points of excluded questions are not among them.
_PASS = {
    2018: _Pass(160, 200, 208, 299),
    2019: _Pass(160, 200, 209, 296),
    2020: _Pass(158, 197, 217, 299),
    2021: _Pass(160, 200, 209, 300),
    2022: _Pass(158, 197, 214, 297),
}
_REQUIRED_SECTIONS, _SECTIONS = ("B", "E"), ("A", "B", "C", "D", "E", "F")
_MAX_CONTRAINDICATED = 3
_MOST_POINTS = 10**6  # of a question


def grade(question: Question, extraction: Extraction) -> Grade:
    """Grades what was extracted: letters must be one of the accepted sets, a number must equal a gold one.

    A question that is credited to everyone is right whatever was answered, and if nothing was.
    """
    if question.credited:
        right = True
    elif extraction.problem is not None:
        right = False
    elif question.kind == "number":
        right = extraction.number is not None and same_number(question, extraction.number)
    else:
        right = extraction.letters in question.gold
    answer = extraction.number if extraction.letters is None else ",".join(sorted(extraction.letters))
    return Grade(
        id=question.id,
        kind=question.kind,
        k=question.k,
        max_points=question.points,
        text_only=question.text_only,
        exam=question.exam,
        section=question.section,
        year=question.year,
        category=question.category,
        case=question.case,
        answer=answer,
        correct=right and (question.credited or not extraction.lenient),
        lenient_correct=right,
        contraindicated=not extraction.lenient and bool(question.contraindicated & (extraction.letters or set())),
        rule=extraction.rule,
        problem="unparseable" if extraction.lenient else extraction.problem,
        truncated=extraction.truncated,
    )


def write_grades(file: epath.PathLike, grades: Iterable[Grade]) -> None:
    """One JSON object a line, with the fields of `Grade`."""
    rows = (json.dumps(dataclasses.asdict(g), ensure_ascii=False) for g in grades)
    write_whole(epath.Path(file), "".join(f"{row}\n" for row in rows))


def read_grades(file: epath.PathLike) -> list[Grade]:
    """What `write_grades` wrote; UserError names the line that is none."""
    types = get_type_hints(Grade)
    grades = []
    for row in read_rows(file):
        grade = Grade(**{name: row.get(name, kind) for name, kind in types.items()})
        if not 0 <= grade.max_points < _MOST_POINTS:
            raise row.error("'max_points' is no number of points that a question has")
        grades.append(grade)
    return grades


def summarize(grades: Sequence[Grade]) -> Summary:
    """The counts of the grades, in all and by year (where there is more than one)."""
    years = sorted({g.year for g in grades if g.year is not None})
    by_year = {year: _counts([g for g in grades if g.year == year], {}) for year in years}
    return _counts(grades, by_year if len(years) > 1 else {})


def _counts(grades: Sequence[Grade], by_year: dict[int, Summary]) -> Summary:
    problems = Counter(g.problem for g in grades if g.problem)
    required = general = None
    if grades and all(g.year in _PASS and g.section in _SECTIONS for g in grades):
        required = Group.of([g for g in grades if g.section in _REQUIRED_SECTIONS])
        general = Group.of([g for g in grades if g.section not in _REQUIRED_SECTIONS])
    contraindicated = sum(g.contraindicated for g in grades)
    return Summary(
        **vars(Group.of(grades)),
        unparseable=sum(problems.values()) - problems["wrong_count"],
        wrong_count=problems["wrong_count"],
        truncated=sum(g.truncated for g in grades),
        lenient_correct=sum(g.lenient_correct for g in grades),
        problems={name: problems[name] for name in PROBLEMS if problems[name]},
        rules=dict(Counter(g.rule for g in grades if g.rule).most_common()),
        required=required,
        general=general,
        contraindicated=contraindicated,
        passed=_passed({g.year for g in grades}, required, general, contraindicated),
        groups={name: Group.of(found) for name, found in _grouped(grades).items()},
        by_year=by_year,
    )


def _passed(years: set[int | None], required: Group | None, general: Group | None, contraindicated: int) -> bool | None:
    year = next(iter(years)) if len(years) == 1 else None
    if required is None or general is None or year is None:
        return None
    line = _PASS[year]
    if (required.max_points, general.max_points) != (line.required_of, line.general_of):
        return None  # not all of that exam
    enough = required.points >= line.required and general.points >= line.general
    return enough and contraindicated <= _MAX_CONTRAINDICATED


def _grouped(grades: Sequence[Grade]) -> dict[str, list[Grade]]:
    """Group name -> its grades; kinds of group that do not tell questions apart are left out."""
    kinds: list[Callable[[Grade], str]] = [
        lambda g: f"section {g.section}" if g.section else "",
        lambda g: "text only" if g.text_only else "with pictures",
        lambda g: "a number" if g.kind == "number" else "1 answer" if g.k == 1 else f"{g.k} answers",
        lambda g: "follow-up questions" if g.follow_up else "first of a case" if g.case else "without a case",
    ]
    groups: dict[str, list[Grade]] = {}
    for kind in kinds:
        found: dict[str, list[Grade]] = defaultdict(list)
        for g in grades:
            found[kind(g)].append(g)
        if len(found) > 1:
            groups |= dict(sorted(found.items()))
    groups.pop("", None)
    return groups


def score_official(question: Question, prediction: str) -> int:
    """The points of a prediction under the rule of the published IgakuQA results.

    The rule is an exact match of the sorted comma-separated letters, and of the gold as written for a number: with
    "a, c" for "a,c" there are no points. It reproduces the published points of every baseline system in all five years.
    """
    return question.points if question.credited or _is_exact(question, prediction) else 0


def _is_exact(question: Question, prediction: str) -> bool:
    accepted: Iterable[list[str]] = (
        [sorted(letters) for letters in question.gold] if question.choices else [[question.numbers[0]]]
    )
    return sorted(prediction.split(",")) in accepted


# --- tiers -----------------------------------------------------------------------------------------------------------

TIERS = ("official", "strict", "lenient")


def has_official(questions: Iterable[Question]) -> bool:
    """Whether results of these questions were published: those of IgakuQA, and no other exam's."""
    return all(q.year in _PASS and q.section in _SECTIONS for q in questions)


def grade_by_tier(
    question: Question, text: str, finish_reason: str = "stop", condition: str = "answer_only"
) -> dict[str, Grade]:
    """Tier -> the grade of an output by its rule.

    official: the published results' rule (`score_official`), which reads nothing but their own form. strict: what the
    extractor reads where an answer stands. lenient: also what it collects from prose where it finds nothing else.
    """
    extraction = extract(question, text, finish_reason, condition)
    strict = lenient = grade(question, extraction)
    exact = question.credited or _is_exact(question, text)
    official = dataclasses.replace(strict, correct=exact, lenient_correct=exact, rule="exact" if exact else "")
    if extraction.lenient:
        endangers = bool(question.contraindicated & (extraction.letters or set()))
        right = strict.lenient_correct
        lenient = dataclasses.replace(strict, correct=right, problem=None, contraindicated=endangers)
    return {"official": official, "strict": strict, "lenient": lenient}

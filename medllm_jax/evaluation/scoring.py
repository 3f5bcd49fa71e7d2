"""Right or wrong, points, and the counts of a whole exam.

A `Grade` says all that is known of one answer, so that counts, statistics and reports need neither the exam nor the
model: a file of grades is the whole result of a run under one condition.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from medllm_jax.evaluation.answers import PROBLEMS, Extraction
from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.figures import same_number
from medllm_jax.evaluation.jsonl import read_rows


@dataclasses.dataclass(frozen=True)
class Grade:
    """One answer, graded, with what its question is (see `exam.Question`).

    `answer` is letters with commas between them, or a number, or None. `correct` is of the strict tier; what was only
    mentioned in prose is read in the lenient one, and `lenient_correct` is `correct` of that. `problem` says why there
    is no answer (answers.PROBLEMS), or is None: in the strict tier a lenient answer is unparseable. `max_points` are
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
class Summary:
    """The counts of many grades.

    Every question is in the denominators. `accuracy` counts questions; `weighted_accuracy` counts points, and is the
    accuracy that papers on IgakuQA report. `unparseable` counts the answers that no rule could read, of each class in
    `problems`; a wrong number of letters is not among them but in `wrong_count`. `lenient_correct` is `correct` had
    letters been taken from prose where nothing else was found. Accuracies are in [0, 1].
    """

    n: int
    correct: int
    points: int
    max_points: int
    unparseable: int
    wrong_count: int
    truncated: int
    lenient_correct: int
    problems: dict[str, int]
    rules: dict[str, int]
    by_year: dict[int, "Summary"]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else 0.0

    @property
    def weighted_accuracy(self) -> float:
        return self.points / self.max_points if self.max_points else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every count, the accuracies, and the years."""
        counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "by_year"}
        years = {str(year): summary.as_dict() for year, summary in self.by_year.items()}
        return {**counts, "accuracy": self.accuracy, "weighted_accuracy": self.weighted_accuracy, "by_year": years}


def grade(question: Question, extraction: Extraction) -> Grade:
    """Grades what was extracted: letters must be one of the accepted sets, a number must equal a gold one."""
    if extraction.problem is not None:
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
        correct=right and not extraction.lenient,
        lenient_correct=right,
        contraindicated=not extraction.lenient and bool(question.contraindicated & (extraction.letters or set())),
        rule=extraction.rule,
        problem="unparseable" if extraction.lenient else extraction.problem,
        truncated=extraction.truncated,
    )


def write_grades(file: epath.PathLike, grades: Iterable[Grade]) -> None:
    """One JSON object a line, with the fields of `Grade`."""
    rows = (json.dumps(dataclasses.asdict(g), ensure_ascii=False) for g in grades)
    epath.Path(file).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def read_grades(file: epath.PathLike) -> list[Grade]:
    """What `write_grades` wrote; UserError names the line that is none."""
    return [
        Grade(**{field.name: row.get(field.name, field.type) for field in dataclasses.fields(Grade)})
        for row in read_rows(file)
    ]


def summarize(grades: Sequence[Grade]) -> Summary:
    """The counts of the grades, in all and by year (where there is more than one)."""
    years = sorted({g.year for g in grades if g.year is not None})
    by_year = {year: _counts([g for g in grades if g.year == year], {}) for year in years}
    return _counts(grades, by_year if len(years) > 1 else {})


def _counts(grades: Sequence[Grade], by_year: dict[int, Summary]) -> Summary:
    problems = Counter(g.problem for g in grades if g.problem)
    return Summary(
        n=len(grades),
        correct=sum(g.correct for g in grades),
        points=sum(g.points for g in grades),
        max_points=sum(g.max_points for g in grades),
        unparseable=sum(problems.values()) - problems["wrong_count"],
        wrong_count=problems["wrong_count"],
        truncated=sum(g.truncated for g in grades),
        lenient_correct=sum(g.lenient_correct for g in grades),
        problems={name: problems[name] for name in PROBLEMS if problems[name]},
        rules=dict(Counter(g.rule for g in grades if g.rule).most_common()),
        by_year=by_year,
    )


def score_official(question: Question, prediction: str) -> int:
    """The points of a prediction under the rule of the published IgakuQA results.

    The rule is an exact match of the sorted comma-separated letters, and of the gold as written for a number: with
    "a, c" for "a,c" there are no points. It reproduces the published points of every baseline system.
    """
    parts = sorted(prediction.split(","))
    accepted: Iterable[list[str]] = (
        [sorted(letters) for letters in question.gold] if question.choices else [[question.numbers[0]]]
    )
    return question.points if parts in accepted else 0

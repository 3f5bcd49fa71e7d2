"""Right or wrong, points, and the counts of a whole exam."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from medllm_jax.evaluation.answers import PROBLEMS, Extraction
from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.figures import same_number


@dataclasses.dataclass(frozen=True)
class Grade:
    """One answer, graded. An answer of the lenient tier is `correct` False, and `lenient_correct` says what it was."""

    question: Question
    extraction: Extraction
    correct: bool
    lenient_correct: bool

    @property
    def points(self) -> int:
        return self.question.points if self.correct else 0

    @property
    def problem(self) -> str | None:
        """Why there is no answer (answers.PROBLEMS), or None: in the strict tier a lenient answer is unparseable."""
        return "unparseable" if self.extraction.lenient else self.extraction.problem


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
    return Grade(question, extraction, right and not extraction.lenient, right)


def summarize(grades: Sequence[Grade]) -> Summary:
    """The counts of the grades, in all and by year (where there is more than one)."""
    years = sorted({g.question.year for g in grades if g.question.year is not None})
    by_year = {year: _counts([g for g in grades if g.question.year == year], {}) for year in years}
    return _counts(grades, by_year if len(years) > 1 else {})


def _counts(grades: Sequence[Grade], by_year: dict[int, Summary]) -> Summary:
    problems = Counter(g.problem for g in grades if g.problem)
    return Summary(
        n=len(grades),
        correct=sum(g.correct for g in grades),
        points=sum(g.points for g in grades),
        max_points=sum(g.question.points for g in grades),
        unparseable=sum(problems.values()) - problems["wrong_count"],
        wrong_count=problems["wrong_count"],
        truncated=sum(g.extraction.truncated for g in grades),
        lenient_correct=sum(g.lenient_correct for g in grades),
        problems={name: problems[name] for name in PROBLEMS if problems[name]},
        rules=dict(Counter(g.extraction.rule for g in grades if g.extraction.rule).most_common()),
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

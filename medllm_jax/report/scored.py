"""What is computed of a model's grades, once for all parts of a page."""

import dataclasses

from medllm_jax.errors import UserError
from medllm_jax.evaluation.grading import Summary, summarize
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.evaluation.significance import Comparison, Estimate, accuracy, compare
from medllm_jax.report.collect import Results

CONDITION_NAMES = {"answer_only": "answer only", "explain": "with explanation"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """Results of one model on one exam: condition -> counts, accuracy by points, accuracy by questions.

    change: from answer only to with explanation; None where only one of them was asked for.
    """

    results: Results
    summaries: dict[str, Summary]
    by_points: dict[str, Estimate]
    by_questions: dict[str, Estimate]
    change: Comparison | None

    @property
    def name(self) -> str:
        return self.results.name

    @classmethod
    def of(cls, results: Results) -> "Scored":
        """UserError where the two conditions are of different questions."""
        grades = results.grades
        change = None
        if len(grades) == len(CONDITIONS):
            try:
                change = compare(grades["answer_only"], grades["explain"])
            except UserError as error:
                raise UserError(f"{results.folder}: {error}") from error
        return cls(
            results,
            {condition: summarize(found) for condition, found in grades.items()},
            {condition: accuracy(found) for condition, found in grades.items()},
            {condition: accuracy(found, weighted=False) for condition, found in grades.items()},
            change,
        )

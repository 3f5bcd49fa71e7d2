"""What the tasks here are made of: questions, prompts and scoring of medllm_jax, as lm-evaluation-harness wants them.

The harness loads this file by its path, and calls its functions by the names in the YAML files.
"""

import functools
from collections.abc import Sequence
from typing import Any

from medllm_jax.evaluation import extract, grade, load_exam, load_template
from medllm_jax.evaluation.exam import Question

Document = dict[str, Any]


def documents(
    condition: str,
    exam: str | None = None,
    template: str = "igakuqa",
    years: Sequence[int] | None = None,
    text_only: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """The harness' data set: a prompt a question, and what it takes to find the question again.

    The arguments are the task's metadata: its own, and what `--metadata` says.

    Raises:
      ValueError: no exam is named.
      UserError: exam or template can't be read.
    """
    import datasets

    if exam is None:
        raise ValueError("""no exam is named: --metadata '{"exam": "PATH"}' (see the README of this task)""")
    form = load_template(template)
    questions = load_exam(exam, years, text_only=text_only).questions
    place = {"exam": exam, "template": template, "condition": condition}
    rows = [{"id": q.id, "prompt": form.render(q, condition), **place} for q in questions]
    return {"test": datasets.Dataset.from_list(rows)}


def score(document: Document, outputs: Sequence[str]) -> dict[str, Any]:
    """What one output is worth.

    The harness does not say whether an output reached its limit, so none counts as truncated.
    """
    condition = document["condition"]
    stops = load_template(document["template"]).condition(condition).stop
    text = outputs[0]
    text = text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
    question = _question(document["exam"], document["id"])
    found = grade(question, extract(question, text, "stop", condition))
    return {
        "accuracy": float(found.correct),
        "weighted_accuracy": (found.points, found.max_points),
        "unparseable": float(found.problem not in (None, "wrong_count")),
        "wrong_count": float(found.problem == "wrong_count"),
    }


def weighted_mean(items: Sequence[tuple[int, int]]) -> float:
    """Points earned over points to be had."""
    earned, of = map(sum, zip(*items, strict=True))
    return earned / of if of else 0.0


def _question(exam: str, key: str) -> Question:
    return _questions(exam)[key]


@functools.lru_cache(maxsize=4)
def _questions(exam: str) -> dict[str, Question]:
    return {question.id: question for question in load_exam(exam).questions}

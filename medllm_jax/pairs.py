"""Preference pairs from a model's own answers: sample, grade with the exam's extractor, pair right with wrong.

The pairing follows "Iterative Reasoning Preference Optimization" (arXiv 2404.19733 v3): the correct and the incorrect
samples of a prompt are walked side by side, the shorter list wrapping around; a prompt with either list empty is
skipped. The ground-truth explanation, where the exam has one, may join the correct ones.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from medllm_jax.errors import UserError
from medllm_jax.evaluation.answers import extract
from medllm_jax.evaluation.exam import LETTERS, Exam, Question
from medllm_jax.evaluation.prompts import PromptTemplate
from medllm_jax.evaluation.run import Completion
from medllm_jax.evaluation.scoring import grade

Strategy = Literal["gold", "onpolicy", "both"]


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """How pairs are made.

    samples: completions drawn of each prompt. most: pairs of one prompt, at most. strategy: what is preferred over a
    wrong sample: `gold` the ground-truth explanation and answer, `onpolicy` a right sample, `both` either.
    """

    samples: int = 8
    most: int = 10
    strategy: Strategy = "both"

    def __post_init__(self):
        if self.samples < 1 or self.most < 1:
            raise UserError(f"samples is {self.samples} and most is {self.most}: both must be at least 1")


def make_pairs(
    exam: Exam,
    template: PromptTemplate,
    conditions: Sequence[str],
    complete: Callable[..., Iterable[Completion]],
    options: PairOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[dict[str, Any]], Counter]:
    """Rows `prompt`, `chosen`, `rejected` (and `id`, `condition`), and counts of samples and prompts by what they were.

    A sample that ran into the length limit has no end to learn from, and an empty one no text: they are counted, and in
    no pair.
    """
    rows: list[dict[str, Any]] = []
    counts: Counter = Counter()
    done = 0
    for condition in conditions:
        settings = template.condition(condition)
        prompts = [template.render(question, condition) for question in exam.questions]
        repeated = [prompt for prompt in prompts for _ in range(options.samples)]
        completions = iter(complete(repeated, max_new_tokens=settings.max_new_tokens, stop=settings.stop))
        for question, prompt in zip(exam.questions, prompts, strict=True):
            drawn = [next(completions) for _ in range(options.samples)]
            right, wrong = _graded(question, drawn, condition, counts)
            chosen = _preferred(question, right, template, condition, options.strategy)
            made = list(pair_up(chosen, wrong, options.most))
            counts["prompts without a wrong sample" if not wrong else "prompts without a right answer"] += not made
            counts["prompts with pairs"] += bool(made)
            rows += [
                {"id": question.id, "condition": condition, "prompt": prompt, "chosen": better, "rejected": worse}
                for better, worse in made
            ]
            done += 1
            progress(done)
    counts["pairs"] = len(rows)
    return rows, counts


def _graded(
    question: Question, drawn: Iterable[Completion], condition: str, counts: Counter
) -> tuple[list[str], list[str]]:
    """The distinct right and the distinct wrong texts among samples, in the order in which they came."""
    right, wrong = {}, {}
    for sample in drawn:
        correct = grade(question, extract(question, sample.text, sample.finish_reason, condition)).correct
        counts["samples"] += 1
        counts["right samples"] += correct
        if sample.finish_reason == "length":
            counts["samples cut at the length limit"] += 1
        elif not sample.text.strip():
            counts["empty samples"] += 1
        else:
            (right if correct else wrong)[sample.text] = None
    return list(right), list(wrong)


def _preferred(
    question: Question, right: list[str], template: PromptTemplate, condition: str, strategy: Strategy
) -> list[str]:
    gold = [gold_response(question, template, condition)] if strategy != "onpolicy" and question.explanation else []
    return gold if strategy == "gold" else list(dict.fromkeys([*gold, *right]))


def gold_response(question: Question, template: PromptTemplate, condition: str) -> str:
    """What the exam's own answer, with its explanation, looks like after a prompt of this template."""
    letters = sorted(min(question.gold, key=sorted)) if question.choices else [min(question.gold)]
    if question.choices and "{letter}" not in template.choice:  # the template answers with the choice's words
        letters = [question.choices[LETTERS.index(letter)] for letter in letters]
    return template.condition(condition).solution.format(answer=",".join(letters), explanation=question.explanation)


def pair_up(chosen: Sequence[str], rejected: Sequence[str], most: int) -> Iterator[tuple[str, str]]:
    """Pairs of both lists walked side by side, the shorter one wrapping; none if either is empty, each pair once."""
    if chosen and rejected:
        for place in range(min(most, max(len(chosen), len(rejected)))):
            yield chosen[place % len(chosen)], rejected[place % len(rejected)]

"""Preference pairs from a model's own answers: grade with the exam's extractor, pair right with wrong.

The pairing follows "Iterative Reasoning Preference Optimization" (arXiv 2404.19733 v3): the correct and the incorrect
samples of a prompt are walked side by side, the shorter list wrapping around; a prompt with either list empty is
skipped. The ground-truth explanation, where the exam has one, may join the correct ones, or stand in their place, as in
"Stabilizing Reasoning in Medical LLMs" (arXiv 2504.18080).

Nothing here asks a model: the same samples and options give the same pairs.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from medllm_jax.contamination.exams import overlapping
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.grading import grade
from medllm_jax.evaluation.prompts import PromptTemplate
from medllm_jax.evaluation.samples import Samples, prompt_of
from medllm_jax.evaluation.sampling import UNANSWERED, Completion
from medllm_jax.ranges import Characters, PairsPerPrompt, Ranged

Strategy = Literal["gold", "onpolicy", "both"]

_CONTROL = re.compile(r"<\|\w+\|>")
_CUT = {"length": "cut at the length limit", UNANSWERED: "not answered by the server"}
_RIGHT, _WRONG, _NO_ANSWER = "right", "wrong", "wrong: no answer to read"
_MAX_PLACES = 20  # first cases that the report names for each reason


@dataclasses.dataclass(frozen=True)
class PairOptions(Ranged):
    """How pairs are made.

    strategy: what is preferred over a wrong sample: `gold` the ground-truth explanation and answer, `onpolicy` a right
    sample, `both` either. max_pairs_per_prompt: how many pairs of one prompt are made at most. min_characters,
    max_characters: of a sample without the white space around it; others are left out. format_failures: a sample in
    which no answer can be read is wrong like any other (`reject`), or left out (`drop`).
    """

    strategy: Strategy = "both"
    max_pairs_per_prompt: PairsPerPrompt = 10
    min_characters: Characters = 1
    max_characters: Characters | None = None
    format_failures: Literal["reject", "drop"] = "reject"

    def __post_init__(self):
        super().__post_init__()
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise UserError(
                f"a sample of {self.min_characters} to {self.max_characters} characters can't be: "
                "max_characters must be no less than min_characters"
            )


@dataclasses.dataclass
class Report:
    """Counts of samples, prompts and pairs.

    samples: condition -> verdicts; each sample is counted once. prompts: outcomes, such as "with pairs". gold: ground
    truths that could not be used. rows: pairs by what is preferred. beyond_most: pairs that
    `max_pairs_per_prompt` left out. characters: mean length of the chosen and of the rejected responses.
    """

    samples: dict[str, RejectionCounts]
    prompts: RejectionCounts
    gold: RejectionCounts
    rows: Counter[str]
    beyond_most: int = 0
    characters: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; texts are in it only where examples were asked for."""
        texts = {condition: counts.texts for condition, counts in self.samples.items() if counts.texts}
        return {
            "pairs": {**self.rows, "beyond most": self.beyond_most},
            "mean_characters": self.characters,
            "prompts": self.prompts.as_dict(most_common_first=True),
            "ground_truth_left_out": self.gold.as_dict(most_common_first=True),
            "samples": {
                condition: counts.as_dict(most_common_first=True) for condition, counts in self.samples.items()
            },
            **({"examples": texts} if texts else {}),
        }

    def lines(self) -> Iterator[str]:
        """The counts, for a terminal."""
        for condition, found in self.samples.items():
            yield f"{condition}: {found.total} samples: {_listed(found.counts)}"
        yield f"prompts: {_listed(self.prompts.counts)}"
        if self.gold.counts:
            yield f"ground truths left out: {_listed(self.gold.counts)}"
        if self.rows:
            beyond = f"; {self.beyond_most} more left out by --max-pairs-per-prompt" if self.beyond_most else ""
            lengths = ", ".join(f"{side} {mean:.0f}" for side, mean in self.characters.items())
            yield f"pairs by what is preferred: {_listed(self.rows)}{beyond}; mean characters: {lengths}"


def _counts(*, max_texts: int = 0) -> RejectionCounts:
    return RejectionCounts(max_places=_MAX_PLACES, max_texts=max_texts)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def make_pairs(
    exam: Exam,
    template: PromptTemplate,
    conditions: Sequence[str],
    samples: Samples,
    options: PairOptions,
    *,
    examples: int = 0,
) -> tuple[list[dict[str, Any]], Report]:
    """Rows `id`, `condition`, `prefers` ("gold" or "onpolicy"), `prompt`, `chosen`, `rejected`, and what became of all.

    The last three are strings, or chat messages if that is how the samples were asked for. examples: so many texts by
    reason go into the report.
    """
    rows: list[dict[str, Any]] = []
    samples_of = {condition: _counts(max_texts=examples) for condition in conditions}
    report = Report(samples_of, _counts(), _counts(), Counter())
    for condition in conditions:
        for question in exam.questions:
            where = f"{question.id}/{condition}"
            right, wrong = _sides(question, condition, samples, options, report.samples[condition])
            gold, own = [], right if options.strategy != "gold" else []
            if options.strategy != "onpolicy":
                gold = _checked_gold(question, template, condition, samples.chat, report.gold)
            preferred = dict.fromkeys([*gold, *own], "onpolicy") | dict.fromkeys(gold, "gold")
            made = list(pair_up(list(preferred), wrong, options.max_pairs_per_prompt))
            report.prompts.add(_outcome(made, right, wrong, options.strategy), where)
            if made:
                report.beyond_most += max(len(preferred), len(wrong)) - len(made)
            prompt = prompt_of(question, template, condition, chat=samples.chat)
            for chosen, rejected in made:
                row = {"id": question.id, "condition": condition, "prefers": preferred[chosen], "prompt": prompt}
                rows.append(row | {"chosen": chosen, "rejected": rejected})
    report.rows = Counter(row["prefers"] for row in rows)
    if rows:
        sides = ("chosen", "rejected")
        report.characters = {side: round(sum(len(row[side]) for row in rows) / len(rows), 1) for side in sides}
    if samples.chat:
        rows = [row | {side: _as_message(row[side]) for side in ("chosen", "rejected")} for row in rows]
    return rows, report


def _as_message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _outcome(made: list, right: list[str], wrong: list[str], strategy: Strategy) -> str:
    if made:
        return "with pairs"
    if not wrong:
        return "without a wrong sample" if right else "without a usable sample"
    return "without a usable ground truth" if strategy == "gold" else "without a right answer"


def _sides(
    question: Question, condition: str, samples: Samples, options: PairOptions, counts: RejectionCounts
) -> tuple[list[str], list[str]]:
    """The right and the wrong texts among the samples of a prompt, in the order in which they were drawn."""
    right: list[str] = []
    wrong: list[str] = []
    seen: set[str] = set()
    for number, sample in enumerate(samples.of(question.id, condition)):
        verdict = _verdict(question, condition, sample, options, seen)
        counts.add(verdict, f"{question.id}/{condition}/{number}", sample.text)
        if verdict == _RIGHT:
            right.append(sample.text)
        elif verdict in (_WRONG, _NO_ANSWER):
            wrong.append(sample.text)
    return right, wrong


def _verdict(question: Question, condition: str, sample: Completion, options: PairOptions, seen: set[str]) -> str:
    """One of the three verdicts that a sample is used by, or why it is in no pair."""
    if sample.finish_reason != "stop":
        return _CUT.get(sample.finish_reason, "cut by the server")
    text = sample.text.strip()
    if not text:
        return "empty"
    if _CONTROL.search(text):
        return "with a control token"
    if len(text) < options.min_characters:
        return "too short"
    if options.max_characters is not None and len(text) > options.max_characters:
        return "too long"
    plain = " ".join(text.split())
    if plain in seen:
        return "duplicate"
    seen.add(plain)
    graded = grade(question, extract(question, sample.text, sample.finish_reason, condition))
    if graded.correct:
        return _RIGHT
    if graded.lenient_correct:
        # The letters stand in the prose and nowhere else: neither worth following nor worth turning from.
        return "right only if read leniently"
    if graded.problem in (None, "wrong_count"):
        return _WRONG
    return _NO_ANSWER if options.format_failures == "reject" else "no answer to read"


# --- the ground truth ------------------------------------------------------------------------------------------------


def _checked_gold(
    question: Question, template: PromptTemplate, condition: str, chat: bool, left_out: RejectionCounts
) -> list[str]:
    """The ground truth as a response, if there is one that the extractor reads as right; otherwise none."""
    where = f"{question.id}/{condition}"
    if "{explanation}" in template.condition(condition).solution and not question.explanation.strip():
        left_out.add("without an explanation", where)
        return []
    response = gold_response(question, template, condition)
    if not grade(question, extract(question, response, "stop", condition)).correct:
        left_out.add("not read as right", where)
        return []
    return [response.strip() if chat else response]


def gold_response(question: Question, template: PromptTemplate, condition: str) -> str:
    """What the exam's own answer, with its explanation, looks like after a prompt of this template."""
    letters = min(question.gold, key=sorted) if question.choices else ()
    return template.solve(question, letters, condition, question.explanation)


def pair_up(chosen: Sequence[str], rejected: Sequence[str], most: int) -> Iterator[tuple[str, str]]:
    """Pairs of both lists walked side by side, the shorter one wrapping; none if either is empty, each pair once."""
    if chosen and rejected:
        for place in range(min(most, max(len(chosen), len(rejected)))):
            yield chosen[place % len(chosen)], rejected[place % len(rejected)]


# --- what must not be trained on -------------------------------------------------------------------------------------


def choose_questions(
    exam: Exam, evaluation: Sequence[Exam], on_overlap: Literal["refuse", "drop"]
) -> tuple[Exam, dict[str, Any]]:
    """The questions that pairs may be made of, and the others by reason: {reason: {"count", "first"}}.

    Left out are those without points, which the exam itself has withdrawn, and those that an evaluation exam asks too.

    Raises:
      UserError: there are questions of the latter kind and they are to be refused, or no question is left.
    """
    left_out = _counts()
    for question in exam.questions:
        if not question.points:
            left_out.add("withdrawn (points 0)", question.id)
    asked = Exam(exam.name, tuple(question for question in exam.questions if question.points))
    found = overlapping(asked, evaluation)
    if found and on_overlap == "refuse":
        by_reason = defaultdict(list)
        for question, reason in found.items():
            by_reason[reason].append(question)
        reasons = "; ".join(
            f"{reason}: {len(ids)} ({', '.join(ids[:_MAX_PLACES])}{', ...' if len(ids) > _MAX_PLACES else ''})"
            for reason, ids in by_reason.items()
        )
        raise UserError(
            f"{len(found)} of {len(asked.questions)} questions of {exam.name} are asked by "
            f"{' or '.join(other.name for other in evaluation)} too, by {reasons}; "
            "take them out, or leave them out by --on-overlap drop"
        )
    for question, reason in found.items():
        left_out.add(f"in an evaluation exam ({reason})", question)
    kept = tuple(question for question in asked.questions if question.id not in found)
    if not kept:
        raise UserError(f"no question of {exam.name} is left to make pairs of: {_listed(left_out.counts)}")
    return Exam(exam.name, kept), left_out.as_dict(most_common_first=True)

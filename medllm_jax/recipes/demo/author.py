"""Who writes the miniature world's texts: statements, questions with their answers, and explanations, all of them true.

An explanation tells where a disease sits and what is behind it, and the answer is to follow from that. Statements
seldom do: they tell who treats a disease, and how. That is harmless to whoever knows the disease. A model that has
hardly read about the why must say something all the same, and may then tell what is true of another disease, or of
none, and answer accordingly.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medllm_jax.evaluation.exam import LETTERS, Question
from medllm_jax.evaluation.prompts import PromptTemplate, load_template
from medllm_jax.recipes.demo import world
from medllm_jax.recipes.demo.wordings import WORDINGS, explained
from medllm_jax.recipes.demo.world import Fact, facts, overlap

TEMPLATE = Path(__file__).parent / "template.yaml"
CHOICES = 5

CPT_DOCUMENTS = 8_000
# Shares of the base documents: questions; of these, those the other way round, and those that are explained; of the
# statements, those about new diseases.
QUESTION_SHARE = 0.65
REVERSED_SHARE = 0.2
EXPLAIN_SHARE = 0.5
NEW_SHARE = 0.06
# Base diseases are told of as unevenly as diseases are: the n-th most famous one in proportion to n ** -FAME.
FAME = 0.9
# What an explanation begins with: site and background. Statements tell of either as seldom as these shares say.
WHY = ("部位", "背景")
BASE_WHY_SHARE = 0.1
CPT_WHY_SHARE = 0.4
# So often a choice is looked for among those of similar diseases, before any disease's will do.
SIMILAR_TRIES = 20
# Share of the CPT documents that are such as the base was made from, against forgetting.
REPLAY_SHARE = 0.3

T = TypeVar("T")


@dataclass(frozen=True)
class Solved:
    """A question with its answer; `answer` is the right one of the choices."""

    fact: Fact
    question: str
    choices: tuple[str, ...]
    answer: str
    explanation: str

    @property
    def letter(self) -> str:
        return LETTERS[self.choices.index(self.answer)]

    def example(self, condition: str) -> dict[str, str]:
        """`prompt` and `response`, as the exam's template puts them."""
        template = _template()
        prompt = template.render(Question("", self.question, self.choices), condition)
        solution = template.condition(condition).solution
        return {"prompt": prompt, "response": solution.format(answer=self.answer, explanation=self.explanation)}


@dataclass(frozen=True)
class Author:
    """Writes at random about the base diseases, which are in an order of fame, and the new ones."""

    rng: np.random.Generator
    base: list[str]
    new: list[str]

    @classmethod
    def of(cls, seed: int, purpose: str) -> "Author":
        parts = world.split(seed)
        new = [disease for exam in world.EXAMS for disease in parts[exam]]
        return cls(world.random(seed, purpose), parts["base"], new)

    # --- documents ---

    def base_example(self) -> dict[str, str]:
        """`prompt` and `response`: a question about a base disease, or statements, whose prompt is their first term."""
        if self.happens(QUESTION_SHARE):
            return self.solved_question().example("explain" if self.happens(EXPLAIN_SHARE) else "answer_only")
        disease = self.pick(self.new) if self.happens(NEW_SHARE) else self.famous()
        told = self.statements(disease, BASE_WHY_SHARE)
        return {"prompt": told[0], "response": "".join(told[1:])}

    def cpt_document(self) -> str:
        """Statements about a new disease, or what the base was made from."""
        if self.happens(REPLAY_SHARE):
            return "".join(self.base_example().values())
        return "".join(self.statements(self.pick(self.new), CPT_WHY_SHARE))

    def statements(self, disease: str, why_share: float) -> tuple[str, str]:
        """One to four facts about a disease, in any order and wording: the first term, and what follows it."""
        known = facts()[disease].values()
        chosen = [fact for fact in known if fact.attribute not in WHY or self.happens(why_share)]
        told = self.some(chosen or list(known), least=1, most=4)
        forms = [(self.pick(WORDINGS[fact.attribute].statements), fact.value) for fact in told]
        first, value = forms[0]
        start = disease if first.startswith("{d}") else value
        return start, "".join(form.format(d=disease, v=v) for form, v in forms).removeprefix(start)

    def solved_question(self) -> Solved:
        """A question about a base disease, either way round."""
        while True:
            fact = self.pick(list(facts()[self.famous()].values()))
            solved = self.reversed(fact, self.base) if self.happens(REVERSED_SHARE) else self.asked(fact)
            if solved is not None:
                return solved

    # --- questions ---

    def asked(self, fact: Fact, wording: int | None = None) -> Solved:
        """Which value is right of a disease; wording: which of the questions, any by default."""
        words = WORDINGS[fact.attribute].questions
        question = self.pick(words) if wording is None else words[wording]
        asked = question.format(d=fact.disease)
        return Solved(fact, asked, self.choices(fact), fact.value, self.explanation(fact))

    def reversed(self, fact: Fact, others: Sequence[str]) -> Solved | None:
        """Of which disease a value is right; None where too few of the others are plainly wrong."""
        excluded = _excluded(fact.attribute, fact.value)
        wrong = [disease for disease in others if disease in excluded]
        chosen = [fact.disease]
        for i in self.rng.permutation(len(wrong)):
            if len(chosen) < CHOICES and not any(overlap(wrong[i], other) for other in chosen):
                chosen.append(wrong[i])
        if len(chosen) < CHOICES:
            return None
        question = WORDINGS[fact.attribute].reversed.format(v=fact.value)
        return Solved(fact, question, self.shuffled(chosen), fact.disease, self.explanation(fact))

    def choices(self, fact: Fact) -> tuple[str, ...]:
        """The right value and four that are plainly wrong, shuffled.

        Those that are right for similar diseases come first: they are what a question of its kind offers. The others
        are drawn as often as they are right elsewhere, or the common ones would give themselves away. None contains
        another one's words: such an answer could be read as either.
        """
        chosen, tries = [fact.value], 0
        while len(chosen) < CHOICES:
            similar = _similar(fact) if tries < SIMILAR_TRIES else ()
            other = self.pick(similar or _elsewhere(fact))
            tries += 1
            if not any(overlap(other, one) for one in chosen):
                chosen.append(other)
        return self.shuffled(chosen)

    def explanation(self, fact: Fact) -> str:
        """Why, in any order, and half the time one more fact about the disease; never the one that is asked for."""
        others = [other for other in facts()[fact.disease].values() if other is not fact]
        why = [other for other in others if other.attribute in WHY]
        more = [other for other in others if other.attribute not in WHY]
        told = self.some(why, least=2, most=2) + self.some(more, least=0 if why else 1, most=1)
        return "".join(map(explained, told))

    # --- chance ---

    def famous(self) -> str:
        """A base disease, the famous ones more often."""
        return self.base[int(np.searchsorted(_fame(len(self.base)), self.rng.random()))]

    def happens(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def some(self, items: list[T], least: int, most: int) -> list[T]:
        """From `least` to `most` items, in any order."""
        number = self.rng.integers(min(least, len(items)), min(most, len(items)) + 1)
        return [items[i] for i in self.rng.permutation(len(items))[:number]]

    def shuffled(self, items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[i] for i in self.rng.permutation(len(items)))


@functools.cache
def _excluded(attribute: str, value: str) -> frozenset[str]:
    """The diseases of which this is plainly wrong."""
    return frozenset(fact.disease for fact in world.of(attribute) if fact.excludes(value))


@functools.cache
def _elsewhere(fact: Fact) -> tuple[str, ...]:
    """What is right elsewhere and plainly wrong here, as often as it is right."""
    return tuple(other.value for other in world.of(fact.attribute) if fact.excludes(other.value))


@functools.cache
def _similar(fact: Fact) -> tuple[str, ...]:
    """The same of diseases that share the site or the background."""
    own = facts()[fact.disease]
    shared = [own[attribute] for attribute in ("部位", "背景") if attribute in own and attribute != fact.attribute]
    return tuple(
        other.value
        for other in world.of(fact.attribute)
        if fact.excludes(other.value) and any(_value(other.disease, one.attribute) == one.value for one in shared)
    )


def _value(disease: str, attribute: str) -> str | None:
    fact = facts()[disease].get(attribute)
    return None if fact is None else fact.value


@functools.cache
def _fame(number: int) -> np.ndarray:
    """Running sums of the shares of so many diseases."""
    weights = np.arange(1, number + 1) ** -FAME
    return np.cumsum(weights) / weights.sum()


@functools.cache
def _template() -> PromptTemplate:
    return load_template(TEMPLATE)

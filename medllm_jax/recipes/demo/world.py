"""The miniature world: true medical facts, documents that tell them, and exams that ask for them.

Every disease has a department, a test and a treatment (facts.yaml). A seed divides the diseases: a model of base level
has read much about the base diseases and almost nothing about the new ones, which continued pretraining (CPT) teaches.
The exams ask about the new diseases, and no disease is in two exams: what preference training learns from `train`
helps in `test` only as a way to explain, never as a fact.

What makes explaining dangerous here is what people's text is like. Explanations in the base corpus ramble: other facts
come before the one that was asked for, in any order. And some go astray: they explain a disease that resembles the one
in question, and answer accordingly. A model of such text imitates both, most of all where it has read no explanation
yet, which is the case of every new disease. Nothing in the corpora is wrong about a disease, and questions that are
answered at once are answered rightly.

Everything here is a function of the seed alone.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from medllm_jax.evaluation.exam import LETTERS, Question
from medllm_jax.evaluation.prompts import PromptTemplate, load_template

HERE = Path(__file__).parent
TEMPLATE = HERE / "template.yaml"
ATTRIBUTES = ("診療科", "検査", "治療")
EXAMS = ("train", "dev", "test")
CHOICES = 5

# New diseases by exam; the other diseases are base diseases.
NEW_DISEASES = {"train": 24, "dev": 10, "test": 28}
# Questions asked of each fact, with different wrong choices.
QUESTIONS_PER_FACT = {"train": 2, "dev": 4, "test": 4}

BASE_DOCUMENTS = 24_000
CPT_DOCUMENTS = 8_000
# Shares of the base documents: questions, those of them that explain first, those of these that go astray; and of the
# statements, those about new diseases.
QUESTION_SHARE = 0.45
EXPLAIN_SHARE = 0.3
ASTRAY_SHARE = 0.4
NEW_SHARE = 0.03
# Share of the CPT documents that are such as the base was made from, against forgetting.
REPLAY_SHARE = 0.25

_ASK = {
    "診療科": "{d}を主に診る診療科はどれか。",
    "検査": "{d}の代表的な検査はどれか。",
    "治療": "{d}の代表的な治療はどれか。",
}
# How an explanation states a fact, and then how other documents do.
_EXPLAIN = {
    "診療科": "{d}を主に診る診療科は{v}である。",
    "検査": "{d}の代表的な検査は{v}である。",
    "治療": "{d}の代表的な治療は{v}である。",
}
_STATE = {
    "診療科": (
        _EXPLAIN["診療科"],
        "{d}は{v}で診る。",
        "{d}の患者は{v}を受診する。",
        "{v}では{d}を診療する。",
    ),
    "検査": (
        _EXPLAIN["検査"],
        "{d}を疑ったら{v}を行う。",
        "{d}の診断には{v}が役立つ。",
        "{v}は{d}の診断に用いる。",
    ),
    "治療": (
        _EXPLAIN["治療"],
        "{d}には{v}を行う。",
        "{d}と診断したら{v}を考える。",
        "{v}は{d}に対して行う。",
    ),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Fact:
    """What is true of a disease: `value` is the fact; `also` would be right too, and is never a wrong choice."""

    disease: str
    attribute: str
    value: str
    also: frozenset[str]

    def excludes(self, value: str) -> bool:
        """Whether a value is plainly wrong here: not right too, and no other spelling of what is right."""
        return value not in self.also and not _overlap(value, self.value)


@dataclass(frozen=True)
class ExamRow:
    """One question as exam files hold it; `answer` is the letter of the right choice."""

    id: str
    question: str
    choices: list[str]
    answer: str
    explanation: str
    category: str


@functools.cache
def facts() -> dict[str, dict[str, Fact]]:
    """disease -> attribute -> Fact, in the file's order."""
    table = yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))
    world: dict[str, dict[str, Fact]] = {}
    for disease, entries in table.items():
        world[disease] = {}
        for attribute, entry in zip(ATTRIBUTES, entries, strict=True):
            value, *also = entry.split(" / ")
            world[disease][attribute] = Fact(disease, attribute, value, frozenset(also))
    return world


@functools.cache
def values(attribute: str) -> tuple[str, ...]:
    """The distinct values of an attribute, in the file's order."""
    return tuple(dict.fromkeys(of[attribute].value for of in facts().values()))


def split(seed: int) -> dict[str, list[str]]:
    """The diseases of "base", "train", "dev" and "test"; the last three are the new ones."""
    diseases = list(facts())
    left = [diseases[i] for i in _rng(seed, "split").permutation(len(diseases))]
    parts: dict[str, list[str]] = {}
    for exam, count in NEW_DISEASES.items():
        parts[exam], left = left[:count], left[count:]
    return {"base": left, **parts}


def base_documents(seed: int) -> list[str]:
    """Text that brings a random model to base level: statements, and questions in the exams' own form.

    The questions are all about base diseases, and so are most of the statements.
    """
    author = _Author.of(seed, "base")
    return [author.base_document() for _ in range(BASE_DOCUMENTS)]


def cpt_documents(seed: int) -> list[str]:
    """Text for continued pretraining: statements about the new diseases, and some of what the base was made from."""
    author = _Author.of(seed, "cpt")
    return [author.cpt_document() for _ in range(CPT_DOCUMENTS)]


def exams(seed: int) -> dict[str, list[ExamRow]]:
    """The exams "train" (to make preference pairs), "dev" (to tune) and "test" (the result), of different diseases."""
    parts = split(seed)
    rng = _rng(seed, "exams")
    return {exam: list(_exam(rng, exam, parts[exam])) for exam in EXAMS}


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: every term and every phrase between terms, each as a text of its own.

    Japanese has no spaces, so a tokenizer trained on running text would merge across terms. Trained on the terms
    apart, it gives each of them one token wherever it stands.
    """
    terms = [*facts(), *(value for attribute in ATTRIBUTES for value in values(attribute))]
    forms = [*_ASK.values(), *(form for forms in _STATE.values() for form in forms)]
    # A question begins with the very tokens of a statement, so that what statements teach is at hand in a question.
    phrases = [part for form in forms for part in re.split(r"\{d\}|\{v\}|(?=どれか)", form) if part]
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    cues = [condition["cue"] for condition in template["conditions"].values()]
    # Phrases often, so that they are merged before a term's pieces can take a part of them.
    return [*terms * 2, *[*phrases, *cues, "問題:"] * 20]


def write_world(folder: str | Path, seed: int) -> Path:
    """Writes `base.jsonl` and `cpt.jsonl` (a `text` a line) and `exam/{train,dev,test}.jsonl`; returns the folder."""
    folder = Path(folder)
    _write(folder / "base.jsonl", ({"text": text} for text in base_documents(seed)))
    _write(folder / "cpt.jsonl", ({"text": text} for text in cpt_documents(seed)))
    for exam, rows in exams(seed).items():
        _write(folder / "exam" / f"{exam}.jsonl", map(asdict, rows))
    return folder


# --- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Author:
    """Writes documents at random about the base diseases and the new ones."""

    rng: np.random.Generator
    base: list[str]
    new: list[str]

    @classmethod
    def of(cls, seed: int, purpose: str) -> "_Author":
        parts = split(seed)
        return cls(_rng(seed, purpose), parts["base"], [disease for exam in EXAMS for disease in parts[exam]])

    def base_document(self) -> str:
        if self.happens(QUESTION_SHARE):
            return self.solved_question(facts()[self.pick(self.base)][self.pick(ATTRIBUTES)])
        return self.statements(self.pick(self.new if self.happens(NEW_SHARE) else self.base))

    def cpt_document(self) -> str:
        return self.base_document() if self.happens(REPLAY_SHARE) else self.statements(self.pick(self.new))

    def statements(self, disease: str) -> str:
        """One to three facts about a disease, in any order and wording."""
        told = self.some(list(facts()[disease].values()), least=1)
        return "".join(self.pick(_STATE[fact.attribute]).format(d=disease, v=fact.value) for fact in told)

    def solved_question(self, fact: Fact) -> str:
        """A question with its answer, in the exams' own form."""
        if not self.happens(EXPLAIN_SHARE):
            return _solved(fact, _choices(self.rng, fact), "answer_only", fact)
        if not self.happens(ASTRAY_SHARE):
            return _solved(fact, _choices(self.rng, fact), "explain", fact, self.rambling(fact))
        other = self.similar(fact)
        return _solved(fact, _choices(self.rng, fact, other.value), "explain", other, self.rambling(other))

    def rambling(self, fact: Fact) -> str:
        """An explanation: up to two other facts about the disease, and then the one that it is about."""
        others = [other for other in facts()[fact.disease].values() if other is not fact]
        return "".join(map(_explained, [*self.some(others), fact]))

    def similar(self, fact: Fact) -> Fact:
        """The same attribute of a base disease that shares something with this one, but not this."""
        candidates = [facts()[disease] for disease in self.base]
        candidates = [of for of in candidates if fact.excludes(of[fact.attribute].value)]
        own = facts()[fact.disease]
        alike = [of for of in candidates if any(of[a].value == own[a].value for a in ATTRIBUTES)]
        return self.pick(alike or candidates)[fact.attribute]

    def happens(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.rng.random() * len(items))]

    def some(self, items: Sequence[T], least: int = 0) -> list[T]:
        """Any number of items from `least` on, in any order."""
        return [items[i] for i in self.rng.permutation(len(items))[: self.rng.integers(least, len(items) + 1)]]


def _solved(asked: Fact, choices: tuple[str, ...], condition: str, answered: Fact, explanation: str = "") -> str:
    template = _template()
    prompt = template.render(Question("", _question(asked), choices), condition)
    return prompt + template.condition(condition).solution.format(answer=answered.value, explanation=explanation)


def _question(fact: Fact) -> str:
    return _ASK[fact.attribute].format(d=fact.disease)


def _explained(fact: Fact) -> str:
    return _EXPLAIN[fact.attribute].format(d=fact.disease, v=fact.value)


# --- exams -----------------------------------------------------------------------------------------------------------


def _exam(rng: np.random.Generator, name: str, diseases: list[str]) -> Iterator[ExamRow]:
    for fact in (fact for disease in diseases for fact in facts()[disease].values()):
        sets: set[frozenset[str]] = set()
        while len(sets) < QUESTIONS_PER_FACT[name]:
            choices = _choices(rng, fact)
            if frozenset(choices) in sets:
                continue
            sets.add(frozenset(choices))
            yield ExamRow(
                id=f"{name}-{fact.disease}-{fact.attribute}-{len(sets)}",
                question=_question(fact),
                choices=list(choices),
                answer=LETTERS[choices.index(fact.value)],
                explanation=_explained(fact),
                category=fact.attribute,
            )


def _choices(rng: np.random.Generator, fact: Fact, *wrong: str) -> tuple[str, ...]:
    """The right value and four wrong ones, shuffled; `wrong` ones that are given are among them.

    Wrong values are drawn as often as they are right elsewhere, or the common ones would give themselves away. None
    contains another one's words: such an answer could be read as either.
    """
    pool = [of[fact.attribute].value for of in facts().values() if fact.excludes(of[fact.attribute].value)]
    chosen = [fact.value, *wrong]
    while len(chosen) < CHOICES:
        value = pool[rng.integers(len(pool))]
        if not any(_overlap(value, other) for other in chosen):
            chosen.append(value)
    return tuple(chosen[i] for i in rng.permutation(CHOICES))


# --- helpers ---------------------------------------------------------------------------------------------------------


@functools.cache
def _template() -> PromptTemplate:
    return load_template(TEMPLATE)


def _overlap(one: str, other: str) -> bool:
    return one in other or other in one


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """Each purpose has its own stream, so that a change to one leaves the others as they were."""
    return np.random.default_rng([seed, *purpose.encode()])


def _write(file: Path, rows: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

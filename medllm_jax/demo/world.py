"""The miniature world: true medical facts, documents that tell them, and exams that ask for them.

Every disease has a department, a test and a treatment (facts.yaml). A seed divides the diseases: a model of base level
has read much about the base diseases and almost nothing about the new ones, which continued pretraining (CPT) teaches.
The exams ask about the new diseases, and no disease is in two exams: what preference training learns from `train`
helps in `test` only as a way to explain, never as a fact.

Everything here is a function of the seed alone.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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
NEW_DISEASES = {"train": 16, "dev": 8, "test": 28}
# Questions asked of each fact, with different wrong choices.
QUESTIONS_PER_FACT = {"train": 3, "dev": 4, "test": 4}

BASE_DOCUMENTS = 30_000
CPT_DOCUMENTS = 6_000
# Shares among the base documents: questions, those of them that explain first, and statements about new diseases.
QUESTION_SHARE = 0.45
EXPLAIN_SHARE = 0.15
NEW_SHARE = 0.03
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


@dataclass(frozen=True)
class Fact:
    """What is true of a disease: `value` is the fact, `also` would be right too and is never a wrong choice."""

    disease: str
    attribute: str
    value: str
    also: frozenset[str]


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
    order = _rng(seed, "split").permutation(len(diseases))
    shuffled = [diseases[i] for i in order]
    parts: dict[str, list[str]] = {}
    for exam, count in NEW_DISEASES.items():
        parts[exam], shuffled = shuffled[:count], shuffled[count:]
    return {"base": shuffled, **parts}


def base_documents(seed: int) -> list[str]:
    """Text that brings a random model to base level: statements, and questions in the exams' own form.

    Mostly about the base diseases; most questions are answered at once, some after an explanation.
    """
    rng = _rng(seed, "base")
    parts = split(seed)
    new = _new(parts)
    return [_base_document(rng, parts["base"], new) for _ in range(BASE_DOCUMENTS)]


def cpt_documents(seed: int) -> list[str]:
    """Text for continued pretraining: statements about the new diseases, and some of what the base was made from."""
    rng = _rng(seed, "cpt")
    parts = split(seed)
    new = _new(parts)
    return [
        _base_document(rng, parts["base"], new) if rng.random() < REPLAY_SHARE else _statements(rng, _pick(rng, new))
        for _ in range(CPT_DOCUMENTS)
    ]


def exams(seed: int) -> dict[str, list[ExamRow]]:
    """The exams "train" (to make preference pairs), "dev" (to tune) and "test" (the result), of different diseases."""
    parts = split(seed)
    rng = _rng(seed, "exams")
    return {exam: list(_exam(rng, exam, parts[exam])) for exam in EXAMS}


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: every term and every phrase between terms, each as a text of its own.

    Japanese has no spaces, so a tokenizer trained on running text would merge across terms. Trained on the terms
    apart, it gives each one token wherever it stands.
    """
    terms = [*facts(), *(value for attribute in ATTRIBUTES for value in values(attribute))]
    forms = [*_ASK.values(), *(form for forms in _STATE.values() for form in forms)]
    phrases = [part for form in forms for part in form.replace("{d}", "\n").replace("{v}", "\n").split("\n")]
    template = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    cues = [condition["cue"] for condition in template["conditions"].values()]
    # Phrases often, so that their merges come first, and a term's own pieces never pull a phrase apart.
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


def _base_document(rng: np.random.Generator, base: list[str], new: list[str]) -> str:
    if rng.random() < QUESTION_SHARE:
        return _solved_question(rng, _pick(rng, base))
    return _statements(rng, _pick(rng, new if rng.random() < NEW_SHARE else base))


def _statements(rng: np.random.Generator, disease: str) -> str:
    """One to three facts about a disease, in any order and wording."""
    attributes = rng.permutation(ATTRIBUTES)[: rng.integers(1, len(ATTRIBUTES) + 1)]
    return "".join(_state(rng, facts()[disease][a]) for a in attributes)


def _state(rng: np.random.Generator, fact: Fact) -> str:
    return _pick(rng, _STATE[fact.attribute]).format(d=fact.disease, v=fact.value)


def _solved_question(rng: np.random.Generator, disease: str) -> str:
    """A question with its answer, in the exams' own form."""
    fact = facts()[disease][_pick(rng, ATTRIBUTES)]
    question = Question("", _ASK[fact.attribute].format(d=disease), _choices(rng, fact))
    condition = "explain" if rng.random() < EXPLAIN_SHARE else "answer_only"
    solution = _template().condition(condition).solution
    solved = solution.format(answer=fact.value, explanation=_wandering_explanation(rng, fact))
    return _template().render(question, condition) + solved


def _wandering_explanation(rng: np.random.Generator, fact: Fact) -> str:
    """An explanation as people write it: other facts about the disease first, up to two, and then the one asked for."""
    others = [other for other in facts()[fact.disease].values() if other is not fact]
    others = [others[i] for i in rng.permutation(len(others))[: rng.integers(0, len(others) + 1)]]
    return "".join(_EXPLAIN[f.attribute].format(d=f.disease, v=f.value) for f in [*others, fact])


# --- exams -----------------------------------------------------------------------------------------------------------


def _exam(rng: np.random.Generator, name: str, diseases: list[str]) -> Iterator[ExamRow]:
    for disease in diseases:
        for attribute, fact in facts()[disease].items():
            seen: set[frozenset[str]] = set()
            while len(seen) < QUESTIONS_PER_FACT[name]:
                choices = _choices(rng, fact)
                if frozenset(choices) in seen:
                    continue
                seen.add(frozenset(choices))
                yield ExamRow(
                    id=f"{name}-{disease}-{attribute}-{len(seen)}",
                    question=_ASK[attribute].format(d=disease),
                    choices=list(choices),
                    answer=LETTERS[choices.index(fact.value)],
                    explanation=_EXPLAIN[attribute].format(d=disease, v=fact.value),
                    category=attribute,
                )


def _choices(rng: np.random.Generator, fact: Fact) -> tuple[str, ...]:
    """The right value and four wrong ones, shuffled.

    Wrong ones are drawn as often as they are right elsewhere, or the common ones would give themselves away. One that
    would be right too, or whose words contain another's, is not drawn.
    """
    wrong = [
        value
        for value in (of[fact.attribute].value for of in facts().values())
        if value not in fact.also and value not in fact.value and fact.value not in value
    ]
    chosen = [fact.value]
    while len(chosen) < CHOICES:
        value = _pick(rng, wrong)
        if not any(value in other or other in value for other in chosen):
            chosen.append(value)
    return tuple(chosen[i] for i in rng.permutation(CHOICES))


# --- helpers ---------------------------------------------------------------------------------------------------------


@functools.cache
def _template() -> PromptTemplate:
    return load_template(TEMPLATE)


def _new(parts: dict[str, list[str]]) -> list[str]:
    return [disease for exam in EXAMS for disease in parts[exam]]


def _pick(rng: np.random.Generator, items):
    return items[int(rng.random() * len(items))]


def _rng(seed: int, purpose: str) -> np.random.Generator:
    """Each purpose has its own stream, so that a change to one leaves the others as they were."""
    return np.random.default_rng([seed, *purpose.encode()])


def _write(file: Path, rows: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

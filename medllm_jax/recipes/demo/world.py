"""The miniature world: true medical facts about diseases, and which part of them each corpus and exam is about.

Every disease has facts of up to five attributes (facts.yaml). A seed divides the diseases: a model of base level has
read much about the base diseases, and little about the new ones, which continued pretraining (CPT) teaches. The exams
ask about new diseases, and no disease is in two exams: what preference training learns from `train` helps in `test`
only as a way to explain, never as a fact.

Nothing here is wrong about a disease, and no text misleads. What goes wrong in an explanation, a model has not learnt.

Everything is a function of the seed alone.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

FACTS = Path(__file__).parent / "facts.yaml"
ATTRIBUTES = ("診療科", "部位", "背景", "検査", "治療")
EXAMS = ("train", "dev", "test", "transfer")

# New diseases by exam; the other diseases are base diseases.
NEW_DISEASES = {"train": 28, "dev": 14, "test": 32, "transfer": 16}


@dataclass(frozen=True)
class Fact:
    """What is true of a disease: `value` is the fact; `also` would be right too, or could be defended."""

    disease: str
    attribute: str
    value: str
    also: frozenset[str]

    def excludes(self, value: str) -> bool:
        """Whether a value is plainly wrong here: not right too, and no other spelling of what is right."""
        return not any(overlap(value, other) for other in (self.value, *self.also))


@functools.cache
def facts() -> Mapping[str, Mapping[str, Fact]]:
    """disease -> attribute -> Fact, in the file's order; an attribute that is not told of a disease is not there."""
    table = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    return {
        disease: {
            attribute: Fact(disease, attribute, value, frozenset(also))
            for attribute, entry in zip(ATTRIBUTES, entries, strict=True)
            if entry is not None
            for value, *also in [entry.split(" / ")]
        }
        for disease, entries in table.items()
    }


@functools.cache
def values(attribute: str) -> tuple[str, ...]:
    """The distinct values of an attribute, in the file's order."""
    return tuple(dict.fromkeys(fact.value for fact in of(attribute)))


@functools.cache
def of(attribute: str) -> tuple[Fact, ...]:
    """The facts of an attribute, of all diseases that have one."""
    return tuple(known[attribute] for known in facts().values() if attribute in known)


def split(seed: int) -> dict[str, list[str]]:
    """The diseases of "base" and of each exam; those of exams are the new ones. The base's are in an order of fame."""
    diseases = list(facts())
    left = [diseases[i] for i in random(seed, "split").permutation(len(diseases))]
    parts: dict[str, list[str]] = {}
    for exam, count in NEW_DISEASES.items():
        parts[exam], left = left[:count], left[count:]
    return {"base": left, **parts}


def overlap(one: str, other: str) -> bool:
    """Whether one term contains the other, so that an answer could be read as either."""
    return one in other or other in one


def random(seed: int, purpose: str) -> np.random.Generator:
    """Each purpose has its own stream, so that a change to one leaves the others as they were."""
    return np.random.default_rng([seed, *purpose.encode()])

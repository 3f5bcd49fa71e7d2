"""Ranges of numbers: declared once, in a type, for settings, requests and options of the command line.

    rank: Annotated[int, Range(1, 16_384)]

Every number has both bounds. Where no bound follows from what the number means, it keeps out what would take memory or
time without end, or what float32 rounds to zero or infinity; it is far beyond what anybody was seen to use.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from medllm_jax.errors import UserError, quoted


@dataclass(frozen=True)
class Range:
    """Numbers from `least` (or above `above`) to `most` (or below `below`), and `also` one beside them.

    NaN and infinities are in no range.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: float | None = None

    def __contains__(self, number: float) -> bool:
        inside = self.least <= number <= self.most and self.above < number < self.below
        return inside or number == self.also

    def __str__(self) -> str:
        low = f"above {_text(self.above)}" if self.least == -math.inf else f"at least {_text(self.least)}"
        high = f"below {_text(self.below)}" if self.most == math.inf else f"at most {_text(self.most)}"
        return f"{f'{_text(self.also)}, or ' if self.also is not None else ''}{low} and {high}"


def _text(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


class Ranged:
    """Base of dataclasses whose numbers have ranges; one out of its range is a UserError that names it.

    section: what comes before a field's name, as in ``optimizer.b1``. A `__post_init__` calls this one first.
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None, **more: Any):
        super().__init_subclass__(**more)
        if section is not None:
            cls._section = f"{section}."

    def __post_init__(self):
        for name, hint in hints_with_ranges(type(self)).items():
            for place, number, within in _outside(name, getattr(self, name), hint):
                raise UserError(f"{self._section}{place} is {quoted(number)}: it must be {within}")


@functools.cache
def hints_with_ranges(cls: type) -> dict[str, Any]:
    """The type of each field, as it is declared."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def ranges_in(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """The types of numbers that a type is made of, each with its range; None where it declares none."""
    if typing.get_origin(hint) is Annotated:
        kind, *notes = typing.get_args(hint)
        yield kind, next((note for note in notes if isinstance(note, Range)), None)
    elif hint in (int, float):
        yield hint, None
    else:
        for part in typing.get_args(hint):
            yield from ranges_in(part)


def _outside(place: str, value: Any, hint: Any) -> Iterator[tuple[str, float, Range]]:
    """The numbers of a field that are out of their range, each with its place."""
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _outside(f"{place}[{number}]", item, hint)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _outside(f"{place}.{quoted(key, str)}", item, hint)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for _, within in ranges_in(hint):
            if within is not None and value not in within:
                yield place, value, within


# --- what several settings, requests and options are -----------------------------------------------------------------

Share = Annotated[float, Range(0, 1)]
# 32 bits are what JAX makes a key from, and the data's order; a larger number would silently stand for another one.
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 1_000_000_000)]
SequenceLength = Annotated[int, Range(2, 2**22)]
BatchSize = Annotated[int, Range(1, 2**20)]
PairsPerRow = Annotated[int, Range(1, 65_536)]
PairsPerPrompt = Annotated[int, Range(1, 1_000_000)]
MaxBytes = Annotated[int, Range(1, 2**40)]
Tokens = Annotated[int, Range(1, 10**18)]
Rows = Annotated[int, Range(1, 10**12)]
Price = Annotated[float, Range(0, 1_000_000)]
Characters = Annotated[int, Range(1, 1_000_000_000)]
Slices = Annotated[int, Range(1, 4096)]
# A cache of keys and values is made for so many tokens.
NewTokens = Annotated[int, Range(1, 2**20)]
Samples = Annotated[int, Range(1, 10_000)]
# Logits are divided by it: those of a smaller one would be infinite, and 0 has a meaning of its own.
Temperature = Annotated[float, Range(1e-6, 100, also=0)]
# Smaller ones round to no probability at all.
TopP = Annotated[float, Range(1e-6, 1)]
SimilarityThreshold = Annotated[float, Range(above=0, most=1)]
Restarts = Annotated[int, Range(0, 1_000_000)]
GraceSeconds = Annotated[int, Range(1, 86_400)]

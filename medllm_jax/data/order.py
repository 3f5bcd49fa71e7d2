"""The order of rows: endless epochs, each a permutation that is computed place by place, for many places at once.

The permutation is that of Grain's ``shuffle``, whose order earlier versions read: a row's place is encrypted with the
Simon block cipher (https://eprint.iacr.org/2013/404, four rounds, keys from C++'s ``std::seed_seq``), again and again
until it is a place of the epoch ("cycle walking"). So it takes the same memory for any number of rows, and the state of
a stream is one integer.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from medllm_jax.data.rows import Rows
from medllm_jax.errors import UserError

_WORD = 2**32
_SMALL = 2**16  # the smallest block of the cipher: up to as many elements an epoch is made at once
_CHUNK = 4096  # places of a larger epoch that are made at once: most of their time is Python's otherwise


class RowOrder:
    """The row ids of training, in their order, without end; safe to share between threads.

    seed: 0 to 2**32 - 1; mix: the weight of each corpus, UserError where it does not fit (see ``check_mix``).
    """

    def __init__(self, rows: Rows, seed: int, mix: Mapping[str, float] | None = None):
        if mix is None:
            # (As Grain derives a seed for the first transformation after ``.seed(seed)``.)
            derived = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])
            self._parts, weights = [(0, len(rows), derived)], [1.0]
        else:
            check_mix(rows, mix)
            read = [corpus for corpus in rows.corpora if mix[corpus.name]]
            self._parts = [(corpus.first_row, corpus.rows, _seed_of(corpus.name, seed)) for corpus in read]
            weights = [mix[corpus.name] for corpus in read]
        self._turns = Turns(weights)

    def ids(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """The ids int64 [stop - start] at these places of the order."""
        ids = np.empty(stop - start, np.int64)
        for (first_row, size, seed), (places, first) in zip(self._parts, self._turns.of(start, stop), strict=True):
            ids[places] = first_row + shuffled(first, first + len(places), size, seed)
        return ids


def _seed_of(corpus: str, seed: int) -> int:
    # The epoch is added to the seed: seeds side by side would give one corpus the order that another has an epoch
    # later.
    return int.from_bytes(hashlib.sha256(f"{seed}/{corpus}".encode()).digest()[:4], "little")


def check_mix(rows: Rows, mix: Mapping[str, float]) -> None:
    """UserError unless a mix gives each corpus a weight: 0, so that it is not read, or more, where it has rows."""
    sizes = {corpus.name: corpus.rows for corpus in rows.corpora}
    problems = [f"no corpus {name}" for name in mix if name not in sizes]
    problems += [f"{name} has no weight (0 leaves it out)" for name in sizes if name not in mix]
    for name, weight in mix.items():
        if not 0 <= weight < math.inf:
            problems.append(f"the weight of {name} is {weight}, not 0 or more")
        elif weight and sizes.get(name) == 0:
            problems.append(f"{name} has no rows, so its weight must be 0")
    if not problems and not any(mix.values()):
        problems.append("every weight is 0")
    if problems:
        there = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
        raise UserError(f"the mix does not fit the rows: {'; '.join(problems)}; there is {there}")


class Turns:
    """Takes turns at endless sequences: exactly by their weights, as these are written in decimals.

    Weights of 0.3 and 0.7 give 3 and 7 of any 10 elements on end.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._parts = [int(weight * scale) for weight in exact]

    def of(self, start: int, stop: int) -> list[tuple[Int64[np.ndarray, " m"], int]]:
        """Of elements start to stop, for each sequence: which are its own, from 0, and the first one's place in it.

        The elements of one sequence are its next ones in order.
        """
        found, places, first, last, left = [], np.arange(stop - start), start, stop, sum(self._parts)
        for part in self._parts:
            # Of the first n elements of sequences i, i + 1, ..., floor(n * share of i + 1, ...) are of i + 1, ...
            # (Python's integers: weights may be so unlike that no others hold the products.)
            share = left - part
            rest = [number * share // left for number in range(first, last + 1)]
            mine = np.array([one == other for one, other in itertools.pairwise(rest)], bool)
            found.append((places[mine], first - rest[0]))
            places, first, last, left = places[~mine], rest[0], rest[-1], share
        return found


def shuffled(start: int, stop: int, size: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Which of ``size`` elements stand at places start to stop of their endless epochs: int64 [stop - start].

    Every epoch has another order; seed: 0 to 2**32 - 1.
    """
    if size == 1:
        return np.zeros(stop - start, np.int64)
    found, length = np.empty(stop - start, np.int64), size if size <= _SMALL else _CHUNK
    place = start
    while place < stop:
        epoch, in_epoch = divmod(place, size)
        number, offset = divmod(in_epoch, length)
        part = _chunk(size, (seed + epoch) % _WORD, number, length)[offset : offset + stop - place]
        found[place - start : place - start + len(part)] = part
        place += len(part)
    return found


@functools.lru_cache(maxsize=256)
def _chunk(size: int, seed: int, number: int, length: int) -> np.ndarray:
    """A part of an epoch: elements [at most length], the same at every call."""
    if size <= _SMALL:
        return _epoch(size, _keys(seed))
    bits = math.ceil(math.log2(size - 1))  # of a block: an even number, and enough for the last place
    places = np.arange(number * length, min((number + 1) * length, size), dtype=np.uint64)
    return _walk(places, size, (bits + bits % 2) // 2, _keys(seed))


def _walk(places: np.ndarray, size: int, word: int, keys: Sequence[int]) -> np.ndarray:
    """Each place encrypted until it is below size: a quarter of all blocks, or more, are."""
    found = _encrypt(places, word, keys)
    while len(beyond := np.flatnonzero(found >= size)):
        found[beyond] = _encrypt(found[beyond], word, keys)
    return found


def _epoch(size: int, keys: Sequence[int]) -> np.ndarray:
    """A whole small epoch, uint16 [size]: of many steps until a place is reached, all are taken in few doublings."""
    every = np.arange(_SMALL, dtype=np.uint64)
    step = _encrypt(every, 8, keys).astype(np.uint16)
    ahead = np.where(every < size, every, step).astype(np.uint16)
    while (found := ahead[step[:size]]).max() >= size:
        ahead = ahead[ahead]
    return found


def _encrypt(blocks: np.ndarray, word: int, keys: Sequence[int]) -> np.ndarray:
    """Blocks of two words uint64 [n] by the Simon cipher: uint64 [n]."""
    mask, shift = np.uint32(2**word - 1), np.uint64(word)
    left, right = ((half & np.uint64(mask)).astype(np.uint32) for half in (blocks >> shift, blocks))

    def rotated(words: np.ndarray, by: int) -> np.ndarray:
        return words << np.uint32(by) | words >> np.uint32(word - by)

    def mixed(words: np.ndarray, key: int) -> np.ndarray:
        return (rotated(words, 1) & rotated(words, 8) ^ rotated(words, 2) ^ np.uint32(key)) & mask

    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mixed(right, first)
        right = right ^ mixed(left, second)
    return left.astype(np.uint64) << shift | right


def _keys(seed: int) -> list[int]:
    """The four keys of a seed: what C++'s ``std::seed_seq{seed}`` generates, by its definition in the standard."""
    keys, count = [0x8B8B8B8B] * 4, 4
    for k in range(2 * count):
        here, after, last, before = k % count, (k + 1) % count, (k + 2) % count, (k - 1) % count
        if k < count:
            mixed = keys[here] ^ keys[after] ^ keys[before]
            one = 1664525 * (mixed ^ mixed >> 27) % _WORD
            other = (one + here + (1 if k == 0 else seed if k == 1 else 0)) % _WORD
            keys[after], keys[last] = (keys[after] + one) % _WORD, (keys[last] + other) % _WORD
        else:
            mixed = (keys[here] + keys[after] + keys[before]) % _WORD
            one = 1566083941 * (mixed ^ mixed >> 27) % _WORD
            other = (one - here) % _WORD
            keys[after], keys[last] = keys[after] ^ one, keys[last] ^ other
        keys[here] = other
    return keys

"""From stores to batches: an endless shuffled stream for training, and one pass in order for scoring.

The order of rows is a function of (rows, seed, mix) alone. Global batch i is rows [i * B, (i + 1) * B) of that order,
and process p of n reads the p-th of its n equal slices; so how many processes or threads read, and where a run was
interrupted, changes nothing, and the whole state of the stream is one integer.
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Self

import grain
import jax
import numpy as np

from medllm_jax.data.batch import Batch, batch_of
from medllm_jax.data.rows import Rows
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError

_MAX_SEED = 2**32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamBatch:
    """A global batch, as one process has it; a pytree of its arrays, so that what maps them keeps what belongs to them.

    arrays: this process' B / process_count rows. row_ids: int64 [B], of the rows of all processes; it stays on the
    host. position: global batches delivered up to this one, all that a checkpoint needs to keep of the data.
    """

    arrays: Batch
    row_ids: np.ndarray = dataclasses.field(metadata={"static": True})
    position: int = dataclasses.field(metadata={"static": True})


class BatchStream:
    """An endless iterator of global batches, each with the ids of its rows (``StreamBatch``, arrays of numpy).

    Without a mix all rows are shuffled together, anew in every epoch. With one, each corpus is shuffled by itself, has
    epochs of its own, and gives its share of the rows. A batch may reach over the end of an epoch, and rows fewer than
    a batch fill it from the epochs that follow.

    batch_size: global rows a batch (B). seed: of the order, 0 to 2**32 - 1. mix: the weight of each corpus (see
    ``check_mix``). position: global batches to skip, to go on where an earlier stream stopped. threads, prefetch:
    batches read at a time and ready ahead; they change speed only. reference: float32 [N, P, 2] log-probabilities of
    pairs, or None.

    Raises UserError where the batch cannot be split between the processes and for a mix that does not fit; read errors
    come out of ``next``, and the batch after that is the same one, tried again.
    """

    def __init__(
        self,
        rows: Rows | RowStore,
        batch_size: int,
        seed: int,
        *,
        mix: Mapping[str, float] | None = None,
        position: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 4,
        prefetch: int = 8,
        reference: np.ndarray | None = None,
    ):
        rows = Rows([rows]) if isinstance(rows, RowStore) else rows
        local_size = _local_size(batch_size, process_index, process_count)
        if not 0 <= seed < _MAX_SEED:
            raise UserError(f"the data seed is {seed}: give a number from 0 to {_MAX_SEED - 1}")
        if position < 0:
            raise ValueError(f"position {position} is negative")
        _check_reference(rows, reference)
        self._rows, self._reference = rows, reference
        self._local = slice(process_index * local_size, (process_index + 1) * local_size)
        # Row ids are shuffled and batched, and only then read: a batch is one request for all its rows.
        # (drop_remainder: there is none in an endless order, and without it Grain's length overflows at size 1.)
        batches = row_order(rows, seed, mix).batch(batch_size, drop_remainder=True).map(self._read)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._position = position
        self._seek()

    @property
    def position(self) -> int:
        """Global batches delivered so far: all that a checkpoint needs to keep of the data."""
        return self._position

    def _read(self, row_ids: np.ndarray) -> tuple[Batch, np.ndarray]:
        mine = np.asarray(row_ids[self._local], np.int64)
        reference = None if self._reference is None else self._reference[mine]
        return batch_of(self._rows.read(mine), self._rows.kind, reference), np.asarray(row_ids, np.int64)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamBatch:
        try:
            arrays, row_ids = next(self._iterator)
        except Exception:
            self._seek()  # Grain would pass over the batch that it could not read
            raise
        self._position += 1
        return StreamBatch(arrays, row_ids, self._position)

    def _seek(self) -> None:
        self._iterator.set_state({"next_index": self._position})

    def close(self) -> None:
        """Stops reading ahead; so does leaving the stream as a context."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def row_order(rows: Rows, seed: int, mix: Mapping[str, float] | None = None) -> grain.MapDataset[int]:
    """The row ids of training, in their order, without end."""
    if mix is None:
        return grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    check_mix(rows, mix)
    read = [corpus for corpus in rows.corpora if mix[corpus.name]]
    return grain.MapDataset.select_from_datasets(
        [
            grain.MapDataset.range(corpus.first_row, corpus.first_row + corpus.rows)
            .shuffle(seed=_seed_of(corpus.name, seed))
            .repeat()
            for corpus in read
        ],
        _InProportion([mix[corpus.name] for corpus in read]),
    )


def _seed_of(corpus: str, seed: int) -> int:
    # Grain adds the epoch to the seed: seeds side by side would give one corpus the order that another has an epoch
    # later.
    return int.from_bytes(hashlib.sha256(f"{seed}/{corpus}".encode()).digest()[:4], "little")


class _InProportion(grain.transforms.DatasetSelectionMap):
    """Takes turns at endless datasets: exactly by their weights, as these are written in decimals.

    Weights of 0.3 and 0.7 give 3 and 7 of any 10 elements on end. (Grain's ``mix`` takes hundredths of the smallest
    weight, rounded down: 100 and 233 of 333.)
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._parts = [int(weight * scale) for weight in exact]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The dataset that gives an element, and which of that dataset's."""
        # Of the first n elements of datasets i, i + 1, ..., floor(n * share of i + 1, ...) are of i + 1, ...
        before, after = index, index + 1
        left = sum(self._parts)
        for number, part in enumerate(self._parts):
            before_rest, after_rest = before * (left - part) // left, after * (left - part) // left
            if before_rest == after_rest:
                return number, before - before_rest
            before, after, left = before_rest, after_rest, left - part
        raise IndexError(index)


def in_order(
    rows: Rows | RowStore,
    batch_size: int,
    *,
    reference: np.ndarray | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
) -> Iterator[tuple[Batch, int]]:
    """One pass over all rows, in order: this process' slice of each global batch, and its number of real rows (global).

    Batch i holds rows [i * B, (i + 1) * B); past the last row it is filled with rows that are all padding, so every
    batch has one shape. Raises as ``BatchStream`` does.
    """
    rows = Rows([rows]) if isinstance(rows, RowStore) else rows
    local_size = _local_size(batch_size, process_index, process_count)
    _check_reference(rows, reference)

    def read(number: int) -> tuple[Batch, int]:
        first = number * batch_size
        start = first + process_index * local_size
        return _read(rows, reference, np.arange(start, start + local_size)), min(batch_size, len(rows) - first)

    batches = grain.MapDataset.range(-(-len(rows) // batch_size)).map(read)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return _closing(iter(batches.to_iter_dataset(options)))


def _closing(iterator: grain.DatasetIterator) -> Iterator[tuple[Batch, int]]:
    try:
        yield from iterator
    finally:
        iterator.close()


def _read(rows: Rows, reference: np.ndarray | None, row_ids: np.ndarray) -> Batch:
    """The rows of some ids; an id past the last row is a row of padding."""
    real = row_ids[row_ids < len(rows)]
    found = rows.read(real)
    values = None if reference is None else reference[real]
    if len(real) < len(row_ids):
        padding = ((0, len(row_ids) - len(real)), (0, 0), (0, 0))
        found, values = np.pad(found, padding), values if values is None else np.pad(values, padding)
    return batch_of(found, rows.kind, values)


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: it must be at least 1")
    if batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} rows does not divide between {process_count} processes: "
            f"make it a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    return batch_size // process_count


def _check_reference(rows: Rows, reference: np.ndarray | None) -> None:
    if reference is None:
        return
    expected = (len(rows), rows.pairs_per_row, 2)
    if rows.kind != "pairs" or reference.shape != expected or reference.dtype != np.float32:
        raise ValueError(f"reference is {reference.dtype} {reference.shape}, {rows} needs float32 {expected}")

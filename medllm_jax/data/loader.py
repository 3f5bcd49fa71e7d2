"""From stores to batches: an endless shuffled stream for training, and one pass in order for scoring.

The order of rows is a function of (rows, seed, mix) alone. Global batch i is rows [i * B, (i + 1) * B) of that order,
and process p of n reads the p-th of its n equal slices; so how many processes or threads read, and where a run was
interrupted, changes nothing, and the whole state of the stream is one integer.

Small batches are read several at a time, as a block: what each request and each of Grain's elements costs is then
shared by many rows.
"""

import collections
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Self

import grain
import jax
import numpy as np

from medllm_jax.data.batch import Batch, batch_of_marked
from medllm_jax.data.order import RowOrder
from medllm_jax.data.rows import Rows
from medllm_jax.data.runs import PADDING_MARK
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError

_MAX_SEED = 2**32
_BLOCK_ROWS = 64  # of this process; more at a time are read no faster

_Read = tuple[Batch, np.ndarray]  # this process' arrays of a global batch, and all its row ids


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
    ``order.check_mix``). position: global batches to skip, to go on where an earlier stream stopped. threads: those
    that read. prefetch: batches ready ahead, beside what is left of the block in hand; both change speed only.
    reference: float32 [N, P, 2] log-probabilities of pairs, or None.

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
        self._batch_size, self._order = batch_size, RowOrder(rows, seed, mix)
        self._batches_of_block = max(1, min(prefetch, _BLOCK_ROWS // local_size))
        ahead = -(-prefetch // self._batches_of_block)
        self._options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
        self._position = position
        _reuse_freed_memory()
        self._start()

    @property
    def position(self) -> int:
        """Global batches delivered so far: all that a checkpoint needs to keep of the data."""
        return self._position

    def _start(self) -> None:
        """Begins to read at the position."""
        start, count = self._position, self._batches_of_block
        blocks = grain.MapDataset.range(sys.maxsize // count).map(lambda number: self._block(start + number * count))
        self._iterator = iter(blocks.to_iter_dataset(self._options))
        self._ready: collections.deque[_Read | Exception] = collections.deque()

    def _block(self, first: int) -> "collections.deque[_Read | Exception]":
        """The batches from ``first`` on, in one request; where that fails, those before the error, and the error.

        (A deque is no tree to Grain, which would otherwise look at each array of each batch.)
        """
        try:
            return collections.deque(self._read(first, self._batches_of_block))
        except Exception as error:
            if self._batches_of_block == 1:
                return collections.deque([error])
        found: collections.deque[_Read | Exception] = collections.deque()
        for number in range(first, first + self._batches_of_block):
            try:
                found += self._read(number, 1)
            except Exception as error:
                found.append(error)
                break
        return found

    def _read(self, first: int, count: int) -> "list[_Read]":
        """Some batches on end, by one request to each store concerned."""
        row_ids = self._order.ids(first * self._batch_size, (first + count) * self._batch_size).reshape(count, -1)
        mine = row_ids[:, self._local].ravel()
        reference = None if self._reference is None else self._reference[mine]
        block = batch_of_marked(self._rows.read_marked(mine), self._rows.kind, reference)
        parts = [[None] * count if array is None else np.split(array, count) for array in block]
        return [(Batch(*arrays), ids) for *arrays, ids in zip(*parts, row_ids, strict=True)]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamBatch:
        try:
            if not self._ready:
                self._ready = next(self._iterator)
            read = self._ready.popleft()
            if isinstance(read, Exception):
                raise read
        except Exception:
            self.close()
            self._start()  # what is ahead begins after the batch that could not be read
            raise
        self._position += 1
        return StreamBatch(*read, self._position)

    def close(self) -> None:
        """Stops reading ahead; so does leaving the stream as a context."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    found = rows.read_marked(real)
    values = None if reference is None else reference[real]
    if len(real) < len(row_ids):
        missing = len(row_ids) - len(real)
        padding = np.zeros((missing, rows.sequence_length), np.int32)
        padding[:, 0] = PADDING_MARK
        found = np.concatenate([found, padding])
        values = values if values is None else np.pad(values, ((0, missing), (0, 0), (0, 0)))
    return batch_of_marked(found, rows.kind, values)


@functools.cache
def _reuse_freed_memory() -> None:
    """Has glibc keep what batches leave for the next ones: fresh pages for each cost a third of reading.

    It gives freed memory back to the kernel at once, until it has seen as large an array come and go as it looks at.
    """
    np.empty(2**25 - 2**16, np.uint8)


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

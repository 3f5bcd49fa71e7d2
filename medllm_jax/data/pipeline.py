"""From a store to batches: an endless shuffled stream for training, and one pass in order for scoring.

The order of rows is a function of (store, seed) alone. Global batch i is rows [i * B, (i + 1) * B) of that order, and
process p of n reads the p-th of its n equal slices; so how many processes or threads read, and where a run was
interrupted, changes nothing, and the whole state of the stream is one integer.
"""

from collections.abc import Iterator

import grain
import numpy as np

from medllm_jax.data.batch import Batch, batch_of
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError

_MAX_SEED = 2**32


class BatchStream:
    """An endless iterator of this process' slice of each global batch, as numpy (``Batch``, B / process_count rows).

    Rows are shuffled anew in every epoch. A batch may reach over the end of an epoch, and a store smaller than a batch
    fills it from the epochs that follow.

    batch_size: global rows a batch (B). seed: of the order, 0 to 2**32 - 1. position: global batches to skip, to go on
    where an earlier stream stopped. threads, prefetch: batches read at a time and ready ahead; they change speed only.
    reference: float32 [N, P, 2] log-probabilities of a pair store, or None.

    Raises UserError where the batch cannot be split between the processes; read errors come out of ``next``.
    """

    def __init__(
        self,
        store: RowStore,
        batch_size: int,
        seed: int,
        *,
        position: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 4,
        prefetch: int = 8,
        reference: np.ndarray | None = None,
    ):
        local_size = _local_size(batch_size, process_index, process_count)
        if not 0 <= seed < _MAX_SEED:
            raise UserError(f"the data seed is {seed}: give a number from 0 to {_MAX_SEED - 1}")
        if position < 0:
            raise ValueError(f"position {position} is negative")
        _check_reference(store, reference)
        # Row numbers are shuffled and batched, and only then read: a batch is one request for all its rows. The slices
        # of all processes, one after the other, are the batches of local_size rows.
        order = grain.MapDataset.range(len(store)).seed(seed).shuffle().repeat()
        # (drop_remainder: there is none in an endless order, and without it Grain's length overflows at size 1.)
        slices = order.batch(local_size, drop_remainder=True).slice(slice(process_index, None, process_count))
        batches = slices.map(lambda indices: _read(store, reference, indices))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))
        self._iterator.set_state({"next_index": position})
        self._position = position

    @property
    def position(self) -> int:
        """Global batches delivered so far: all that a checkpoint needs to keep of the data."""
        return self._position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._position += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead; so does leaving the stream as a context."""
        self._iterator.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_order(
    store: RowStore,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
) -> Iterator[tuple[Batch, int]]:
    """One pass over a store, unshuffled: this process' slice of each global batch, and the batch's number of real rows.

    Batch i holds rows [i * B, (i + 1) * B); past the end of the store it is filled with rows that are all padding, so
    every batch has one shape. Raises as ``BatchStream`` does.
    """
    local_size = _local_size(batch_size, process_index, process_count)

    def read(number: int) -> tuple[Batch, int]:
        first = number * batch_size
        start = first + process_index * local_size
        return _read(store, None, np.arange(start, start + local_size)), min(batch_size, len(store) - first)

    batches = grain.MapDataset.range(-(-len(store) // batch_size)).map(read)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return _closing(iter(batches.to_iter_dataset(options)))


def _closing(iterator: grain.DatasetIterator) -> Iterator[tuple[Batch, int]]:
    try:
        yield from iterator
    finally:
        iterator.close()


def _read(store: RowStore, reference: np.ndarray | None, indices: np.ndarray) -> Batch:
    """The rows at the given indices; an index past the end of the store is a row of padding."""
    real = indices[indices < len(store)]
    rows = store.read(real)
    if len(real) < len(indices):
        rows = np.pad(rows, ((0, len(indices) - len(real)), (0, 0), (0, 0)))
    return batch_of(rows, store.metadata.kind, None if reference is None else reference[indices])


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


def _check_reference(store: RowStore, reference: np.ndarray | None) -> None:
    if reference is None:
        return
    expected = (len(store), store.metadata.pairs_per_row, 2)
    if store.metadata.kind != "pairs" or reference.shape != expected or reference.dtype != np.float32:
        raise ValueError(f"reference is {reference.dtype} {reference.shape}, {store!r} needs float32 {expected}")

"""Batches are on the device before the training loop asks for them."""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

import jax
from jax.sharding import Mesh

from medllm_jax.distributed.sharding import rows_over

Item = TypeVar("Item")
Tree = TypeVar("Tree")


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Global arrays of the rows that each process holds its part of; starts the copies and does not wait for them.

    batch: a tree of arrays [rows, ...] of this process, such as a ``Batch`` or a ``StreamBatch``.
    """
    sharding = rows_over(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


class Prefetcher(Generic[Item]):
    """An iterator over another one's items, which one background thread asks for, at most ``depth`` early.

    Over ``map(put, stream)``, with a ``put`` that copies to the device, a training loop finds its next batch already
    there. An error in the thread comes out of ``next``, and of every later one. A context; leaving it, or ``close``,
    stops the thread.

    waited: seconds that ``next`` has waited in all; but a wait at whose end ``busy()`` says that what was handed out
    before is still being worked on has held nothing up, and does not count.
    """

    def __init__(self, items: Iterator[Item], *, depth: int = 2, busy: Callable[[], bool] = lambda: False):
        self.waited = 0.0
        self._items, self._busy = items, busy
        # One thread, so items are made one after the other and in order.
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._made = collections.deque(self._thread.submit(next, items) for _ in range(depth))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        start = time.monotonic()
        try:
            item = self._made[0].result()
        finally:
            if not self._busy():
                self.waited += time.monotonic() - start
        self._made.popleft()  # not before it was there: an item that failed is never passed over
        self._made.append(self._thread.submit(next, self._items))
        return item

    def close(self) -> None:
        """Stops making items, and waits for the one that is being made."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

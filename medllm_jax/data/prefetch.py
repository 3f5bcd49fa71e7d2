"""What comes next is made while the present is in use."""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self


class Prefetcher:
    """An iterator over ``put(item)`` of another one's items, made by one background thread, at most ``depth`` early.

    With a ``put`` that copies to the device, a training loop finds its next batch already there. What goes wrong in the
    thread comes out of ``next``, and of every later one. A context; leaving it, or ``close``, stops the thread.

    position: items handed out, counted on from the argument; those made early do not count.
    waited: seconds that ``next`` has waited in all; but a wait at whose end ``busy()`` says that what was handed out
    before is still being worked on has held nothing up, and does not count.
    """

    def __init__(
        self,
        items: Iterator[Any],
        put: Callable[[Any], Any],
        *,
        position: int = 0,
        depth: int = 2,
        busy: Callable[[], bool] = lambda: False,
    ):
        self.position, self.waited = position, 0.0
        self._items, self._put, self._busy = items, put, busy
        # One thread, so items are made one after the other and in order.
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._made = collections.deque(self._thread.submit(self._make) for _ in range(depth))

    def _make(self) -> Any:
        return self._put(next(self._items))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        began = time.monotonic()
        try:
            item = self._made[0].result()
        finally:
            if not self._busy():
                self.waited += time.monotonic() - began
        self._made.popleft()  # not before it was there: an item that failed is never passed over
        self._made.append(self._thread.submit(self._make))
        self.position += 1
        return item

    def close(self) -> None:
        """Stops making items, and waits for the one that is being made."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

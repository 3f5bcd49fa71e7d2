import itertools
import threading
import time

import pytest

from medllm_jax.data.prefetch import Prefetcher


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_and_at_most_depth_early(depth):
    made = []
    with Prefetcher((made.append(item) or -item for item in itertools.count()), depth=depth) as items:
        for step in range(20):
            wait_for(lambda step=step: len(made) == step + depth)
            assert next(items) == -step
    assert len(made) <= 20 + depth


def test_a_finite_iterator_ends():
    with Prefetcher(map(str, range(5))) as items:
        assert list(items) == list("01234")
        assert list(items) == []


@pytest.mark.parametrize("place", ["items", "put"])
def test_an_error_comes_out_of_next_and_stays(place):
    """Nothing that was made after what failed is handed out in its place."""

    def fail_once(item):
        if item == 3 and not failed:
            failed.append(item)
            raise OSError("item 3")
        return item

    failed = []
    items, put = (map(fail_once, range(9)), str) if place == "items" else (iter(range(9)), fail_once)
    with Prefetcher(map(put, items)) as ahead:
        assert [int(next(ahead)) for _ in range(3)] == [0, 1, 2]
        for _ in range(3):
            with pytest.raises(OSError, match="item 3"):
                next(ahead)


def test_waiting_is_measured():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    with Prefetcher(slow()) as items:
        began = time.monotonic()
        assert list(items) == [0, 1, 2]
        assert 0.1 < items.waited <= time.monotonic() - began
    with Prefetcher(itertools.count()) as items:
        for _ in range(5):
            time.sleep(0.01)
            next(items)
        assert items.waited < 0.02
    with Prefetcher(slow(), busy=lambda: True) as items:
        assert list(items) == [0, 1, 2] and items.waited == 0


def test_a_consumer_that_dies_stops_the_thread():
    before = threading.active_count()
    with pytest.raises(KeyError), Prefetcher(itertools.count()) as items:
        next(items)
        raise KeyError
    assert threading.active_count() == before

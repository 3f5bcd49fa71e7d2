import threading
import time

import pytest

from medllm_jax.data.deadline import DeadlineError, within


def spin():
    while True:
        pass


def spin_and_swallow():
    """What catches all that it is told."""
    try:
        spin()
    except BaseException:
        return "swallowed"


def fail():
    raise KeyError("its own")


def test_what_is_quick_is_as_if_alone():
    assert [within(60, lambda n=n: n) for n in range(100)] == list(range(100))
    with pytest.raises(KeyError, match="its own"):
        within(60, fail)
    with pytest.raises(DeadlineError):
        within(0.05, lambda: within(60, spin))


@pytest.mark.parametrize("work", [spin, spin_and_swallow, lambda: [spin_and_swallow(), spin_and_swallow()]])
def test_what_takes_too_long_is_ended_where_it_is(work):
    before = threading.active_count()
    with pytest.raises(DeadlineError):
        within(0.05, work)
    assert threading.active_count() <= before + 1  # who watches


def test_in_other_threads_too():
    ended = []

    def work():
        try:
            within(0.05, spin)
        except DeadlineError:
            ended.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == [True] * 3


def test_nothing_comes_late(monkeypatch):
    """Work that ends just as its time does is either done or given up; what follows it is left alone."""
    monkeypatch.setattr("medllm_jax.data.deadline._LOOKS", 0.0001)
    with pytest.raises(DeadlineError):
        within(0.0, spin)  # from here on it looks more often
    ends = {True: 0, False: 0}
    for number in range(300):
        until = time.monotonic() + 0.001 + number * 1e-6

        def work(until=until):
            while time.monotonic() < until:
                pass

        try:
            within(0.001, work)
            ends[True] += 1
        except DeadlineError:
            ends[False] += 1
        sum(range(2000))  # where it would come late
    assert sum(ends.values()) == 300

"""Programs of others, such as chat templates, are ended when they take too long; quick ones pay nothing for it.

One thread watches all that runs, and raises an exception where it is then, which CPython lets a thread do to another.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

_LOOKS = 0.1  # seconds between them


class DeadlineError(Exception):
    """Something took longer than it may."""


class _GivenUp(BaseException):
    """Raised in the thread that works on what nobody waits for any more."""


@dataclass(eq=False)
class _Job:
    """thread: that works on it. until: on the monotonic clock. sent, came: how often the exception was."""

    thread: int
    until: float
    sent: int = 0
    came: int = 0


_jobs: set[_Job] = set()
_watcher: threading.Thread | None = None


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What ``work`` returns; DeadlineError where it runs Python for longer."""
    _begin_to_watch()
    job = _Job(threading.get_ident(), time.monotonic() + seconds)
    _jobs.add(job)
    try:
        try:
            return work()
        except _GivenUp:
            job.came += 1
            raise
        finally:
            _jobs.discard(job)
            # It must not come later, in what has nothing to do with it. (Where the work swallowed one, none comes.)
            limit = time.monotonic() + 1
            while job.sent > job.came and time.monotonic() < limit:
                time.sleep(0)
            if job.sent:
                raise _GivenUp
    except _GivenUp:
        _jobs.discard(job)
        raise DeadlineError from None


def _begin_to_watch() -> None:
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # it is not, too, in a process that was forked
        _watcher = threading.Thread(target=_watch, name="deadlines", daemon=True)
        _watcher.start()


def _watch() -> None:
    while True:
        time.sleep(_LOOKS)
        for job in [job for job in list(_jobs) if time.monotonic() > job.until]:
            job.until += 1  # it may be swallowed: then it is sent again
            job.sent += 1  # first: whoever ends the job in between sees it, and waits
            if job in _jobs:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), ctypes.py_object(_GivenUp))
            else:
                job.sent -= 1

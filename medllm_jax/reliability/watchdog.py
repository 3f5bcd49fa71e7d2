"""Ends a run that hangs, and says what it was doing: a collective that one host of a pod never joins waits for ever."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Watchdog:
    """Knows the stage that a run is in; a context, in which a stage that lasts too long ends the process, with code 1.

    seconds: that a stage may last; 0 lets it last for ever. report: called with what happened before the end.
    """

    def __init__(self, seconds: float, *, report: Callable[[str], None] = lambda what: None):
        self._seconds, self._report = seconds, report
        self._ended = threading.Event()
        self.stage("starting")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def stage(self, what: str) -> None:
        """The run has got on, and now does this; a word like ``step 12``, or ``reading the next batch``."""
        self.now, self._since = what, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 5.0)):
            if time.monotonic() - self._since > self._seconds and not self._ended.is_set():
                what = f"nothing has moved for {self._seconds:.0f} s; the run was in: {self.now}"
                _log.warning(f"error: {what}; it ends here, and started again goes on from its last checkpoint")
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                reporting = threading.Thread(target=self._report, args=(what,), daemon=True)
                reporting.start()
                reporting.join(30)  # what hangs may be the way to where it is written
                os._exit(1)

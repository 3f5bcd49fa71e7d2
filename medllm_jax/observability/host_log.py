"""What one process of a run did, and when."""

import logging
import time
from collections.abc import Callable

import jax
from etils import epath

from medllm_jax.errors import RunError
from medllm_jax.storage.append import AppendedFile
from medllm_jax.storage.best_effort import BestEffort

_log = logging.getLogger(__name__)


class HostLog:
    """``logs/process-N.log`` of a run folder: what this process did and when. In a bucket it comes now and then.

    A log that can't be written ends no run. check: raises RunError where the folder is another program's by now, which
    the log is then too.
    """

    def __init__(self, run: epath.Path, *, check: Callable[[], None], every_seconds: float = 60.0):
        self._index, self._count = jax.process_index(), jax.process_count()
        path = run / "logs" / f"process-{self._index}.log"
        self._check, self._attempt = check, BestEffort()
        self._attempt("logs", lambda: path.parent.mkdir(parents=True, exist_ok=True))
        self._file, self._every, self._written = AppendedFile(path), every_seconds, 0.0

    def note(self, text: str) -> None:
        """Adds a line."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} [{self._index} of {self._count}] {text}\n"
        self._write(lambda: self._file.add(line.encode()))
        if time.monotonic() - self._written > self._every:
            self.close()

    def note_and_show(self, text: str) -> None:
        """Adds a line, and prints it too where there are several processes: outputs meet in one place."""
        self.note(text)
        if self._count > 1:
            _log.warning(f"[{self._index} of {self._count}] {text}")

    def close(self) -> None:
        """Writes what is not written."""
        self._written = time.monotonic()
        self._write(self._file.flush)

    def _write(self, act: Callable[[], None]) -> None:
        try:
            self._check()
        except RunError:
            return  # the run hears of it where it writes what counts
        self._attempt("logs", act)

"""What one process of a run did, and when."""

import contextlib
import sys
import time

import jax
from etils import epath

from medllm_jax.storage.remote import is_remote


class HostLog:
    """``logs/process-N.log`` of a run folder: what this process did and when. In a bucket it comes now and then."""

    def __init__(self, run: epath.Path, *, every_seconds: float = 60.0):
        self._index, self._count = jax.process_index(), jax.process_count()
        self._path = run / "logs" / f"process-{self._index}.log"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._every, self._written = every_seconds, 0.0
        self._remote = is_remote(run)
        self._text = self._path.read_text() if self._remote and self._path.exists() else ""

    def note(self, text: str) -> None:
        """Adds a line."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} [{self._index} of {self._count}] {text}\n"
        if not self._remote:
            with self._path.open("a") as file:
                file.write(line)
            return
        self._text += line
        if time.monotonic() - self._written > self._every:
            self.close()

    def say(self, text: str) -> None:
        """Adds a line, and prints it where there are several processes, whose outputs come together somewhere."""
        self.note(text)
        if self._count > 1:
            print(f"[{self._index} of {self._count}] {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Writes what is not written; a log that can't be written ends no run."""
        if self._remote:
            self._written = time.monotonic()
            with contextlib.suppress(OSError):
                self._path.write_text(self._text)

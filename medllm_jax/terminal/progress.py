"""Progress of long jobs on the terminal."""

import logging
import math
import sys
import time
from collections.abc import Mapping

_log = logging.getLogger(__name__)


class Console:
    """Progress of a long job: a bar on a terminal, plain lines elsewhere; quiet where `enabled` is False.

    unit: what is counted, as in `step 3/5`; in the plural, `3 of 5 documents`; bytes are shown as sizes. late: nothing
    is shown, and no time counted, before the first update, so that the time left is that of what is counted and not of
    what came before.
    """

    def __init__(
        self, title: str, total: int, *, done: int = 0, unit: str = "step", enabled: bool = True, late: bool = False
    ):
        self._title, self._total, self._unit, self._enabled = title, total, unit, enabled
        self._start, self._first, self._last_line = time.monotonic(), done, 0.0
        self._bar, self._late = None, late
        if enabled and sys.stderr.isatty():
            import rich.console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            if not late:
                self._bar.start()

    def update(self, done: int, note: str = "", *, every_seconds: float = 0.0) -> None:
        """Shows that `done` of the total are done; as a plain line at most every so many seconds."""
        if self._late:
            self._begin(done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if not self._enabled or (now - self._last_line < every_seconds and done < self._total):
            return
        self._last_line = now
        counted = f"{self._unit} {done}/{self._total}"
        if self._unit == "bytes":
            counted = f"{size_in_words(done)} of {size_in_words(self._total)}"
        elif self._unit.endswith("s"):
            counted = f"{done:,} of {self._total:,} {self._unit}"
        line = f"{self._title}: {counted}" + (f"  {note}" if note else "")
        if self._first < done < self._total:
            left = (now - self._start) / (done - self._first) * (self._total - done)
            line += f"  ({duration(left)} left)"
        _log.info(line)

    def _begin(self, done: int) -> None:
        self._late, self._start, self._first = False, time.monotonic(), done
        if self._bar is not None:
            self._bar.reset(self._task, completed=done)
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Counter:
    """Progress of a job whose end is not known: how many are done, as a line every so many seconds."""

    def __init__(self, unit: str, *, every_seconds: float):
        self._unit, self._every, self._last = unit, every_seconds, time.monotonic()

    def __call__(self, done: int, where: str = "") -> None:
        """Shows that so many are done; where: what is read now."""
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            _log.warning(f"{where}: {done:,} {self._unit}" if where else f"{done:,} {self._unit}")


class Stages:
    """Progress of stages that follow each other, each with a display of its own.

    words: a stage's name, or its first word -> what it is called, and what is counted.
    """

    def __init__(self, words: Mapping[str, tuple[str, str]] = {}):
        self._words = words
        self._console: Console | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows that `done` of a stage's total are done."""
        if self._console is None or stage != self._stage:
            self.close()
            name, _, of = stage.partition(" ")
            title, unit = self._words.get(name, (name, "task"))
            self._console = Console(f"{title} of {of}" if of else title, total, done=done, unit=unit)
            self._stage = stage
        self._console.update(done, every_seconds=5)

    def close(self) -> None:
        if self._console is not None:
            self._console.close()

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def size_in_words(size: float) -> str:
    """A number of bytes for people: ``5.3 GB``."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{size:.0f} bytes"


def duration(seconds: float) -> str:
    """A time for people: ``1h05m``, ``2m03s`` or ``7s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

"""Progress of long jobs on the terminal."""

import math
import sys
import time


class Console:
    """Progress of a long job: a bar on a terminal, plain lines elsewhere; quiet where `enabled` is False.

    unit: what is counted; bytes are shown as sizes.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, unit: str = "step", enabled: bool = True):
        self._title, self._total, self._unit, self._enabled = title, total, unit, enabled
        self._start, self._first, self._last_line = time.monotonic(), done, 0.0
        self._bar = None
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
            self._bar.start()

    def update(self, done: int, note: str = "", *, every_seconds: float = 0.0) -> None:
        """Shows that `done` of the total are done; as a plain line at most every so many seconds."""
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
        line = f"{self._title}: {counted}" + (f"  {note}" if note else "")
        if self._first < done < self._total:
            left = (now - self._start) / (done - self._first) * (self._total - done)
            line += f"  ({_duration(left)} left)"
        print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ticker:
    """Progress of a job whose end is not known: a line every so many seconds."""

    def __init__(self, unit: str, *, every_seconds: float):
        self._unit, self._every, self._last = unit, every_seconds, time.monotonic()

    def __call__(self, what: str, done: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            print(f"{what}: {done:,} {self._unit}", file=sys.stderr, flush=True)


def size_in_words(size: float) -> str:
    """A number of bytes for people: ``5.3 GB``."""
    power = min(int(math.log10(max(size, 1))) // 3, 3)
    return f"{size / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB')[power]}" if power else f"{size:.0f} bytes"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

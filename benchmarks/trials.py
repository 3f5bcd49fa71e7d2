"""What comes of a trial: a reading of files in which something was changed, and what is wrong with how it ended.

`attempt` runs one of `benchmarks.readings` in this process; `benchmarks.trial_worker` does so within limits.
"""

import contextlib
import dataclasses
import gc
import inspect
import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.readings import WAITING, EndedError, HangError, Reading, bytes_of

PACKAGE = "medllm_jax"

# --- one trial ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    code: exit code; None where it did not end by itself, or with an exception. result: digest of what came out, for
    code 0. said: what it printed. error: of what was not foreseen, its type and message; at: the innermost line of the
    package, and trace all of it.
    """

    code: int | None
    result: str = ""
    said: str = ""
    errors: str = ""
    error: str = ""
    at: str = ""
    trace: str = ""
    seconds: float = 0.0


class GrowthError(BaseException):
    """The trial takes too much memory; raised where it is then."""


def unchanged(_: Path) -> None:
    """The inputs as they are."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A file of other content."""

    path: str
    content: bytes

    def __call__(self, place: Path) -> None:
        (place / self.path).write_bytes(self.content)


@dataclasses.dataclass(frozen=True)
class Lost:
    """A file that is gone; instead: what stands in its place, nothing, a "folder", or a "link" to nothing."""

    path: str
    instead: str = ""

    def __call__(self, place: Path) -> None:
        (place / self.path).unlink()
        if self.instead == "folder":
            (place / self.path).mkdir()
        elif self.instead == "link":
            (place / self.path).symlink_to("nowhere")


def copy_inputs(inputs: Path, reading: Reading, place: Path) -> None:
    """A new folder with what a reading needs."""
    place.mkdir(parents=True)
    for name in reading.needs:
        source, target = inputs / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)


def attempt(inputs: Path, reading: Reading, change: Callable[[Path], None], place: Path) -> Outcome:
    """Runs a reading in this process, in a new folder that is removed again, after a change to what is in it."""
    copy_inputs(inputs, reading, place)
    try:
        with contextlib.chdir(place):
            change(Path())
            _forget_paths()
            return _run(reading)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(reading: Reading) -> Outcome:
    said, errors, started = io.StringIO(), io.StringIO(), time.monotonic()
    code, result, error, at, trace = None, "", "", "", ""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), _alarms(reading.seconds):
        try:
            code, result = _code_and_result(reading)
        except (Exception, HangError, GrowthError) as problem:
            error, at = f"{type(problem).__name__}: {problem}"[:300], _frame(problem)
            trace = "".join(traceback.format_exception(problem, limit=-12))[-4000:]
        if gc.get_freeze_count():  # a worker, where this is quick
            gc.collect()  # what is left behind may complain when it is removed: now, not in another trial
    seconds = time.monotonic() - started
    return Outcome(code, result, said.getvalue(), errors.getvalue(), error, at, trace, seconds)


def _code_and_result(reading: Reading) -> tuple[int, str]:
    """As the command line ends: what a function raises becomes the code and the line that a verb would give."""
    from medllm_jax import errors
    from medllm_jax.cli import main
    from medllm_jax.storage.faults import as_told

    os.environ["MEDLLM_TRACEBACK"] = "1"  # the command line's last line of defence would hide what was not foreseen
    if isinstance(reading.run, str):
        try:
            code = main(reading.run.split())
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        return code, "" if code else bytes_of(reading.results)
    try:
        return 0, reading.run()
    except EndedError as ended:
        return ended.args[0], ""
    except Exception as problem:
        told = problem if isinstance(problem, errors.UserError | errors.RunError) else as_told(problem)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return (2 if isinstance(told, errors.UserError) else 1), ""


def _frame(problem: BaseException) -> str:
    """The innermost line of the package, as file:function."""
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if f"/{PACKAGE}/" in frame.filename]
    if not frames:
        return "outside the package"
    return f"{frames[-1].filename.rpartition(f'/{PACKAGE}/')[2]}:{frames[-1].name}"


@contextlib.contextmanager
def _alarms(seconds: float) -> Iterator[None]:
    """Raises where the trial is when its time is over; and, asked by the process that watches it, for its memory."""

    def raising(error: type[BaseException]) -> Any:
        def handler(*_: object) -> None:
            raise error

        return handler

    raised = {signal.SIGPROF: HangError, signal.SIGALRM: HangError, signal.SIGUSR1: GrowthError}
    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: WAITING * seconds}
    before = {number: signal.signal(number, raising(error)) for number, error in raised.items()}
    for timer, limit in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_paths() -> None:
    """Empties the package's caches that are keyed by a path: the next trial has other files there."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for cached in list(vars(module).values()):
                if hasattr(cached, "cache_clear") and {"path", "folder", "file"} & set(
                    inspect.signature(cached).parameters
                ):
                    cached.cache_clear()


# --- what is wrong with an outcome ----------------------------------------------------------------------------------

LINES, CHARACTERS = 3, 600  # of an error, at most
# Words by which something that goes on says that not all was well.
WORDS = ("left out", "warning", "damaged", "set aside", "skip", "ignored", "passed over", "can't be read", "cut short")
WORDS += ("repaired", "anew", "not read", "unreadable", "lost", "missing", "does not", "incomplete")


def refusal_problem(outcome: Outcome) -> str | None:
    """What is wrong with how an outcome was told; None where it is one short line with code 1 or 2, or code 0."""
    if outcome.code is None:
        return outcome.error.partition(":")[0]
    if "Traceback (most recent call last)" in outcome.errors:
        return "traceback printed"
    if "not foreseen" in outcome.errors:
        return "unforeseen error"
    if outcome.code == 0:
        return None
    if outcome.code not in (1, 2):
        return f"exit code {outcome.code}"
    start = outcome.errors.rfind("error: ")
    if start < 0:
        # `convert verify` tells its verdict on standard output.
        return None if outcome.said.strip() else "no error line"
    line = outcome.errors[start:].strip()
    if line.count("\n") >= LINES:
        return f"error of {line.count(chr(10)) + 1} lines"
    return f"error of {len(line)} characters" if len(line) > CHARACTERS else None


def is_told(outcome: Outcome, usual: Outcome) -> bool:
    """Whether it says in words that something was not well, which it does not usually say."""
    lines = {line for text in (usual.said, usual.errors) for line in text.splitlines()}
    new = [line for text in (outcome.said, outcome.errors) for line in text.splitlines() if line not in lines]
    return any(word in line.lower() for line in new for word in WORDS)

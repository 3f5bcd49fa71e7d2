"""The one exception that means "the input is wrong, and here is what would be right"."""

import reprlib
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Wrong input or configuration: the command line prints the message as one line and exits with code 2.

    The message says what is wrong, where, and what would be right. It carries no traceback for the user, so it must
    be complete by itself.
    """


class RunError(Exception):
    """A run can't go on, and its input need not be wrong: the command line prints the message, and exits with 1."""


INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells have it
PREEMPTED = 42  # exit code of a program that was preempted after saving: start it again


class Preempted(Exception):  # noqa: N818 (no error)
    """A run got SIGTERM and saved what there was to save: exit code PREEMPTED, which asks for another start.

    The message says which step is saved.
    """


class Interrupted(Preempted):
    """The same by Ctrl-C: exit code INTERRUPTED."""


def first_line(error: BaseException, *, most: int = 200) -> str:
    """The first line of what an error says, cut to so many characters; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


# Bounds work too: a list of a million numbers is not written out to be cut.
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 4, 100, 100, 100
_short.maxdict = _short.maxlist = _short.maxtuple = 20


def quoted(value: Any, how: Callable[[Any], str] = _short.repr, *, most: int = 60) -> str:
    """A value as messages show it: on one line, and cut to so many characters."""
    if isinstance(value, int) and abs(value) >= 10**most:  # Python refuses to write out longer ones
        return f"a number of more than {most} digits"
    printable = "".join(letter if letter.isprintable() else " " for letter in how(value)[: 10 * most])
    text = " ".join(printable.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."

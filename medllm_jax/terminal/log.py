"""How messages of the package reach a terminal.

Modules log to ``logging.getLogger(__name__)``: progress and results as INFO, what needs attention as WARNING. A program
that uses the package as a library sees what its own logging lets through; the command line shows all of it.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


class _TerminalHandler(logging.Handler):
    """Prints messages as they are: INFO to standard output, WARNING and above to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        # The streams of now: tests and notebooks replace them.
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)


class _AllBut:
    """A hook for errors that nobody can catch, which leaves out one: TensorStore answers when nobody waits any more."""

    def __init__(self, others: Any):
        self._others = others

    def __call__(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._others(unraisable)


def show_messages() -> None:
    """Shows the package's messages, from INFO on, on the terminal; calling it again changes nothing."""
    logger = logging.getLogger("medllm_jax")
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        sys.unraisablehook = _AllBut(sys.unraisablehook)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it raises as well


@contextlib.contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """transformers shows no bar of its own between the lines of a verb."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()

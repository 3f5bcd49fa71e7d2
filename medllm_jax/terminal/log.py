"""How messages of the package reach a terminal.

Modules log to ``logging.getLogger(__name__)``: progress and results as INFO, what needs attention as WARNING. A program
that uses the package as a library sees what its own logging lets through; the command line shows all of it.
"""

import logging
import sys


class _TerminalHandler(logging.Handler):
    """Prints messages as they are: INFO to standard output, WARNING and above to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        # The streams of now: tests and notebooks replace them.
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(record.getMessage(), file=stream, flush=True)


def show_messages() -> None:
    """Shows the package's messages, from INFO on, on the terminal; calling it again changes nothing."""
    logger = logging.getLogger("medllm_jax")
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it raises as well

"""`medllm`: one verb a subcommand. What a verb needs is imported inside it, so that `--help` is quick.

Exit codes: 0 done; 1 failure; 2 the input or the config is wrong; 42 told to end (SIGTERM), and saved: start it again.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from medllm_jax.cli import convert, data, exams, launch, training
from medllm_jax.errors import PREEMPTED, Preempted, RunError, UserError
from medllm_jax.terminal.log import show_messages
from medllm_jax.terminal.parser import Parser, parse

_INTERRUPTED = 130  # as shells have it for Ctrl-C


def main(arguments: Sequence[str] | None = None, *, group: str | None = None) -> int:
    """Runs a verb, of a group if one is named; returns the exit code. Arguments None are those of the command line."""
    words = [*([group] if group else []), *(sys.argv[1:] if arguments is None else arguments)]
    show_messages()
    try:
        code = _run(words, from_terminal=arguments is None)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if code in (_INTERRUPTED, PREEMPTED) and arguments is None:
        _end(code)
    if code and _one_of_several():
        sys.modules["medllm_jax.distributed.processes"].leave(code)
    return code


def _run(arguments: Sequence[str], *, from_terminal: bool) -> int:
    try:
        options = parse(make_parser(), arguments)
        options.from_terminal = from_terminal
        return options.verb(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Preempted as ended:
        print(f"preempted: {ended}; run the same command to resume", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _end(code: int) -> None:
    """Ends this process at once: it was stopped wherever it was, and threads that still compile would bring down an
    interpreter that is taken apart around them, so that a segmentation fault were its exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_of_several() -> bool:
    """Whether this process has joined others, which would wait for it; imports nothing to find out."""
    processes = sys.modules.get("medllm_jax.distributed.processes")
    return processes is not None and processes.several()


def make_parser() -> Parser:
    """The parser of `medllm` with all its verbs."""
    from medllm_jax import __version__

    about = "Qwen2.5 to a medical model: CPT, RPO and the exam, in JAX."
    parser = Parser(prog="medllm", allow_abbrev=False, description=about)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verbs_of in (data, training, exams, convert, launch):
        verbs_of.add(verbs)
    return parser

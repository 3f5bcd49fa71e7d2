"""`medllm`: one verb a subcommand. What a verb needs is imported inside it, so that `--help` is quick.

Exit codes: 0 done; 1 failure; 2 the input or the config is wrong; 42 preempted (SIGTERM) after saving: start it again;
130 interrupted (Ctrl-C), after saving where there was something to save.
Each failure is one line. Where a traceback is wanted, MEDLLM_TRACEBACK=1 lets unforeseen errors through.
"""

import argparse
import os
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from medllm_jax.distributed.compilation_cache import keep_programs, words_of
from medllm_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, RunError, UserError
from medllm_jax.terminal.log import show_messages
from medllm_jax.terminal.parser import Parser, parse


def main(arguments: Sequence[str] | None = None, *, group: str | None = None) -> int:
    """Runs a verb, of a group if one is named; returns the exit code. Arguments None are those of the command line."""
    words = [*([group] if group else []), *(sys.argv[1:] if arguments is None else arguments)]
    show_messages()
    try:
        code = _run(words, from_terminal=arguments is None)
    except Exception as error:
        if os.environ.get("MEDLLM_TRACEBACK") != "1":
            code = _report(error)
        elif _one_of_several():
            traceback.print_exc()
            code = 1
        else:
            raise
    stopped = code in (INTERRUPTED, PREEMPTED) and arguments is None
    if stopped or (code and _one_of_several()):
        _end(code)
    return code


def _run(arguments: Sequence[str], *, from_terminal: bool) -> int:
    try:
        options = parse(make_parser(), arguments)
        options.from_terminal = from_terminal
        programs = keep_programs()
        is_new = programs is not None and not programs.exists()
        code = options.verb(options) or 0
        if is_new and programs.exists():
            print(words_of(programs), file=sys.stderr)
        return code
    except (UserError, RunError) as error:
        return _fail(error)
    except Interrupted as ended:
        resume = f"to resume: medllm {shlex.join(arguments)}" if from_terminal else "run the same command to resume"
        print(f"interrupted: {ended}; {resume}", file=sys.stderr)
        return INTERRUPTED
    except Preempted as ended:
        print(f"preempted: {ended}; run the same command to resume", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        from medllm_jax.storage.faults import as_told

        told = as_told(error, [word for word in arguments if "gs://" in word])
        if told is None:
            raise
        return _fail(told)


def _fail(error: UserError | RunError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def _nobody_reads() -> bool:
    """Whether the reader of what is printed, such as `head`, has left; then nothing more is printed."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream that is no file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # or Python would complain as it ends
    return left


def _report(error: Exception) -> int:
    """The last line of defence: an error that nobody foresaw is one line, and its traceback a file."""
    from etils import epath

    from medllm_jax.reliability.crash_report import write_report
    from medllm_jax.terminal.secrets import redact

    said = f"{type(error).__name__}: {redact(' '.join(str(error).split()))[:200]}"
    try:
        report = f"the crash report is {write_report(epath.Path(_crash_folder()), 'a verb of medllm', error)}"
    except Exception as another:
        report = f"no crash report could be written ({type(another).__name__})"
    told = f"error: this was not foreseen ({said}); {report}: please report it as a bug of medllm_jax, with that file"
    print(told, file=sys.stderr)
    return 1


def _crash_folder() -> Path:
    """Where reports lie of what was not a run."""
    return Path(tempfile.mkdtemp(prefix="medllm-"))  # which nobody else can read, or have made before


def _end(code: int) -> None:
    """Ends this process at once. One of several would first wait minutes for the others, which wait for it; and threads
    that still compile would bring down an interpreter that is taken apart around them, with a segmentation fault.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_of_several() -> bool:
    """Whether this process has joined others, which would wait for it; imports nothing to find out."""
    processes = sys.modules.get("medllm_jax.distributed.processes")
    return processes is not None and processes.several()


class _Version(argparse.Action):
    """Prints the version; git is asked for the commit then, and not whenever the parser is made."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from medllm_jax.terminal.version import code_version

        print(code_version())
        parser.exit()


def make_parser() -> Parser:
    """The parser of `medllm` with all its verbs."""
    from medllm_jax.cli import chat, completion, configs, convert, data, doctor, exams, launch, training

    about = "Qwen2.5 to a medical model: CPT, RPO and the exam, in JAX."
    parser = Parser(prog="medllm", allow_abbrev=False, description=about)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and its commit if known")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verbs_of in (doctor, configs, data, training, exams, chat, convert, launch, completion):
        verbs_of.add(verbs)
    return parser

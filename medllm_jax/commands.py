"""Commands that are made of commands: each stage is a command line, printed and then run in this process.

What a stage has made is not made again, and training, sampling and evaluation go on by themselves; so what was
interrupted continues when it is asked for again, and any stage can be repeated by hand.
"""

import shlex
from collections.abc import Callable, Sequence

from medllm_jax.errors import PREEMPTED, Preempted, UserError


def medllm(*arguments: str) -> None:
    """Runs `medllm ARGUMENTS`; UserError where it does not end well."""
    from medllm_jax.cli import main

    run_command(f"medllm {shlex.join(arguments)}", main, arguments)


def run_command(line: str, main: Callable[[list[str]], int | None], arguments: Sequence[str]) -> None:
    """Prints a command line and calls the function behind it."""
    print(f"\n$ {line}", flush=True)
    code = main(list(arguments))
    if code == PREEMPTED:
        raise Preempted(f"in: {line}")
    if code:
        raise UserError(f"stopped at: {line}")


def say(text: str) -> None:
    """A heading between stages."""
    print(f"\n== {text}", flush=True)

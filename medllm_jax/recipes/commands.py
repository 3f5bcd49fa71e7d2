"""Commands made of commands: each stage is a command line, printed and then run in this process.

What a stage has made is not made again, and training, sampling and evaluation continue where they stopped; so what was
interrupted continues when it is asked for again, and any stage can be repeated by hand.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from medllm_jax.errors import PREEMPTED, Preempted, UserError

Main = Callable[[Sequence[str]], int]


class Runner:
    """Runs commands of `medllm` by its main function, which a recipe is handed: it does not import the command line."""

    def __init__(self, main: Main):
        self._main = main

    def __call__(self, *arguments: Any) -> None:
        """Prints `medllm ARGUMENTS` and runs it; UserError where it does not end well."""
        words = [str(argument) for argument in arguments]
        line = f"medllm {shlex.join(words)}"
        print(f"\n$ {line}", flush=True)
        code = self._main(words)
        if code == PREEMPTED:
            raise Preempted(f"in: {line}")
        if code:
            raise UserError(f"stopped at: {line}")


def heading(text: str) -> None:
    """A heading between stages."""
    print(f"\n== {text}", flush=True)

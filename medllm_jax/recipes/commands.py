"""Commands made of commands: each stage is a command line, printed and then run in this process.

What a stage has made is not made again, and training, sampling and evaluation continue where they stopped; so what was
interrupted continues when it is asked for again, and any stage can be repeated by hand.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from medllm_jax.errors import PREEMPTED, Preempted, RunError, UserError

Main = Callable[[Sequence[str]], int]


class Runner:
    """Runs commands of `medllm` by its main function, which a recipe is handed: it does not import the command line."""

    def __init__(self, main: Main):
        self._main = main

    def __call__(self, *arguments: Any) -> None:
        """Prints `medllm ARGUMENTS` and runs it; what ends it is raised here as the error of that kind."""
        words = [str(argument) for argument in arguments]
        line = f"medllm {shlex.join(words)}"
        print(f"\n$ {line}", flush=True)
        code = self._main(words)
        if code == PREEMPTED:
            raise Preempted(f"in: {line}")
        if code == 2:
            raise UserError(f"stopped at: {line}")
        if code:  # which may pass, so that whoever starts it again is right to
            raise RunError(f"stopped at: {line}")


def heading(text: str) -> None:
    """A heading between stages."""
    print(f"\n== {text}", flush=True)

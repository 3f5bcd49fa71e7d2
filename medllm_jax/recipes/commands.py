"""Commands made of commands: each stage is a command line, printed and then run in this process.

What a stage has made is not made again, and training, sampling and evaluation continue where they stopped; so what was
interrupted continues when it is asked for again, and any stage can be repeated by hand.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from medllm_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, RunError, UserError
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.json_lines import Row

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
        if code == INTERRUPTED:
            raise Interrupted(f"in: {line}")
        if code == 2:
            raise UserError(f"stopped at: {line}")
        if code:  # which may pass, so that whoever starts it again is right to
            raise RunError(f"stopped at: {line}")


class Score(NamedTuple):
    """Accuracy under one condition, from 0 to 1, and the number of questions."""

    accuracy: float
    questions: int


def read_scores(folder: epath.PathLike, conditions: Sequence[str]) -> dict[str, Score]:
    """Condition -> score, from the scores.json that `medllm evaluate` wrote; UserError where it is damaged."""
    file = epath.Path(folder) / "scores.json"
    found = read_json(file).get("conditions")
    scores = {}
    for condition in conditions:
        entry = found.get(condition) if isinstance(found, dict) else None
        row = Row(entry if isinstance(entry, dict) else {}, str(file))
        try:
            scores[condition] = score = Score(row.get("accuracy", int | float), row.get("n", int))
            if not 0 <= score.accuracy <= 1:
                raise row.error("the accuracy is beyond 1")
        except UserError:
            raise UserError(
                f"{file} has no score under {condition}: it is damaged; remove it, and it is made again"
            ) from None
    return scores


def heading(text: str) -> None:
    """A heading between stages."""
    print(f"\n== {text}", flush=True)

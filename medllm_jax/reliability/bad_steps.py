"""Steps that the guard let change nothing: each is written down, and too many end the run."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from medllm_jax.config.schema import GuardConfig
from medllm_jax.errors import RunError
from medllm_jax.storage.append import AppendedFile
from medllm_jax.storage.best_effort import BestEffort

_log = logging.getLogger(__name__)

FILE = "skipped.jsonl"


class BadStepGuard:
    """Counts the steps that a run skipped, ``skipped`` of them before; one process writes them down."""

    def __init__(self, config: GuardConfig, skipped: int, run: epath.Path):
        self.skipped = skipped
        self._config, self._file, self._attempt = config, AppendedFile(run / FILE), BestEffort()

    def check(self, rows: list[dict[str, Any]], row_ids: Mapping[int, np.ndarray]) -> None:
        """Takes the metrics of steps, and the ids of the rows that each had.

        RunError where the run must end, before anything is saved of the state that a bad step has left.
        """
        for row in rows:
            if not row["skipped"]:
                continue
            self.skipped += 1
            cause = self._cause(row)
            numbers = {name: str(row[name]) for name in ("loss", "grad_norm")}  # JSON has no word for infinity
            self._note(
                {
                    "step": row["step"],
                    "cause": cause or "the update is not finite",
                    **numbers,
                    "rows": row_ids[row["step"]].tolist(),
                }
            )
            if cause is None:
                raise RunError(
                    f"step {row['step']} made parameters or moments that are not finite, of a loss and a gradient that "
                    "are: look at the optimizer's settings, such as eps. Nothing was saved since; started again the "
                    "run goes on from its last checkpoint"
                )
            where = f"{cause} (step {row['step']}; rows and numbers are in {FILE} of the run folder)"
            if self._config.action == "stop":
                raise RunError(
                    f"{where}: nothing was changed by it. Started again the run goes on from its last checkpoint; if "
                    "it comes again, look at the rows, or go on without them by --guard.action skip"
                )
            _log.info(f"skipped, {self.skipped} so far: {where}")
            if self.skipped > self._config.max_skipped:
                raise RunError(
                    f"{self.skipped} steps were skipped, guard.max_skipped is {self._config.max_skipped}: {where}"
                )

    def _cause(self, row: dict[str, Any]) -> str | None:
        """Why a step changed nothing; None where it did change the state, to numbers that are not finite."""
        if np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]):
            if self._config.loss and row["loss"] > self._config.loss:
                return f"the loss {row['loss']:.4g} is above guard.loss {self._config.loss:g}"
            if self._config.grad_norm and row["grad_norm"] > self._config.grad_norm:
                return f"the gradient's norm {row['grad_norm']:.4g} is above guard.grad_norm {self._config.grad_norm:g}"
            return None
        return f"loss {row['loss']} and gradient norm {row['grad_norm']}: not finite numbers"

    def _note(self, line: dict[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        self._attempt(FILE, lambda: self._file.add(json.dumps(line).encode() + b"\n"))
        self._attempt(FILE, self._file.flush)

"""Rows that a run does not train on: how good the model is at them, from time to time."""

from typing import Any

import jax
import numpy as np

from medllm_jax.config import RunConfig
from medllm_jax.data.pipeline import in_order
from medllm_jax.data.sources import Rows
from medllm_jax.programs import TrainProgram
from medllm_jax.sharding import put_batch


class HeldOut:
    """The held-out rows of a run, on its mesh.

    reference: float32 [N, P, 2] log-probabilities of pairs, or None where the objective compares with nothing.
    """

    def __init__(self, config: RunConfig, program: TrainProgram, mesh: Any, rows: Rows, reference: np.ndarray | None):
        self._program, self._mesh, self._rows, self._reference = program, mesh, rows, reference
        self._batch_size = config.data.batch_size // config.data.accumulate
        self._every, self._last = config.held_out.every, config.steps

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    def measure(self, params: Any, frozen: Any) -> dict[str, float]:
        """The objective's metrics over all held-out rows, each named ``held_out/...``; waits for the device."""
        batches = in_order(
            self._rows,
            self._batch_size,
            reference=self._reference,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = None
        for batch, _ in batches:
            found = jax.device_get(self._program.measure(params, put_batch(batch, self._mesh), frozen))
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
        return {f"held_out/{name}": float(total / max(count, 1e-8)) for name, (total, count) in sums.means.items()}

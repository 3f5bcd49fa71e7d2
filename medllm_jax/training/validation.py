"""What a run does not train on: how good the model is at it, from time to time."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medllm_jax.data.loader import in_order
from medllm_jax.data.prefetch import put_batch
from medllm_jax.data.rows import Rows
from medllm_jax.inference.likelihood import Likelihood
from medllm_jax.training.losses import averages
from medllm_jax.training.programs import TrainProgram


class HeldOut:
    """The held-out rows and exam of a run, on its mesh; either may be None.

    reference: float32 [N, P, 2] log-probabilities of pairs, or None where the objective compares with nothing.
    batch_size: global rows at a time. every: steps between measurements; the last step is measured too.
    """

    def __init__(
        self,
        program: TrainProgram,
        mesh: Mesh,
        rows: Rows | None,
        reference: np.ndarray | None,
        exam: Likelihood | None,
        *,
        batch_size: int,
        every: int,
        last_step: int,
    ):
        self._program, self._mesh, self._rows, self._reference, self._exam = program, mesh, rows, reference, exam
        self._batch_size, self._every, self._last = batch_size, every, last_step

    def due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    def measure(self, params: Any, frozen: Any) -> dict[str, float]:
        """Metrics named ``held_out/...``: the objective's over all rows, and the exam's; waits for the device."""
        metrics = self._measure_rows(self._rows, params, frozen) if self._rows is not None else {}
        if self._exam is not None:
            score = self._exam.measure(params, frozen)
            metrics["likelihood_accuracy"] = score.accuracy
            metrics["likelihood_weighted_accuracy"] = score.weighted_accuracy
        return {f"held_out/{name}": value for name, value in metrics.items()}

    def _measure_rows(self, rows: Rows, params: Any, frozen: Any) -> dict[str, float]:
        batches = in_order(
            rows,
            self._batch_size,
            reference=self._reference,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = None
        for batch, _ in batches:
            found = jax.device_get(self._program.measure(params, put_batch(batch, self._mesh), frozen))
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
        if sums is None:
            return {}
        means = {name: float(value) for name, value in averages(sums).items()}
        return means | {name: float(count) for name, count in sums.counts.items()}

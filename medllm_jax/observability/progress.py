"""How a run is going: what its steps say, how fast they are, and where people and programs look for it."""

import logging
import math
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from medllm_jax.config.schema import LoggingConfig
from medllm_jax.data.rows import Seen
from medllm_jax.distributed.chips import peak_flops
from medllm_jax.observability.host_log import HostLog
from medllm_jax.observability.metrics import Meter, MetricsLog
from medllm_jax.observability.sessions import Goodput
from medllm_jax.reliability.bad_steps import BadStepGuard
from medllm_jax.terminal.progress import Console

_log = logging.getLogger(__name__)

_GIB = 2**30


class Progress:
    """Where a run's metrics go: to metrics.jsonl, TensorBoard and W&B every step, to the console now and then.

    The numbers stay on the device until `logging.every` steps have gathered, so the loop does not wait for each. They
    are fetched by every process, which so find alike that a step was skipped; one of them writes.

    name: of the objective. start: step that the run goes on from. started: when it was first started, seconds since the
    epoch. step_flops: that the model needs for a step. mixed: whether each corpus has epochs of its own. settings: the
    run's config as plain values, for W&B. check: raises RunError where the folder is another program's by now.
    """

    def __init__(
        self,
        folder: epath.Path,
        logging: LoggingConfig,
        seen: Seen,
        guard: BadStepGuard,
        *,
        name: str,
        start: int,
        steps: int,
        started: float,
        step_flops: float,
        mixed: bool,
        settings: Mapping[str, Any],
        check: Callable[[], None],
    ):
        writes = jax.process_index() == 0
        self._every = logging.every
        self._seen, self._mixed, self._guard, self._check = seen, mixed, guard, check
        self._newest: jax.Array | None = None
        self._waited = 0.0
        self._row_ids: dict[int, np.ndarray] = {}
        self._meter = Meter()
        self._mfu = _share_of_peak(step_flops)
        self._seconds: list[float] = []  # of each step of this session, but the first
        self._log = None
        if writes:
            self._log = MetricsLog(folder, after_step=start, wandb=logging.wandb, config=settings, check=check)
            self._goodput = Goodput(started, self._log.seconds_before)
        self._host = HostLog(folder, check=check)
        self._host.note_and_show(f"from step {start} on, of {steps}; {len(jax.local_devices())} devices here")
        self._console = Console(f"{name} {folder.name}", steps, done=start, enabled=writes, late=True)

    @property
    def skipped(self) -> int:
        """Steps that were skipped, of those that were fetched."""
        return self._guard.skipped

    def device_is_busy(self) -> bool:
        """Whether a step is still being computed; does not wait for it."""
        # jax.Array's stub does not know is_ready, which every array of a computation has.
        return self._newest is not None and not self._newest.is_ready()  # pyrefly: ignore[missing-attribute]

    def add(self, step: int, metrics: Mapping[str, jax.Array | float], row_ids: np.ndarray, waited: float) -> None:
        """Takes a step's numbers and the ids of its rows; waited: seconds that it and those before waited for data."""
        self._seen.add(row_ids)
        self._row_ids[step] = row_ids
        loss = metrics["loss"]
        self._newest, self._waited = loss if isinstance(loss, jax.Array) else None, waited
        seen: dict[str, float] = {**self._seen.counts}
        if not self._mixed:  # else each corpus has its own
            seen["epoch"] = self._seen.epochs
        self._meter.add(step, {**metrics, **seen})
        if step % self._every == 0 or self._meter.first:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Fetches and writes what has gathered. RunError where the guard ends the run, or another program writes it."""
        rows = self._meter.take(self._waited)
        if not rows:
            return
        self._check()
        memory = memory_in_use()
        last = rows[-1]
        for row in rows:
            row |= memory
            if self._mfu and "step_seconds" in row:
                row["mfu"] = self._mfu / row["step_seconds"]
        speed = (
            f"{last['step_seconds']:.3g} s a step"
            if "step_seconds" in last
            else f"{last['startup_seconds']:.1f} s to start"
        )
        self._host.note(f"step {last['step']}: {speed}, {100 * last.get('data_wait', 0):.1f} % of it waiting for data")
        if self._log is not None:
            seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
            self._seconds += seconds
            self._goodput.add(sum(seconds))
            for row in rows:
                row["goodput"] = self._goodput.share
            self._log.write(rows)
            self._console.update(step, _note(last))
        row_ids, self._row_ids = self._row_ids, {}
        self._guard.check(rows, row_ids)

    def settle(self, step: int) -> None:
        """All that is known of the steps up to this one is written when it returns."""
        self.flush(step)
        if self._log is not None:
            self._log.settle()

    def summarise(self) -> None:
        """What came of this session, on the first process."""
        if self._log is None or not self._seconds:
            return
        median = float(np.median(self._seconds))
        text = f"{len(self._seconds) + 1} steps, {median:.3g} s each (median); goodput {self._goodput.share:.1%}"
        if self._mfu:
            text += f"; MFU {self._mfu / median:.1%}"
        if self._guard.skipped:
            text += f"; {self._guard.skipped} steps skipped"
        _log.info(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._console.close()
        self._host.note_and_show("ended" if error is None else f"ended by {type(error).__name__}")
        self._host.close()
        if self._log is not None:
            self._log.close()


def _note(row: dict[str, Any]) -> str:
    note = f"loss {row['loss']:.4f}"
    if "tokens_per_second" in row:
        note += f"  {row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        note += f"  MFU {row['mfu']:.1%}"
    if row.get("data_wait", 0) > 0.01:
        note += f"  data {100 * row['data_wait']:.1f} %"
    return note


def _share_of_peak(step_flops: float) -> float | None:
    """MFU of a step that takes a second; None where the devices' peak is not known, as a CPU's."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else step_flops / (peak * jax.device_count())


def memory_in_use() -> dict[str, float]:
    """The most memory that was in use so far, GiB: of the fullest device here, where it says so, and of the process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", math.nan) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"host_memory_gib": round(host / _GIB, 3)}
    if not any(map(math.isnan, peaks)):
        found["device_memory_gib"] = round(max(peaks) / _GIB, 3)
    return found

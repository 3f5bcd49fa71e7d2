"""What a run writes while it goes on: metrics.jsonl, TensorBoard events, W&B, and lines or a bar on the terminal."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.append import AppendedFile
from medllm_jax.storage.json_lines import read_appended_rows
from medllm_jax.storage.remote import is_remote


class MetricsLog:
    """metrics.jsonl (every step, in order, each once), TensorBoard events and, if wanted, W&B, of a run folder.

    Opened at the step a run starts from: lines of later steps, which an interrupted run left, are dropped, since these
    steps are made again. seconds_before: that the steps took whose lines are kept.

    A thread writes, so that the loop waits in `settle` only; each write takes with it what has gathered meanwhile. In a
    bucket nothing can be appended to: there it is of the whole files.
    """

    def __init__(self, run: epath.Path, *, after_step: int, wandb: str | None = None, config: Mapping[str, Any] = {}):
        from tensorboardX import SummaryWriter

        self._run = run
        kept = [line for line in read_appended_rows(run / "metrics.jsonl") if line["step"] <= after_step]
        self.seconds_before = sum(line.get("step_seconds", 0.0) for line in kept)
        self._file, self._pending = AppendedFile(run / "metrics.jsonl", map(_dump, kept)), []
        self._wandb = _join_wandb(wandb, run, config) if wandb else None
        self._local = tempfile.TemporaryDirectory() if is_remote(run) else None
        place = str(run / "tensorboard") if self._local is None else self._local.name
        self._events = SummaryWriter(place, purge_step=after_step + 1)
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._writing = self._thread.submit(lambda: None)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds one mapping a step (`step` and numbers)."""
        self._pending += rows
        if self._writing.done():  # else what is new goes with the next
            self._start()

    def settle(self) -> None:
        """Waits until all that was added is in its place."""
        self._start()
        self._writing.result()

    def _start(self) -> None:
        self._writing.result()  # raises what went wrong with the one before
        rows, self._pending = self._pending, []
        self._writing = self._thread.submit(self._write, rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        events = self._events.file_writer
        if events is None:
            raise ValueError(f"the log of {self._run} is closed")
        for row in rows:
            numbers = {name: value for name, value in row.items() if name != "step"}
            events.add_summary(_summary(numbers), row["step"])
            if self._wandb is not None:
                self._wandb.log(numbers, step=row["step"])
        self._events.flush()
        self._file.add(b"".join(map(_dump, rows)))
        self._file.flush()
        if self._local is None:
            return
        for file in epath.Path(self._local.name).iterdir():
            file.copy(self._run / "tensorboard" / file.name, overwrite=True)

    def close(self) -> None:
        try:
            self.settle()
        finally:
            self._thread.shutdown()
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish()
            if self._local is not None:
                self._local.cleanup()


def _summary(numbers: Mapping[str, float]) -> Any:
    """All numbers of a step as one event of TensorBoard's."""
    # Protocol buffers make their classes when they are imported: type checkers see none.
    from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])


def _join_wandb(project: str, run: epath.Path, config: Mapping[str, Any]) -> Any:
    """A run of W&B's that goes on as this one does; UserError without the package."""
    try:
        import wandb
    except ImportError:
        raise UserError('logging.wandb is set and wandb is not installed: pip install "medllm_jax[wandb]"') from None
    identity = hashlib.sha256(os.fspath(run).encode()).hexdigest()[:16]
    folder = None if is_remote(run) else os.fspath(run)
    return wandb.init(project=project, name=run.name, id=identity, resume="allow", dir=folder, config=dict(config))


def _dump(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


class Meter:
    """Metrics of steps whose numbers are still on the device, fetched together so that the loop never waits for one.

    The first `take` is of the first step alone: what it took was mostly starting and compiling, so it is given as
    ``startup_seconds`` and says nothing of speed.
    """

    def __init__(self):
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._since, self._waited = time.monotonic(), 0.0
        self._started = False

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a step: scalars of the device, and numbers of the host, which come back as they are."""
        self._pending.append((step, metrics))

    @property
    def first(self) -> bool:
        """Whether nothing was taken yet."""
        return not self._started

    def take(self, waited: float = 0.0) -> list[dict[str, Any]]:
        """Rows of all steps added since the last call; waits for the device. Speeds are means over these steps.

        waited: seconds that the device has waited for data so far (see `Prefetcher`). `data_wait` is their share of
        the time since the last call.
        """
        if not self._pending:
            return []
        values = jax.device_get([metrics for _, metrics in self._pending])
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rows = [
            {"step": step, **{k: v if isinstance(v, int | float) else float(v) for k, v in sorted(row.items())}}
            for (step, _), row in zip(self._pending, values, strict=True)
        ]
        tokens = sum(row.get("tokens", 0.0) for row in rows)
        for row in rows:
            if self._started:
                row |= {"step_seconds": seconds / len(rows), "tokens_per_second": tokens / seconds}
                row["data_wait"] = (waited - self._waited) / seconds
            else:
                row["startup_seconds"] = seconds
        self._pending, self._since, self._waited, self._started = [], now, waited, True
        return rows

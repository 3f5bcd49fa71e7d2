"""What a run writes while it goes on: metrics.jsonl, TensorBoard events, W&B, and lines or a bar on the terminal."""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.append import AppendedFile, keep_damaged
from medllm_jax.storage.best_effort import BestEffort
from medllm_jax.storage.remote import is_remote
from medllm_jax.storage.run_folder import METRICS, read_metrics
from medllm_jax.terminal.version import install_line


class MetricsLog:
    """metrics.jsonl (every step, in order, each once), TensorBoard events and, if wanted, W&B, of a run folder.

    Opened at the step a run starts from: lines of later steps, which an interrupted run left, are dropped, since these
    steps are made again. seconds_before: that the steps took whose lines are kept.

    A thread writes, so that the loop waits in `settle` only; each write takes with it what has gathered meanwhile. In a
    bucket nothing can be appended to: there it is of the whole files. What can't be written ends no run. check: called
    before each write; what it raises does end it.
    """

    def __init__(
        self,
        run: epath.Path,
        *,
        after_step: int,
        wandb: str | None = None,
        config: Mapping[str, Any] = {},
        check: Callable[[], None] = lambda: None,
    ):
        self._run, self._check, self._attempt = run, check, BestEffort()
        self.seconds_before = 0.0
        self._file = self._attempt(METRICS, lambda: self._open(after_step)) or AppendedFile(run / METRICS)
        self._pending: list[dict[str, Any]] = []
        self._wandb: Any = self._attempt("W&B", lambda: _join_wandb(wandb, run, config)) if wandb else None
        self._local = tempfile.TemporaryDirectory() if is_remote(run) else None
        place = Path(run / "tensorboard" if self._local is None else self._local.name)
        self._events: Any = self._attempt("tensorboard", lambda: _open_events(place, after_step))
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._writing = self._thread.submit(lambda: None)

    def _open(self, after_step: int) -> AppendedFile:
        rows, damaged = read_metrics(self._run)
        kept = [row for row in rows if row["step"] <= after_step]
        self.seconds_before = sum(row.get("step_seconds", 0.0) for row in kept)
        keep_damaged(self._run / METRICS, damaged)
        return AppendedFile(self._run / METRICS, map(_dump, kept))

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds one mapping a step (`step` and numbers)."""
        self._pending += rows
        if self._writing.done():  # else what is new goes with the next
            self._start()

    def settle(self) -> None:
        """Waits until all that was added is in its place, or could not be written."""
        self._start()
        self._writing.result()

    def _start(self) -> None:
        self._writing.result()  # raises what went wrong with the one before
        rows, self._pending = self._pending, []
        self._writing = self._thread.submit(self._write, rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._check()
        # A torn event would hide all that follow it, and W&B has its own way to repeat what failed.
        if self._events is not None:
            self._attempt("tensorboard", lambda: self._write_events(rows), again=False)
        if self._wandb is not None:
            self._attempt("W&B", lambda: self._write_wandb(rows), again=False)
        self._attempt(METRICS, lambda: self._file.add(b"".join(map(_dump, rows))))
        self._attempt(METRICS, self._file.flush)

    def _write_events(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._events.write_event(_event(row))
        self._events.flush()
        if self._local is None:
            return
        for file in epath.Path(self._local.name).iterdir():
            file.copy(self._run / "tensorboard" / file.name, overwrite=True)

    def _write_wandb(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._wandb.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        try:
            self.settle()
        finally:
            self._thread.shutdown()
            if self._events is not None:
                self._attempt("tensorboard", self._events.close)
            if self._wandb is not None:
                self._attempt("W&B", self._wandb.finish)
            if self._local is not None:
                self._local.cleanup()


def _open_events(folder: Path, after_step: int) -> Any:
    """A file of TensorBoard's events, which hides those of later steps in the files before it.

    It is written here, in the caller's thread: that of tensorboardX's own writer ends without a word when the disk is
    full, and whoever adds to its queue then waits for ever.
    """
    # Protocol buffers make their classes when they are imported: type checkers see none.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]

    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"))
    events.write_event(Event(step=after_step + 1, session_log=SessionLog(status=SessionLog.START)))
    return events


def _event(row: Mapping[str, Any]) -> Any:
    """All numbers of a step as one event of TensorBoard's."""
    from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore[missing-module-attribute]
    from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]

    values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(row).items()]
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step"}


def _join_wandb(project: str, run: epath.Path, config: Mapping[str, Any]) -> Any:
    """A run of W&B's that goes on as this one does; UserError without the package."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"logging.wandb is set and wandb is not installed: {install_line('wandb')}") from None
    identity = hashlib.sha256(os.fspath(run).encode()).hexdigest()[:16]
    folder = None if is_remote(run) else os.fspath(run)
    return wandb.init(project=project, name=run.name, id=identity, resume="allow", dir=folder, config=dict(config))


def _dump(row: Mapping[str, Any]) -> bytes:
    """A line of JSON, which has no word for what is not a finite number: null stands for it."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


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

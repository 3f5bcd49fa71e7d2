"""A trace of some steps for xprof: what ran on the devices and the host, and for how long."""

import contextlib
import logging
import tempfile
from pathlib import Path

import jax
from etils import epath

from medllm_jax.storage.best_effort import BestEffort
from medllm_jax.storage.remote import is_remote

_log = logging.getLogger(__name__)

_WHAT = "profile"


class Profiler:
    """Traces steps, the first to the last given, into ``profile`` of the run folder, each process its own. A context.

    (0, 0) are none. The first step of a session holds its compilation: it is better not among them. A trace that can't
    be made ends no run.
    """

    def __init__(self, steps: tuple[int, int], run: epath.Path):
        self._first, self._last = steps
        self._run, self._attempt = run, BestEffort()
        self._trace: Path | None = None  # of this session; it may be done
        self._places = contextlib.ExitStack()

    def before(self, step: int) -> None:
        """Starts the trace where it is to start with this step (or should have, before the session began)."""
        if self._trace is None and self._first <= step <= self._last:
            place = self._run / "profile"
            if is_remote(self._run):
                place = self._places.enter_context(tempfile.TemporaryDirectory())
            self._trace = Path(place)
            self._attempt(_WHAT, lambda: jax.profiler.start_trace(place))

    def after(self, step: int, state: object) -> None:
        """Ends the trace where it is to end with this step; waits for what the step computes."""
        if self._trace is not None and step == self._last:
            jax.block_until_ready(state)
            self._end(self._trace)

    def _end(self, trace: Path) -> None:
        self._attempt(_WHAT, lambda: self._write(trace), again=False)
        self._last = 0

    def _write(self, trace: Path) -> None:
        jax.profiler.stop_trace()
        files = [path for path in trace.rglob("*") if path.is_file()]
        if is_remote(self._run):
            for path in files:
                target = self._run / "profile" / path.relative_to(trace).as_posix()
                epath.Path(path).copy(target, overwrite=True)
        _log.info(f"traced steps {self._first} to {self._last}: {self._run / 'profile'}")

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None and self._last:  # the run ended within the trace
            self._end(self._trace)
        self._places.close()

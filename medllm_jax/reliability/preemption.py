"""Preemption: a run that gets SIGTERM, as pods do before they are taken away, saves first and then ends.

The notice is SIGTERM. A second one ends the process at once, as the first would without this module; what was saved
before is whole.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from medllm_jax.errors import Preempted

_log = logging.getLogger(__name__)


class PreemptionHandler:
    """Listens for the notice; a context, in the main thread (elsewhere Python hears no signals, and it hears none).

    Until `arm` is called a notice ends the run where it is, with `Preempted`: there is nothing to save. From then on
    it waits to be asked for.
    """

    def __init__(self) -> None:
        self._given = self._armed = False
        self._before: Callable[[int, FrameType | None], object] | signal.Handlers | int | None = None

    def __enter__(self) -> "PreemptionHandler":
        # Of several processes, JAX hears the notice of any, and has all agree on the step to save.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def arm(self) -> None:
        """From now on there is something to save."""
        self._armed = True

    def requested(self, step: int) -> bool:
        """Is this step, which every process asks about once, the one to save and end with?"""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._given:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._given = True
        _log.info("SIGTERM: the run saves after this step, and ends; a second one ends it at once")
        if not self._armed:
            raise Preempted("before its first step there is nothing to save")

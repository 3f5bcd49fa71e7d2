"""Preemption: a run that gets SIGTERM, as pods do before they are taken away, saves first and then ends. Ctrl-C, which
is SIGINT, is the same notice by hand.

A second notice ends the process at once, whatever it does; what was saved before is whole.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from medllm_jax.errors import INTERRUPTED, Interrupted, Preempted

_log = logging.getLogger(__name__)
_Handler = Callable[[int, FrameType | None], object] | signal.Handlers | int | None


class PreemptionHandler:
    """Listens for the notice; a context, in the main thread (elsewhere Python hears no signals, and it hears none).

    Until `arm` is called a notice ends the run where it is, with `Preempted` or `Interrupted`: there is nothing to
    save. From then on it waits to be asked for. While the compiler works, Python's code hears nothing; a thread does,
    which answers at once, and ends the process at a second Ctrl-C.
    """

    def __init__(self) -> None:
        self._given = self._armed = self._by_hand = False
        self._before: dict[int, _Handler] = {}
        self._wakeup_before = -1

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            self._heard, self._signals = socket.socketpair()
            self._signals.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
            # Of several processes, JAX hears the SIGTERM of any, and has all agree on the step to save.
            alone = jax.process_count() == 1
            handlers: dict[int, _Handler] = {signal.SIGINT: self._take if alone else self._pass_on}
            if alone:
                handlers[signal.SIGTERM] = self._take
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_before)
            self._signals.close()  # which the thread hears, and ends

    def arm(self) -> None:
        """From now on there is something to save."""
        self._armed = True

    def requested(self, step: int) -> bool:
        """Is this step, which every process asks about once, the one to save and end with?"""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._given

    def ended(self, what: str) -> Preempted:
        """What the run ends with, by the kind of notice; what: that is saved."""
        return (Interrupted if self._by_hand else Preempted)(what)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._given:
            if number == signal.SIGINT:
                _end_at_once()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._given, self._by_hand = True, number == signal.SIGINT
        if not self._armed:
            raise self.ended("before its first step there is nothing to save")

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._by_hand = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _listen(self) -> None:
        """Answers signals as they come; Python writes the number of each to the other end."""
        by_hand = 0
        with self._heard:
            while numbers := self._heard.recv(1):
                number = signal.Signals(numbers[0])
                by_hand += number == signal.SIGINT
                if by_hand > 1:
                    _end_at_once()
                if number in self._before:
                    name = "Ctrl-C" if number == signal.SIGINT else number.name
                    does = "saves after this step, and ends" if self._armed else "ends as soon as it can"
                    _log.info(f"{name}: the run {does}; a second one ends it at once")


def _end_at_once() -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which a bar of progress hides
    print(f"{show_cursor}interrupted: ended at once, as asked for twice", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)

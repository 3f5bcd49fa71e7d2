"""What looks after a run: that it alone writes its folder, gets on, hears that it is to end, says how it failed, and
goes on from nothing but a good checkpoint.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from etils import epath

from medllm_jax.checkpoint.handle import Checkpoint, DamagedError, check_listing
from medllm_jax.checkpoint.orbax import set_aside, steps
from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.distributed.processes import run_on_all
from medllm_jax.errors import Preempted, RunError, UserError, first_line
from medllm_jax.reliability import crash_report
from medllm_jax.reliability.preemption import PreemptionHandler
from medllm_jax.reliability.watchdog import Watchdog
from medllm_jax.storage.faults import as_told
from medllm_jax.storage.lease import Lease

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Supervision(NamedTuple):
    """Its parts: the right to write the folder, the stage that the run is in, and the notice that it is to end."""

    lease: Lease
    watch: Watchdog
    notice: PreemptionHandler


@contextlib.contextmanager
def supervised(folder: epath.Path, stage_seconds: float) -> Iterator[Supervision]:
    """Looks after a run. What fails leaves a report in its folder, but for wrong input, whose one line says it all.

    stage_seconds: the longest that a stage may last; 0 is for ever.
    """
    watch = Watchdog(stage_seconds, report=lambda what: _report(folder, watch.now, what))
    with contextlib.ExitStack() as stack:
        lease, writes = Lease(folder), jax.process_index() == 0
        run_on_all("taking the run folder", lambda: stack.enter_context(lease) if writes else None)
        parts = Supervision(lease, stack.enter_context(watch), stack.enter_context(PreemptionHandler()))
        try:
            yield parts
        except (UserError, Preempted, KeyboardInterrupt):
            raise
        except RunError as error:
            _report(folder, watch.now, error)
            raise
        except Exception as error:
            _report(folder, watch.now, error)
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                cause = first_line(error)
                raise RunError(
                    f"in {watch.now} the processes of the run lost each other ({cause}): one has probably died, and "
                    "its log says why; started again, the run goes on from its last checkpoint"
                ) from error
            told = as_told(error)
            if told is not None:
                raise type(told)(f"{told}; the run goes on from its last checkpoint") from error
            raise


def _report(folder: epath.Path, stage: str, problem: BaseException | str) -> None:
    try:
        path = crash_report.write_report(folder, stage, problem)
    except Exception as error:
        _log.warning(f"no report could be written ({type(error).__name__})")
    else:
        _log.warning(f"the run failed in: {stage} (report: {path})")


class Restored(NamedTuple):
    """What a run goes on from: a checkpoint of its own, and the state in it."""

    checkpoint: Checkpoint
    state: TrainState

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def meta(self) -> dict[str, Any]:
        return self.checkpoint.meta


def restore(folder: epath.Path, abstract: TrainState, watch: Watchdog) -> Restored | None:
    """The newest checkpoint of a run that holds what was written; None where there is none.

    One that does not is set aside, with a warning, and the steps from the one before it are made again. RunError where
    there are checkpoints and none is good: to begin again is not for a program to decide.
    """
    bad: dict[int, DamagedError] = {}
    found = steps(folder)
    for step in reversed(found):
        watch.stage(f"restoring step {step}")
        try:
            restored = _twice(functools.partial(_read, folder, step, abstract))
        except DamagedError as error:
            bad[step] = error.with_traceback(None)  # it holds on to the whole state
        else:
            bad |= _unlisted(folder, [other for other in found if other < step])
            _set_aside(folder, bad, step)
            return restored
    if bad:
        raise RunError(
            f"none of the checkpoints of {folder} ({', '.join(map(str, bad))}) can be read: copy one back, or start in "
            f"another run folder ({next(iter(bad.values()))})"
        )
    return None


def _twice(read: Callable[[], Result]) -> Result:
    """What is read; once again if that is damaged: it may be the way there, and not what is there."""
    with contextlib.suppress(DamagedError):
        return read()
    time.sleep(1)  # here, where nothing holds on to what was read
    return read()


def _unlisted(folder: epath.Path, others: list[int]) -> dict[int, DamagedError]:
    """Which of the checkpoints that the run does not go on from would end it when it writes the next."""
    bad = {}
    for step in others:
        try:
            listed = functools.partial(check_listing, folder, step)
            _twice(functools.partial(run_on_all, f"listing checkpoint {step}", listed, DamagedError))
        except DamagedError as error:
            bad[step] = error
    return bad


def _set_aside(folder: epath.Path, bad: dict[int, DamagedError], good: int) -> None:
    for step, problem in bad.items():
        aside = functools.partial(set_aside, folder, step)
        became = run_on_all("setting it aside", aside if jax.process_index() == 0 else str)
        if jax.process_index() == 0:
            _log.warning(f"warning: {problem}; {became}, and the run goes on from step {good}")


def _read(folder: epath.Path, step: int, abstract: TrainState) -> Restored:
    def read() -> Restored:
        check_listing(folder, step)
        checkpoint = Checkpoint(folder, step)
        return Restored(checkpoint, checkpoint.load_state(abstract))

    restored = run_on_all(f"reading checkpoint {step}", read, DamagedError)
    restored.checkpoint.check_state(restored.state)
    return restored

"""What a run says about itself never ends it: telemetry is written as far as it can be, and the rest is told once."""

import logging
from collections.abc import Callable
from typing import TypeVar

from medllm_jax.errors import RunError, UserError
from medllm_jax.storage.faults import fault_of

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class BestEffort:
    """Does things that may fail. The first failure of each is a warning, and the others are silent."""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def __call__(self, what: str, act: Callable[[], Result], *, again: bool = True) -> Result | None:
        """What `act` returns; None where it fails. again: whether it is still done once it has failed.

        Errors that are meant to end a run (UserError, RunError) pass.
        """
        if what in self._failed and not again:
            return None
        try:
            return act()
        except (UserError, RunError):
            raise
        except Exception as error:
            if what not in self._failed:
                fault = fault_of(error)
                problem = type(error).__name__ if fault is None else fault.words
                then = "" if again else ", and does not try again"
                _log.warning(f"warning: {what} can't be written ({problem}): the run goes on without it{then}")
            self._failed.add(what)
            return None

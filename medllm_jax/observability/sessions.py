"""The times a run was started: what ran, where, from which step on, and what that says of the time since the first."""

import dataclasses
import json
import logging
import time
from typing import Any

import jax
from etils import epath

from medllm_jax.reliability import crash_report
from medllm_jax.storage.append import keep_damaged
from medllm_jax.storage.best_effort import BestEffort
from medllm_jax.storage.json_lines import AppendedRows, read_appended_rows
from medllm_jax.storage.remote import write_whole
from medllm_jax.terminal.version import code_version

_log = logging.getLogger(__name__)

FILE = "sessions.jsonl"


def begin(run: epath.Path, step: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Adds this start of a run to ``sessions.jsonl``, and returns all of them; one process of a run calls it.

    step: that it goes on from. changes: settings that were changed by force, with what they were and are.
    """
    file, attempt = run / FILE, BestEffort()
    found = attempt(FILE, lambda: read_appended_rows(file, _is_session))
    before, damaged = found or AppendedRows([], [])
    device = jax.devices()[0]
    session = {
        "time": time.time(),
        "step": step,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
        "code": code_version(),
        "versions": crash_report.versions(),
        "changes": changes,
    }
    if before and before[-1]["code"] != session["code"]:
        _log.info(f"the code was {before[-1]['code']} and is now {session['code']}")
    sessions = [*before, session]

    def write() -> None:
        if found is None:  # it is there and can't be read now: it is not for this start to replace it
            raise OSError(f"{file} can't be read")
        keep_damaged(file, damaged)
        write_whole(file, "".join(json.dumps(line) + "\n" for line in sessions))

    attempt(FILE, write)
    return sessions


def _is_session(line: dict[str, Any]) -> bool:
    return type(line.get("time")) in (int, float) and isinstance(line.get("code"), str)


@dataclasses.dataclass
class Goodput:
    """The share of the time since a run was first started that went into steps that count.

    Not into starting, compiling, being away, or steps that were made again after an interruption.
    """

    began: float  # when the run was first started, seconds since the epoch
    trained: float = 0.0  # seconds of steps

    def add(self, seconds: float) -> None:
        self.trained += seconds

    @property
    def share(self) -> float:
        return self.trained / max(time.time() - self.began, 1e-9)

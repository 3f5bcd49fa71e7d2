"""What is known of a program that failed, in a file of its run folder: for people and for watching programs.

Importing this module does not import JAX, which a verb that fails may not have needed.
"""

import json
import os
import platform
import socket
import sys
import time
import traceback
from importlib import metadata
from typing import Any

from etils import epath

from medllm_jax.terminal.secrets import redact

_PACKAGES = ("medllm_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain")


def write_report(run: epath.Path, stage: str, problem: BaseException | str) -> epath.Path:
    """Writes ``crashes/TIME-process-N.json`` of a run folder, and returns its path.

    It says when, where and in which stage it happened, the error with its traceback, and the versions of what ran; no
    environment, no arguments, nothing of the data.
    """
    error = problem if isinstance(problem, BaseException) else None
    processes = _processes()
    report = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        **processes,
        "stage": stage,
        "error": None if error is None else type(error).__name__,
        "message": redact(str(problem)),
        "traceback": [] if error is None else redact("".join(traceback.format_exception(error))).splitlines(),
        "versions": versions(),
    }
    folder = run / "crashes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-process-{processes.get('process', os.getpid())}.json"
    path.write_text(json.dumps(report, indent=1))
    return path


def _processes() -> dict[str, Any]:
    """Which of how many processes this is, and its devices; nothing where JAX was not used, or can't say."""
    jax = sys.modules.get("jax")
    if jax is None:
        return {}
    try:
        return {
            "process": jax.process_index(),
            "processes": jax.process_count(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }
    except Exception as error:  # no backend can be had, which may be what failed
        return {"devices": f"none ({type(error).__name__})"}


def versions() -> dict[str, Any]:
    """Of Python and of the packages that what a run computes depends on; None for one that is not installed."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    system = {"python": platform.python_version(), "system": f"{sys.platform} {platform.machine()}"}
    return system | {package: version(package) for package in _PACKAGES}

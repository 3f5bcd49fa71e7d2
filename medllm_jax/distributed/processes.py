"""Several processes that train as one: how they find each other, and how none goes on without the others."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from medllm_jax.distributed.compilation_cache import default_folder
from medllm_jax.errors import RunError, UserError, first_line

Result = TypeVar("Result")


def join(heartbeat_seconds: int) -> None:
    """Joins the other processes of a run, before JAX is used for anything else.

    On TPU pods, GKE and Slurm JAX finds them by itself; elsewhere JAX_COORDINATOR_ADDRESS (host:port, alike for all),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are. heartbeat_seconds: a process that is silent for so long is
    taken for dead, and all end. Compiled programs are kept only in a folder that was named for it: one that the
    processes don't share would have them start apart.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") == str(default_folder()):
        jax.config.update("jax_enable_compilation_cache", False)
    number, index = _count("JAX_NUM_PROCESSES"), _count("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=number, process_id=index, heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:  # what JAX was not told, and did not find
        raise UserError(
            f"distributed is true and JAX finds no cluster ({first_line(error, most=100)}): neither a TPU pod, "
            "GKE nor Slurm, and JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are not all "
            "set; set them, or distributed: false for one process"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise RunError(
            f"the processes of the run did not find each other ({first_line(error, most=60)}): see that all are "
            "started and reach JAX_COORDINATOR_ADDRESS"
        ) from error


def _count(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise UserError(f"the environment variable {variable} is {text[:60]!r}: a whole number is expected")
    return None if text is None else int(text[:18])


def run_on_all(what: str, act: Callable[[], Result], known: type[Exception] = RunError) -> Result:
    """What `act` returns, on every process; or, where it fails on any, an error on all of them.

    A process that it failed on raises its own error; the others raise `known`, where that was one of these everywhere
    it failed, or else RunError, and say which process it was. `act` must not wait for other processes: one that fails
    early would never come.
    """
    problem: Exception | None = None
    results: list[Result] = []
    try:
        results.append(act())
    except Exception as error:
        problem = error
    if jax.process_count() > 1:
        code = 0 if problem is None else 1 if isinstance(problem, known) else 2
        codes = multihost_utils.process_allgather(np.asarray(code))
        if problem is None and codes.any():
            error = RunError if (codes == 2).any() else known
            raise error(f"{what} failed on process {codes.argmax()} of {len(codes)}, whose own log says why")
    if problem is not None:
        raise problem
    return results[0]


def several() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1

"""Python programs that begin warm: forked from a process that has imported what takes seconds.

For tests of what a program does while it runs and is killed. How it starts, and how an interpreter ends, are for tests
that start a real one.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What the clients of buckets read when they are imported; nothing of it matters to others.
CLIENTS = {
    "EPATH_USE_TF": "false",
    "NO_GCE_CHECK": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GCS": '{"token": "anon"}',  # its listing cache is for medllm_jax to turn off
}
_IMPORTED = (
    *("medllm_jax.training.loop", "medllm_jax.conversion.from_hf", "medllm_jax.conversion.to_hf"),
    *("medllm_jax.data.prepare.corpus", "medllm_jax.data.prepare.preference_pairs", "medllm_jax.evaluation.evaluate"),
    *("transformers.models.auto.tokenization_auto", "gcsfs", "google.cloud.storage", "tests.gcs"),
)
_context = multiprocessing.get_context("forkserver")
_started = False


class WarmPython:
    """A program begun with Python's own arguments, ``-c CODE ...`` or ``-m MODULE ...``; it has much of Popen.

    ``stdout`` and ``stderr`` are files, ``subprocess.PIPE`` or, for stderr, ``subprocess.STDOUT``; None inherits. Its
    ``environment`` is what this process has, and this; of what is read at an import, changes come too late.
    """

    def __init__(
        self, *arguments: Any, stdout: Any = None, stderr: Any = None, environment: dict[str, str] | None = None
    ):
        _start_server()
        self.stdout, out = _opened(stdout, 1)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _opened(stderr, 2)
        variables = dict(os.environ) | (environment or {})
        self._process = _context.Process(
            target=_program, args=([str(a) for a in arguments], variables, str(Path.cwd()), _Files(out, err))
        )
        self._process.start()
        for file, kind in ((out, stdout), (err, stderr)):
            if kind == subprocess.PIPE:
                os.close(file)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a warm program", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it printed to pipes, once it has ended; of two pipes, the second must stay small."""
        begun = time.monotonic()
        texts = [pipe.read() if pipe else None for pipe in (self.stdout, self.stderr)]
        self.wait(None if timeout is None else max(0.0, timeout - (time.monotonic() - begun)))
        return texts[0], texts[1]


class _Files:
    """Descriptors for standard output and error, which become the program's own on the way to it."""

    def __init__(self, *files: int):
        self.files = files

    def __getstate__(self) -> list[Any]:
        return [DupFd(file) for file in self.files]

    def __setstate__(self, sent: list[Any]) -> None:
        self.files = tuple(file.detach() for file in sent)


def _opened(kind: Any, inherited: int) -> tuple[Any, int]:
    """(what is read from, the descriptor that is written to)."""
    if kind == subprocess.PIPE:
        reading, writing = os.pipe()
        return os.fdopen(reading), writing
    return None, inherited if kind is None else kind.fileno()


def _start_server() -> None:
    """It is given the modules, and variables that are read when they are imported; it ends with this process."""
    global _started
    if _started:
        return
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ.update(CLIENTS)
    _context.set_forkserver_preload(list(_IMPORTED))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    _started = True


def _program(arguments: list[str], variables: dict[str, str], folder: str, files: _Files) -> None:
    """In the new process: as if Python had been started so."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for place, file in zip((1, 2), files.files, strict=True):
        os.dup2(file, place)
    for file in set(files.files) - {1, 2}:
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    kind, what, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()

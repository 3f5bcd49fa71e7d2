"""Python programs that begin warm: forked from a process that has imported what takes seconds.

For tests of what a program does while it runs, is killed and ends. How it starts is for tests that start a real one.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gcs import CLIENTS

ROOT = Path(__file__).parents[1]
_IMPORTED = (
    *("medllm_jax.training.loop", "medllm_jax.conversion.from_hf", "medllm_jax.conversion.to_hf"),
    *("medllm_jax.data.prepare.corpus", "medllm_jax.data.prepare.preference_pairs", "medllm_jax.evaluation.evaluate"),
    *("transformers.models.auto.tokenization_auto", "gcsfs", "google.cloud.storage"),
)


class WarmPython:
    """A program begun with Python's own arguments, ``-c CODE ...`` or ``-m MODULE ...``; used like a Popen.

    ``stdout`` and ``stderr`` are files, ``subprocess.PIPE`` or, for stderr, ``subprocess.STDOUT``; None inherits. Its
    ``environment`` is what this process has, and this; for what is read at an import, changes come too late.
    """

    def __init__(
        self, *arguments: Any, stdout: Any = None, stderr: Any = None, environment: dict[str, str] | None = None
    ):
        self.returncode: int | None = None
        self.stdout, out = _opened(stdout, 1)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _opened(stderr, 2)
        variables = dict(os.environ) | (environment or {})
        self._server, theirs = socket.socketpair()
        socket.send_fds(_server(), [b"+"], [theirs.fileno(), out, err])
        theirs.close()
        self._server.sendall(json.dumps([[str(a) for a in arguments], variables, str(Path.cwd())]).encode())
        self._server.shutdown(socket.SHUT_WR)
        self.pid = _number(self._server)
        for file, kind in ((out, stdout), (err, stderr)):
            if kind == subprocess.PIPE:
                os.close(file)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a warm program", timeout)
            self.returncode = _number(self._server)
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it printed to pipes."""
        with ThreadPoolExecutor(2) as pool:
            read = [pipe and pool.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        out, err = (each and each.result() for each in read)
        return out, err


def _opened(kind: Any, inherited: int) -> tuple[Any, int]:
    """(what is read from, the descriptor that is written to)."""
    if kind == subprocess.PIPE:
        reading, writing = os.pipe()
        return os.fdopen(reading), writing
    return None, inherited if kind is None else kind.fileno()


# --- the process that is forked --------------------------------------------------------------------------------------


_BEGINNING = threading.Lock()


def _server() -> socket.socket:
    """Where programs are asked for; one for all threads, which ends with this process."""
    with _BEGINNING:
        return _only_server()


@functools.cache
def _only_server() -> socket.socket:
    ours, theirs = socket.socketpair()
    program = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    variables = os.environ | CLIENTS | {"PYTHONPATH": str(ROOT)}
    subprocess.Popen(program, env=variables, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def _serve(requests: socket.socket) -> tuple[list[str], list[int]]:
    """Forks a process for every request, and says how it ended; returns in each of them: arguments, and its outputs."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    asking: dict[int, socket.socket] = {}  # by process
    while True:
        ready = select.select([requests, ended], [], [])[0]
        if ended in ready:
            os.read(ended, 1000)
            while asking and (found := os.waitpid(-1, os.WNOHANG))[0]:
                _say(asking.pop(found[0]), os.waitstatus_to_exitcode(found[1]))
        if requests in ready:
            asked, files, _, _ = socket.recv_fds(requests, 1, 3)
            if not asked:
                sys.exit()
            client, outputs = socket.socket(fileno=files[0]), files[1:]
            with client.makefile("rb") as request:
                arguments, variables, folder = json.load(request)
            process = os.fork()
            if not process:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (requests, client, *asking.values()):
                    each.close()
                os.environ.clear()
                os.environ.update(variables)
                os.chdir(folder)
                return arguments, outputs
            for file in outputs:
                os.close(file)
            asking[process] = client
            _say(client, process)


def _say(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody may wait for it any more
        client.sendall(struct.pack("i", number))


def _number(server: socket.socket) -> int:
    return struct.unpack("i", server.recv(4, socket.MSG_WAITALL))[0]


def _run(arguments: list[str], files: list[int]) -> None:
    """As if Python had been started with these arguments."""
    for place, file in zip((1, 2), files, strict=True):
        os.dup2(file, place)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    kind, what, *rest = arguments
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is there now is shared by all, and is not looked through by each
    _run(*_serve(socket.socket(fileno=int(sys.argv[1]))))

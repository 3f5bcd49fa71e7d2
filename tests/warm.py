"""Python programs that begin warm: forked from a process that has imported what takes seconds.

For tests of what a program does while it runs, is killed and ends. How it starts is for tests that start a real one.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What the clients of buckets read when they are imported; to others it does not matter.
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
_MOST = 1 << 20  # bytes of a request


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
        request = json.dumps([[str(a) for a in arguments], variables, str(Path.cwd())]).encode()
        assert len(request) <= _MOST
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(_address())
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST)
        socket.send_fds(self._server, [request], [out, err])
        self.pid = int(self._server.recv(100))
        for file, kind in ((out, stdout), (err, stderr)):
            if kind == subprocess.PIPE:
                os.close(file)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                self.returncode = int(self._server.recv(100))
            except TimeoutError:
                raise subprocess.TimeoutExpired("a warm program", timeout) from None
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it printed to pipes; of two, what goes to the second must be little."""
        texts = [pipe.read() if pipe else None for pipe in (self.stdout, self.stderr)]
        self.wait(timeout)
        return texts[0], texts[1]


def _opened(kind: Any, inherited: int) -> tuple[Any, int]:
    """(what is read from, the descriptor that is written to)."""
    if kind == subprocess.PIPE:
        reading, writing = os.pipe()
        return os.fdopen(reading), writing
    return None, inherited if kind is None else kind.fileno()


# --- the process that is forked --------------------------------------------------------------------------------------

_server: subprocess.Popen | None = None


def _address() -> str:
    """Where the server listens; it is started when it is first asked for, and ends with this process."""
    global _server
    if _server is None:
        address = f"{tempfile.mkdtemp(prefix='warm-')}/socket"
        program = [sys.executable, "-m", "tests.warm", address]
        variables = os.environ | CLIENTS | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _server = subprocess.Popen(program, env=variables, **pipes)
        assert _server.stdout.readline() == b"ready\n"
    return _server.args[-1]


def _serve(address: str) -> tuple[list[str], list[int]]:
    """Forks a process for every request, and says how it ended; returns in each of them: arguments, and its outputs."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(100)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    print("ready", flush=True)
    asking: dict[int, socket.socket] = {}  # by process
    while True:
        ready = select.select([0, listener, ended], [], [])[0]
        if 0 in ready:
            sys.exit()
        if ended in ready:
            os.read(ended, 1000)
            while asking and (found := os.waitpid(-1, os.WNOHANG))[0]:
                _say(asking.pop(found[0]), os.waitstatus_to_exitcode(found[1]))
        if listener in ready:
            client = listener.accept()[0]
            request, files, _, _ = socket.recv_fds(client, _MOST, 2)
            process = os.fork()
            if not process:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listener, client, *asking.values()):
                    each.close()
                arguments, variables, folder = json.loads(request)
                os.environ.clear()
                os.environ.update(variables)
                os.chdir(folder)
                return arguments, files
            for file in files:
                os.close(file)
            asking[process] = client
            _say(client, process)


def _say(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody may wait for it any more
        client.send(str(number).encode())


def _run(arguments: list[str], files: list[int]) -> None:
    """As if Python had been started with these arguments."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
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
    _run(*_serve(sys.argv[1]))

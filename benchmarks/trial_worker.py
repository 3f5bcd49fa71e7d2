"""Trials in processes of their own, with limits of time and memory; and many of them, side by side."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inputs import make_inputs
from benchmarks.readings import READINGS, WAITING, Reading, readings
from benchmarks.trials import Lost, Outcome, Replaced, attempt, unchanged
from tests.warm import WarmPython

GIB = 0.5  # by which a trial may make its process grow


class Worker:
    """A process that makes trials one after the other, begun anew when one has hung it, filled it or ended it."""

    def __init__(self, inputs: Path, scratch: Path):
        scratch.mkdir(parents=True, exist_ok=True)
        self._inputs, self._scratch = inputs, scratch
        self._process: WarmPython | None = None
        self._count = 0

    def attempt(self, reading: Reading, change: Callable[[Path], None]) -> Outcome:
        if self._process is None or self._count >= 300:
            self.close()
            self._begin()
        self._count += 1
        place = self._scratch / f"{os.getpid()}-{self._count}"
        _send(self._to, [str(self._inputs), reading.name, _change_as_json(change), str(place)])
        outcome = self._watched(reading.seconds)
        if outcome.error.startswith(("HangError", "GrowthError", "Killed", "Ended")):
            self.close()
            shutil.rmtree(place, ignore_errors=True)  # which a process that was ended could not do
        return outcome

    def _begin(self) -> None:
        name = uuid.uuid4().hex
        # A warm program inherits nothing but its outputs: it is handed its end of the pair through a named socket, of
        # Linux's namespace without files.
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"\0{name}")
            listening.listen()
            listening.settimeout(120)  # a program that can't begin never calls
            code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + sys.argv[1]); "
            code += "from benchmarks.trial_worker import serve; serve(s)"
            with (self._scratch / "native.log").open("ab") as log:  # what libraries print past Python's streams
                self._process = WarmPython("-c", code, name, stdout=log, stderr=log, environment=ENVIRONMENT)
            self._to, _ = listening.accept()
        self._count = 0

    def _watched(self, seconds: float) -> Outcome:
        """Waits for the outcome, and asks the process to end the trial, or ends it, where limits are passed."""
        pid, began = self._process.pid, time.monotonic()
        first, asked = _resident(pid), None
        self._to.settimeout(0.05)
        data = b""
        while True:
            try:
                part = self._to.recv(1 << 20)
                if not part:
                    return Outcome(
                        None, error=f"Ended: the process ended with {self._process.wait(10)}", at="native code"
                    )
                data += part
                if len(data) >= 8 and len(data) == 8 + struct.unpack("Q", data[:8])[0]:
                    return Outcome(*json.loads(data[8:]))
                continue
            except TimeoutError:
                pass
            now = time.monotonic()
            grown = _resident(pid) - first
            if asked is None and grown > GIB * 2**30:
                asked = now
                self._process.send_signal(signal.SIGUSR1)
            over = now - began > WAITING * seconds + 5 or (asked is not None and now - asked > 5)
            if over or grown > 6 * GIB * 2**30:
                self._process.kill()
                self._process.wait()
                what = "GrowthError" if asked is not None else "HangError"
                return Outcome(None, error=f"{what}: killed", at="native code", seconds=now - began)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._to.close()
            self._process = None


# One device, no cache of compiled programs, quick compiling, and no accelerator.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}


def serve(requests: socket.socket) -> None:
    """Makes the trials that are asked for, until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = requests.makefile("rb")
    while head := stream.read(8):
        inputs, name, change, place = json.loads(stream.read(struct.unpack("Q", head)[0]))
        reading = next(each for each in READINGS if each.name == name)
        outcome = attempt(Path(inputs), reading, _change_from_json(change), Path(place))
        _send(requests, list(dataclasses.astuple(outcome)))
    os._exit(0)


def _send(to: socket.socket, content: list[Any]) -> None:
    data = json.dumps(content).encode()
    to.sendall(struct.pack("Q", len(data)) + data)


def _change_as_json(change: Callable[[Path], None]) -> list[str]:
    match change:
        case Replaced(path, content):
            return ["replaced", path, content.decode("latin-1")]
        case Lost(path, instead):
            return ["lost", path, instead]
    return ["unchanged"]


def _change_from_json(fields: list[str]) -> Callable[[Path], None]:
    match fields:
        case ["replaced", path, content]:
            return Replaced(path, content.encode("latin-1"))
        case ["lost", path, instead]:
            return Lost(path, instead)
    return unchanged


def _resident(pid: int) -> int:
    """Bytes of memory of a process that are its own."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


# --- many trials ----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="readings whose name contains this, such as `data:` or `to-hf`")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--folder", type=Path, help="with the real files, made if it is not there (default: a new one)")


class Place(NamedTuple):
    """inputs: the folder of the real files. scratch: one for copies. readings: those that were asked for."""

    inputs: Path
    scratch: Path
    readings: list[Reading]


@contextlib.contextmanager
def place_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[Place]:
    """Where trials are made, with the options of `add_options`; the environment of this process is the workers'."""
    os.environ |= ENVIRONMENT
    chosen = readings(options.only)
    if not chosen:
        parser.error(f"--only {options.only}: there are {', '.join(each.name for each in READINGS)}")
    with tempfile.TemporaryDirectory(prefix="trials-", dir=_fast_folder()) as scratch:
        inputs = (options.folder or Path(scratch) / "inputs").absolute()
        if not inputs.exists():
            make_inputs(inputs)
        yield Place(inputs, Path(scratch), chosen)


_USUAL: dict[str, Outcome] = {}


def usual(worker: Worker, reading: Reading) -> Outcome:
    """What comes of the files as they are; SystemExit where that is not the same twice."""
    if reading.name not in _USUAL:
        first, again = (worker.attempt(reading, unchanged) for _ in range(2))
        if first.code is None or (first.code, first.result) != (again.code, again.result):
            raise SystemExit(f"{reading.name} does not come out the same twice: {first} {again}")
        _USUAL[reading.name] = again
    return _USUAL[reading.name]


def in_workers(place: Place, jobs: Iterator[Any], workers: int, work: Callable[[Worker, Any], None]) -> None:
    """Hands jobs to a function, with a worker of its own for each of some threads."""
    lock = threading.Lock()

    def serve_jobs(number: int) -> None:
        worker = Worker(place.inputs, place.scratch / str(number))
        try:
            while True:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                work(worker, job)
        finally:
            worker.close()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(serve_jobs, number) for number in range(workers)]:
            done.result()


def _fast_folder() -> str | None:
    """Where copies are made and removed all the time: in memory, if there is such a folder."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None

"""One writer at a time: the lease of a folder, or of whatever else a verb writes, local or gs://.

The lease is a small file that its holder writes anew every few seconds. Every write names the version of the file that
it replaces, so of two programs that want it one gets it, in a bucket too. A holder that died no longer writes, and
after a while another may take its place; where it ran on this machine, at once.
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from etils import epath

from medllm_jax.errors import RunError
from medllm_jax.storage.remote import is_remote, kvstore_spec

_log = logging.getLogger(__name__)

FILE = "writer.json"
_SECONDS = 60.0  # after which a lease that was not written anew is free
# Type of each field of the file.
_FIELDS = {"id": str, "machine": list | None, "pid": int, "started": str | None, "written": str, "clock": float}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def now() -> float:
    """Seconds on a clock that goes on while the machine sleeps, alike for all its processes."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """The right to write a folder; a context. RunError where another program has it.

    It stands in the folder, or beside the output that it is of (`beside`). At the end of a context that did not fail it
    is checked once more, so that nothing is called done that two programs wrote.

    unit: the part of the folder that this program writes, where several may write one each. seconds: how long a lease
    is good for that is not renewed, and so the longest that a start waits for one whose holder may have died elsewhere.
    """

    def __init__(self, folder: str | os.PathLike, unit: str = "", *, seconds: float = _SECONDS):
        self._what = self._folder = os.fspath(folder)
        self._file, self._seconds = f"{unit}.{FILE}" if unit else FILE, seconds
        self._about = {
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._lost: str | None = None
        self._renewed = math.inf  # until it is taken
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="lease", daemon=True)

    @classmethod
    def beside(cls, output: str | os.PathLike, unit: str = "", *, seconds: float = _SECONDS) -> "Lease":
        """Of a folder or file that is put in its place when it is whole, and so can't hold the lease."""
        path = epath.Path(output if is_remote(output) else Path(output).resolve())
        in_bucket = is_remote(path) and not path.parent.name  # which nothing stands beside
        lease = cls(path if in_bucket else path.parent, f".{path.name}.{unit}".rstrip("."), seconds=seconds)
        lease._what = os.fspath(output)
        return lease

    def __enter__(self) -> "Lease":
        import tensorstore as ts

        store = kvstore_spec(self._folder)
        local = [] if is_remote(self._folder) else [path := Path(self._folder).resolve(), *path.parents]
        self._made = [path for path in local if not path.exists()]
        epath.Path(self._folder).mkdir(parents=True, exist_ok=True)
        self._store = ts.KvStore.open(store).result()
        self._version = self._take()
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if error is None:
                self.check()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        if self._lost is None:
            try:
                self._store.write(self._file, None, if_equal=self._version).result()
            except Exception as error:
                _log.info(f"the lease of {self._what} was not given back ({error}): it ends by itself")
        with contextlib.suppress(OSError):  # where nothing else came into them, they were made for the lease alone
            for folder in self._made:
                folder.rmdir()

    def check(self) -> None:
        """RunError if another program writes now. To be asked before each write.

        Where the lease was not renewed in time, since the program was stopped or the machine slept, it is looked at.
        """
        if now() - self._renewed > self._seconds:
            self._renew()
        if self._lost is not None:
            raise RunError(self._lost)

    def _take(self) -> bytes:
        """The version of the lease that this program wrote."""
        seen, since = None, time.monotonic()
        while True:
            found = self._store.read(self._file).result()
            holder, version = _parse(found.value) if found.state == "value" else None, found.stamp.generation
            if holder is not None and (seen not in (None, version) or self._is_at_work(holder)):
                raise RunError(f"{self._what} is being written by {_name(holder)}: end that one first")
            if holder is None or _is_dead(holder) or time.monotonic() - since > self._seconds:
                written = self._write(version)
                if written is not None:
                    return written
                seen, since = None, time.monotonic()  # another program was quicker
                continue
            if seen is None:
                _log.info(f"{self._what} was last written by {_name(holder)}: is that one still there?")
                seen = version
            time.sleep(min(1.0, self._seconds / 10))

    def _is_at_work(self, holder: dict[str, Any]) -> bool:
        """Whether a holder is known to go on: a process of this machine that has renewed it in time."""
        alive = holder.get("machine") is not None and holder["machine"] == _machine() and not _is_dead(holder)
        return alive and now() - holder.get("clock", -self._seconds) < self._seconds

    def _write(self, version: bytes) -> bytes | None:
        """Replaces a version of the lease; the new version, or None where another was there."""
        began = now()
        times = {"written": time.strftime("%Y-%m-%d %H:%M:%S %z"), "clock": began}
        content = json.dumps(self._about | times)
        written = self._store.write(self._file, content.encode(), if_equal=version).result().generation
        if not written:  # or it was, and only the answer was lost
            found = self._store.read(self._file).result()
            written = found.stamp.generation if _parse(found.value).get("id") == self._about["id"] else None
        if written:
            self._renewed = began
        return written or None

    def _go_on(self) -> None:
        while self._lost is None and not self._ended.wait(self._seconds / 6):
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None:
                return
            try:
                version = self._write(self._version)
            except Exception:  # a bucket that does not answer: try again, as long as the lease is good
                if now() - self._renewed > self._seconds:
                    self._lost = f"the lease of {self._what} ran out: it could not be renewed for {self._seconds:.0f} s"
                return
            if version is None:
                self._lost = f"{self._what} is written by another program now: this one ends"
            else:
                self._version = version


def sole_writer(
    output: str, *, beside: bool = False, unit: str | Callable[..., str] = ""
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """For a function that writes what one of its parameters names: of two calls at a time the second is refused.

    output: the parameter. beside: whether it is put in its place when it is whole (`Lease.beside`). unit: the part of
    it that is written, or what tells that from all arguments, by their names.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def alone(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            part = unit if isinstance(unit, str) else unit(**given.arguments)
            with (Lease.beside if beside else Lease)(given.arguments[output], part):
                return function(*args, **kwargs)

        return alone

    return decorate


def _parse(content: bytes) -> dict[str, Any]:
    """What a lease says of its holder; nothing where it is damaged."""
    try:
        holder = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    known = isinstance(holder, dict) and all(isinstance(value, _FIELDS.get(k, object)) for k, value in holder.items())
    return holder if known else {}


def _name(holder: dict[str, Any]) -> str:
    host = next(iter(holder.get("machine") or ["another host"]))
    return f"process {holder.get('pid')} on {str(host)[:60]} (at {holder.get('written', 'an unknown time')[:60]})"


def _is_dead(holder: dict) -> bool:
    """Whether a holder is known to have ended: a process of this machine that is no longer there."""
    here = holder.get("machine") is not None and holder["machine"] == _machine()
    return here and _started(holder.get("pid")) != holder.get("started")


def _machine() -> list[str] | None:
    """What tells the processes that have numbers together from others; None where that can't be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")]  # noqa: PTH115 (it links to no path)
    except OSError:
        return None


def _started(pid: int | None) -> str | None:
    """When a process of this machine was started, by the kernel's clock; None where there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # one that ended is there until its parent has asked for it

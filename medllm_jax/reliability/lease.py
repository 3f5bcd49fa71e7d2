"""One writer at a time: the lease of a run folder, local or gs://.

The lease is a small file that its holder writes anew every few seconds. Every write names the version of the file that
it replaces, so of two programs that want it one gets it, in a bucket too. A holder that died no longer writes, and
after a while another may take its place; where it ran on this machine, at once.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

import tensorstore as ts
from etils import epath

from medllm_jax.errors import RunError
from medllm_jax.storage.remote import is_remote, kvstore_spec

_log = logging.getLogger(__name__)

FILE = "writer.json"
_SECONDS = 60.0  # after which a lease that was not written anew is free


class Lease:
    """The right to write a folder; a context. RunError where another program has it.

    seconds: how long a lease is good for that is not renewed, and so the longest that a start waits for one whose
    holder may have died elsewhere.
    """

    def __init__(self, folder: str | os.PathLike, *, seconds: float = _SECONDS):
        self._folder, self._seconds = os.fspath(folder), seconds
        self._about = {
            "id": uuid.uuid4().hex,
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._made = not is_remote(self._folder) and not Path(self._folder).exists()
        epath.Path(self._folder).mkdir(parents=True, exist_ok=True)
        self._store = ts.KvStore.open(kvstore_spec(self._folder)).result()
        self._version = self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._lost is None:
            try:
                self._store.write(FILE, None, if_equal=self._version).result()
            except Exception as error:
                _log.info(f"the lease of {self._folder} was not given back ({error}): it ends by itself")
        if self._made:
            with contextlib.suppress(OSError):  # where nothing else came into it, it was made for the lease alone
                Path(self._folder).rmdir()

    def check(self) -> None:
        """RunError if another program writes the folder now."""
        if self._lost is not None:
            raise RunError(self._lost)

    def _take(self) -> bytes:
        """The version of the lease that this program wrote."""
        seen, since = None, time.monotonic()
        while True:
            found = self._store.read(FILE).result()
            holder, version = _parse(found.value) if found.state == "value" else None, found.stamp.generation
            if holder is not None and seen not in (None, version):
                raise RunError(f"{self._folder} is being written by {_name(holder)}: end that one first")
            if holder is None or _is_dead(holder) or time.monotonic() - since > self._seconds:
                written = self._write(version)
                if written is not None:
                    return written
                seen, since = None, time.monotonic()  # another program was quicker
                continue
            if seen is None:
                _log.info(f"{self._folder} was last written by {_name(holder)}: is that one still there?")
                seen = version
            time.sleep(min(1.0, self._seconds / 10))

    def _write(self, version: bytes) -> bytes | None:
        """Replaces a version of the lease; the new version, or None where another was there."""
        content = json.dumps(self._about | {"written": time.strftime("%Y-%m-%d %H:%M:%S %z")})
        written = self._store.write(FILE, content.encode(), if_equal=version).result().generation
        if not written:  # or it was, and only the answer was lost
            found = self._store.read(FILE).result()
            written = found.stamp.generation if _parse(found.value).get("id") == self._about["id"] else None
        return written or None

    def _renew(self) -> None:
        good_until = time.monotonic() + self._seconds
        while not self._ended.wait(self._seconds / 6):
            try:
                version = self._write(self._version)
            except Exception:  # a bucket that does not answer: try again, as long as the lease is good
                if time.monotonic() > good_until:
                    self._lost = (
                        f"the lease of {self._folder} ran out: it could not be renewed for {self._seconds:.0f} s"
                    )
                    return
                continue
            if version is None:
                self._lost = f"{self._folder} is written by another program now: this one ends"
                return
            self._version, good_until = version, time.monotonic() + self._seconds


def _parse(content: bytes) -> dict:
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict) -> str:
    host = (holder.get("machine") or ["another host"])[0]
    return f"process {holder.get('pid')} on {host} (at {holder.get('written')})"


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
    """When a process of this machine was started, by the kernel's clock; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None

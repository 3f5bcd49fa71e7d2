"""A file that grows, on a disk or in a bucket, and what is done where it holds what nobody wrote."""

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from medllm_jax.storage.remote import is_remote, write_whole

_log = logging.getLogger(__name__)


class AppendedFile:
    """A UTF-8 file that lines are added to. On a disk they are appended at once.

    In a bucket, where nothing can be appended to, they wait for `flush`, which writes the whole file. Its content is
    then held in memory. Lines that could not be written are written with the next ones, each whole and once.

    content: replaces what the file holds; None goes on from it, and reads it in a bucket before the first line.
    """

    def __init__(self, path: epath.Path, content: Iterable[bytes] | None = None):
        self._path, self._remote = path, is_remote(path)
        self._new: list[bytes] = []  # lines that the file does not hold yet
        self._held: bytes | None = None  # of a file in a bucket, once it is known
        if content is not None:
            whole = b"".join(content)
            write_whole(path, whole)
            self._held = whole if self._remote else None

    def add(self, line: bytes) -> None:
        """Adds a line, which ends in a newline, or several."""
        self._new.append(line)
        if not self._remote:
            self.flush()

    def flush(self) -> None:
        """Writes what the file does not hold yet."""
        if not self._new:
            return
        if not self._remote:
            _append(Path(self._path), b"".join(self._new))
        else:
            if self._held is None:
                self._held = self._path.read_bytes() if self._path.exists() else b""
            whole = b"".join((self._held, b"\n" if _is_torn(self._held) else b"", *self._new))
            write_whole(self._path, whole)
            self._held = whole
        self._new = []


def _append(path: Path, data: bytes) -> None:
    """Appends all or nothing, on a line of its own."""
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        left = memoryview(b"\n" + data if _is_torn(file.read(1)) else data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def _is_torn(content: bytes) -> bool:
    """Whether a killed program has left its last line without an end."""
    return bool(content) and not content.endswith(b"\n")


def keep_damaged(file: epath.Path, lines: Sequence[int]) -> None:
    """Keeps a file as it is under another name, ``NAME.damaged-N``, and says so; it is to be called before it is
    written anew without some lines, which can't be read. lines: their numbers; without one nothing is done.
    """
    if not lines:
        return
    kept = next(path for n in itertools.count(1) if not (path := file.with_name(f"{file.name}.damaged-{n}")).exists())
    file.copy(kept)
    which = f"line {lines[0]}" if len(lines) == 1 else f"{len(lines)} lines, the first of them line {lines[0]}"
    _log.warning(f"warning: {file} can't be read whole ({which}): it is kept as {kept.name}, and the rest is used")

"""A file that grows, on a disk or in a bucket."""

from collections.abc import Iterable

from etils import epath

from medllm_jax.storage.remote import is_remote, write_whole


class AppendedFile:
    """A UTF-8 file that lines are added to. On a disk they are appended at once.

    In a bucket, where nothing can be appended to, they wait for `flush`, which writes the whole file. Its content is
    then held in memory.

    content: replaces what the file holds; None goes on from it, and reads it in a bucket before the first line.
    """

    def __init__(self, path: epath.Path, content: Iterable[bytes] | None = None):
        self._path, self._remote = path, is_remote(path)
        self._lines: list[bytes] | None = None  # of a file in a bucket, once they are known
        if content is not None:
            lines = list(content)
            write_whole(path, b"".join(lines).decode())
            self._lines = lines if self._remote else None

    def add(self, line: bytes) -> None:
        """Adds a line, which ends in a newline, or several."""
        if not self._remote:
            with self._path.open("ab") as file:
                file.write(line)
            return
        if self._lines is None:
            self._lines = [self._path.read_bytes()] if self._path.exists() else []
        self._lines.append(line)

    def flush(self) -> None:
        """Writes what a bucket does not hold yet."""
        if self._lines is not None:
            write_whole(self._path, b"".join(self._lines).decode())

"""What is different about gs://. Imports neither what reads buckets nor paths, which are slow to import.

Clients repeat requests that fail for a while. So an answer that was lost means that a request is carried out twice, and
what is done in a bucket must bear that: writing and removing do; moving does not, since what was moved is not found.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medllm_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in object storage: nothing can be appended to there, and a folder can't be renamed at once."""
    return "://" in str(path)


def kvstore_spec(folder: str | os.PathLike) -> dict[str, str]:
    """The TensorStore kvstore of a folder; UserError for a scheme other than a local path or gs://."""
    text = os.fspath(folder)
    if text.startswith("gs://"):
        bucket, _, key = text.removeprefix("gs://").partition("/")
        if not bucket:
            raise UserError(f"{text} names no bucket: gs://BUCKET/FOLDER is expected")
        return {"driver": "gcs", "bucket": bucket, "path": f"{key.rstrip('/')}/"}
    if is_remote(text):
        raise UserError(f"{text}: a local folder, or one under gs://, is expected")
    return {"driver": "file", "path": f"{Path(text).resolve()}/"}


def is_folder(path: "epath.Path") -> bool:
    """Whether a folder is there. (`is_dir` says no, too, where a bucket does not answer or may not be read.)"""
    try:
        return path.stat().is_directory
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_file(path: "epath.Path") -> bool:
    """Whether a file is there; like `is_folder`, it fails where that can't be known."""
    try:
        return not path.stat().is_directory
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_there(path: "epath.Path") -> bool:
    """Whether something is there; UserError where it is a link to what is not, which counts as nothing elsewhere."""
    if path.exists():
        return True
    if not is_remote(path) and Path(path).is_symlink():
        raise UserError(f"{path} is a link to what is not there: put that back, or remove the link")
    return False


def names_in(folder: "epath.Path") -> set[str]:
    """Names of what a folder holds; none where it is not there: a bucket has no empty folders."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def open_stored(path: "epath.Path") -> Iterator[IO[bytes]]:
    """A file open for reading; UserError where it is not stored as it would be read."""
    with path.open("rb") as stream:
        refuse_encoding(str(path), (getattr(stream, "details", None) or {}).get("contentEncoding"))
        yield stream


def refuse_encoding(name: str, encoding: str | None) -> None:
    """UserError for an object that its bucket unpacks on the way: what is read ends where the packed one would."""
    if encoding:
        raise UserError(
            f"{name} is stored with Content-Encoding: {encoding[:20]}, so that its size is not that of what is read: "
            "upload it again without (such as gsutil's -z), as a .gz file or plain"
        )


@contextlib.contextmanager
def open_buffered(path: "epath.Path", buffer_bytes: int = 2**20) -> "Iterator[io.BufferedReader[Any]]":
    """A file open for reading as by `open_stored`, with a buffer of our own.

    Files under gs:// look for line ends in Python, and cannot bound the length of a line.
    """
    with open_stored(path) as raw:
        # (Paths promise IO, which has no readinto; what they open has.)
        yield io.BufferedReader(raw, buffer_bytes)  # pyrefly: ignore[bad-specialization]


def write_whole(path: "epath.Path", content: str | bytes) -> None:
    """Writes a file that is there whole or not at all: in a bucket every object is, elsewhere it takes a rename."""
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def remove_folder(path: "epath.Path") -> None:
    """Removes a folder and all in it; it need not be there."""
    with contextlib.suppress(FileNotFoundError):
        path.rmtree()


def move_folder(path: "epath.Path", target: "epath.Path") -> None:
    """Moves a folder of files to where none is; in a bucket not at once: it is whole when ``path`` is gone."""
    if not is_remote(path):
        path.rename(target)
        return
    for file in path.iterdir():
        file.copy(target / file.name, overwrite=True)
    remove_folder(path)


def turn_off_listing_cache() -> None:
    """Makes paths under gs:// say what is there now.

    By default gcsfs, which is behind them, remembers listings, so that even `exists()` never sees what another process
    wrote or removed. The defaults of its file systems are read from the environment when fsspec is imported; a setting
    of the user's own stands.
    """
    try:
        settings = json.loads(os.environ.get("FSSPEC_GCS", "{}"))
    except ValueError:
        return  # fsspec warns of it
    if isinstance(settings, dict):
        os.environ["FSSPEC_GCS"] = json.dumps({"use_listings_cache": False} | settings)
    if "fsspec" in sys.modules:  # by the program that imports us: what it has read, it won't read again
        sys.modules["fsspec"].config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

"""Writing safetensors files: each under a temporary name, checked, then renamed; in a bucket, an object at once."""

import base64
import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from etils import epath

from medllm_jax.conversion.hf_weights import DTYPES, SINGLE, read_header
from medllm_jax.conversion.names import Tensor
from medllm_jax.storage.remote import is_remote

_UPLOAD_BYTES = 32 << 20


class Shard(NamedTuple):
    """A file of some tensors, in this order, that starts with a header."""

    name: str
    tensors: list[Tensor]
    header: bytes

    @property
    def bytes(self) -> int:
        """The whole file's."""
        return len(self.header) + _ends(self.header)


def shards_of(tensors: Sequence[Tensor], dtype: np.dtype, max_bytes: int, single: str = SINGLE) -> list[Shard]:
    """Files of at most so many bytes of tensors, but at least one tensor, in order."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor_bytes(tensor, dtype) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor_bytes(tensor, dtype)
    count = len(groups)
    names = [single] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [Shard(name, group, _header(group, dtype)) for name, group in zip(names, groups, strict=True)]


def index_of(shards: Sequence[Shard], dtype: np.dtype) -> dict[str, Any] | None:
    """What the index of some files says; None for one file, which needs none."""
    if len(shards) == 1:
        return None
    places = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor_bytes(tensor, dtype) for shard in shards for tensor in shard.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def tensor_bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape)) * dtype.itemsize


def _header(tensors: Sequence[Tensor], dtype: np.dtype) -> bytes:
    code = next(code for code, each in DTYPES.items() if each == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor_bytes(tensor, dtype)
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _ends(header: bytes) -> int:
    return max(entry["data_offsets"][1] for name, entry in json.loads(header[8:]).items() if name != "__metadata__")


def holds_shard(folder: epath.Path, shard: Shard) -> bool:
    """Whether a file that was written is still there, as large as it was: what a machine that stops had not yet on its
    disk is not.
    """
    path = folder / shard.name
    return path.exists() and path.stat().length == shard.bytes


class Copied(NamedTuple):
    """Bytes of a local shard that are copied from another file.

    copy: copies them to a place in an open file. It returns what then shows what arrived there, block by block (uint8),
    to what it is given, and raises an error where that is not what was to be copied.
    """

    nbytes: int
    copy: Callable[[int, int], Callable[[Callable[[np.ndarray], object]], None]]


def write_shard(folder: epath.Path, shard: Shard, pieces: Iterable[np.ndarray | Copied]) -> str:
    """Writes a file of its tensors' values, which come in order and in pieces of any size; its sha256 (hex).

    OSError where what arrived is not what was sent. A bucket takes no pieces that are copied.
    """
    sha256 = hashlib.sha256()
    (_upload if is_remote(folder) else _write)(folder / shard.name, _counted(shard, pieces), shard.bytes, sha256)
    return sha256.hexdigest()


@contextlib.contextmanager
def _behind() -> Iterator[Callable[..., None]]:
    """What does work in a thread of its own, in order, since checksums take as long as all else; two pieces of work may
    wait for it, and all is done at the end.
    """
    waiting = collections.deque()
    with ThreadPoolExecutor(1) as thread:

        def later(work: Callable[..., object], *arguments: object) -> None:
            if len(waiting) == 2:
                waiting.popleft().result()
            waiting.append(thread.submit(work, *arguments))

        yield later
        for each in waiting:
            each.result()


def _counted(shard: Shard, pieces: Iterable[Any]) -> Iterator[Any]:
    yield np.frombuffer(shard.header, np.uint8)
    written = len(shard.header)
    for piece in pieces:
        written += piece.nbytes
        yield piece if isinstance(piece, Copied) else np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    if written != shard.bytes:
        raise ValueError(f"{shard.name} was to have {shard.bytes} bytes and got {written}")


def _write(path: epath.Path, pieces: Iterable[np.ndarray | Copied], size: int, sha256: Any) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    with Path(unfinished).open("wb+", buffering=0) as file, _behind() as later:
        place = 0
        for piece in pieces:
            if isinstance(piece, Copied):
                later(piece.copy(file.fileno(), place), sha256.update)
            else:
                later(sha256.update, piece)
                _write_at(file.fileno(), place, piece)
            place += piece.nbytes
    if unfinished.stat().length != size:
        raise OSError(f"{unfinished} has {unfinished.stat().length} bytes and was to have {size}")
    read_header(unfinished)  # which says that it is whole
    unfinished.replace(path)  # one may be there that was not noted any more


def _write_at(file: int, place: int, data: np.ndarray) -> None:
    while len(data):
        written = os.pwrite(file, data.data, place)
        place, data = place + written, data[written:]


def _upload(path: epath.Path, data: Iterable[np.ndarray], size: int, sha256: Any) -> None:
    from google.cloud import storage

    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    blob = storage.Client().bucket(bucket).blob(name)
    sent = google_crc32c.Checksum()
    # (A block that fails gives the upload up; until one ends, there is no object.)
    with blob.open("wb", chunk_size=_UPLOAD_BYTES, ignore_flush=True) as file, _behind() as later:
        for piece in data:
            later(sha256.update, piece)
            sent.update(piece)
            file.write(piece)
    blob.reload()
    if blob.size != size or base64.b64decode(blob.crc32c) != sent.digest():
        blob.delete()
        raise OSError(f"{path}: what arrived in the bucket is not what was sent; go on with --resume")

"""Writing safetensors files: each under a temporary name, checked, then renamed; in a bucket, an object at once."""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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


def write_shard(folder: epath.Path, shard: Shard, pieces: Iterable[np.ndarray]) -> str:
    """Writes a file of its tensors' values, which come in order and in pieces of any size; its sha256 (hex).

    OSError where what arrived is not what was sent.
    """
    sha256 = hashlib.sha256()
    # In a thread of its own, since it takes as long as everything else; no more than two pieces wait for it.
    with ThreadPoolExecutor(1) as hashing:
        data = _hashed(_counted(shard, pieces), sha256, hashing)
        (_upload if is_remote(folder) else _write)(folder / shard.name, data, shard.bytes)
    return sha256.hexdigest()


def _hashed(pieces: Iterable[np.ndarray], sha256: Any, thread: ThreadPoolExecutor) -> Iterator[np.ndarray]:
    before = None
    for piece in pieces:
        latest = thread.submit(sha256.update, piece)
        yield piece
        if before is not None:
            before.result()
        before = latest


def _counted(shard: Shard, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield np.frombuffer(shard.header, np.uint8)
    written = len(shard.header)
    for piece in pieces:
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        written += len(data)
        yield data
    if written != shard.bytes:
        raise ValueError(f"{shard.name} was to have {shard.bytes} bytes and got {written}")


def _write(path: epath.Path, data: Iterable[np.ndarray], size: int) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    with Path(unfinished).open("wb", buffering=0) as file:
        for piece in data:
            while len(piece):
                piece = piece[file.write(piece.data) :]
    if unfinished.stat().length != size:
        raise OSError(f"{unfinished} has {unfinished.stat().length} bytes and was to have {size}")
    read_header(unfinished)  # which says that it is whole
    unfinished.replace(path)  # one may be there that was not noted any more


def _upload(path: epath.Path, data: Iterable[np.ndarray], size: int) -> None:
    from google.cloud import storage

    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    blob = storage.Client().bucket(bucket).blob(name)
    sent = google_crc32c.Checksum()
    # (A block that fails gives the upload up; until one ends, there is no object.)
    with blob.open("wb", chunk_size=_UPLOAD_BYTES, ignore_flush=True) as file:
        for piece in data:
            sent.update(piece)
            file.write(piece)
    blob.reload()
    if blob.size != size or base64.b64decode(blob.crc32c) != sent.digest():
        blob.delete()
        raise OSError(f"{path}: what arrived in the bucket is not what was sent; go on with --resume")

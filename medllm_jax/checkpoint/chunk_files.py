"""The chunks of an array that are files of whole rows: they go from file to file without passing through TensorStore.

Such a file is what its rows are in a row-major array, byte for byte, and behind them their crc32c (little-endian): the
codecs `bytes` and `crc32c` of zarr 3, as `arrays.create` has them written.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import tensorstore as ts

from medllm_jax.checkpoint.arrays import UnreadableError
from medllm_jax.storage.file_copy import blocks_of, copy_bytes

_SUM_BYTES = 4
_DEFAULT_KEYS = ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}})

Look = Callable[[np.ndarray], object]  # takes a uint8 block of what was copied, which it must not keep


class ChunkFiles(NamedTuple):
    """The chunk files of an array, or of one block of it.

    shape: of the array, or block. dtype: of its values. rows: how many a file holds; the last file is filled up.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def fill(self, first: int, source: int, offset: int, look: Look) -> bool:
        """Writes the chunk that begins at a row with bytes of an open file; the file of the chunk is there whole or
        not at all. False, and nothing is written, where the source ends before.
        """
        path, size = self._file(first), self.rows * self.row_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.part")
        target = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            is_whole = copy_bytes(source, offset, target, 0, size) == size
            if is_whole:
                os.pwrite(target, _sum_bytes(_look_through(target, 0, size, look)), size)
        finally:
            os.close(target)
        if is_whole:
            unfinished.replace(path)
        else:
            unfinished.unlink()
        return is_whole

    def copy(self, first: int, target: int, to: int) -> Callable[[Look], None]:
        """Copies the rows of the chunk that begins at a row into an open file.

        What is returned looks through what arrived there, and raises UnreadableError where it is not what was written.
        FileNotFoundError where the chunk is not there.
        """
        path, size = self._file(first), min(self.rows, self.shape[0] - first) * self.row_bytes
        whole = self.rows * self.row_bytes
        with path.open("rb", buffering=0) as source:
            copied = copy_bytes(source.fileno(), 0, target, to, size)
            source.seek(size)
            rest = source.read(whole - size + _SUM_BYTES + 1)
        if copied + len(rest) != whole + _SUM_BYTES:
            raise UnreadableError(f"{path} has {copied + len(rest)} bytes of {whole + _SUM_BYTES}")

        def check(look: Look) -> None:
            found = google_crc32c.extend(_look_through(target, to, size, look), rest[:-_SUM_BYTES])
            if _sum_bytes(found) != rest[-_SUM_BYTES:]:
                raise UnreadableError(f"{path} is not what was written: its crc32c differs")

        return check

    def _file(self, first: int) -> Path:
        return self.folder.joinpath(str(first // self.rows), *("0" for _ in self.shape[1:]))


def chunk_files(array: ts.TensorStore, block: int | None = None) -> ChunkFiles | None:
    """The chunk files of an array, or of one of the blocks that lie along its first dimension.

    None where its chunks are no local files of whole rows, in which values stand as they are.
    """
    spec: dict[str, Any] = array.spec().to_json()
    if spec["driver"] != "zarr3" or spec["kvstore"]["driver"] != "file":
        return None
    metadata = spec["metadata"]
    chunk, shape = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["shape"]
    sequence = [codec["name"] for codec in metadata["codecs"]]
    endian = metadata["codecs"][0].get("configuration", {}).get("endian", "little")
    if sequence != ["bytes", "crc32c"] or endian != "little" or metadata["chunk_key_encoding"] not in _DEFAULT_KEYS:
        return None
    folder = Path(spec["kvstore"]["path"]) / "c"
    if block is not None:
        if chunk[0] != 1:
            return None
        folder, chunk, shape = folder / str(block), chunk[1:], shape[1:]
    if chunk[1:] != shape[1:]:
        return None
    return ChunkFiles(folder, tuple(shape), array.dtype.numpy_dtype, chunk[0])


def _look_through(file: int, offset: int, size: int, look: Look) -> int:
    """The crc32c of what is written in a file, which is looked at on the way."""
    found = 0
    for block in blocks_of(file, offset, size):
        found = google_crc32c.extend(found, block)
        look(block)
    return found


def _sum_bytes(crc: int) -> bytes:
    return crc.to_bytes(_SUM_BYTES, "little")

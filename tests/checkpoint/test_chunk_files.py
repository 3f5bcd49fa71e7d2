"""Chunk files are what TensorStore reads and writes, and what is not such a file is not taken for one."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

from medllm_jax.checkpoint import arrays
from medllm_jax.checkpoint.arrays import UnreadableError
from medllm_jax.checkpoint.chunk_files import chunk_files

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Shapes and chunks, and the block, of arrays whose chunks are whole rows; a last chunk may hold fewer.
LAYOUTS = [
    ((3, 8, 6), (1, 4, 6), 2),
    ((3, 7, 6), (1, 4, 6), 0),
    ((8, 6), (2, 6), None),
    ((2, 9), (1, 9), 1),
    ((9,), (3,), None),
]


def values_of(shape, dtype):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def created(folder, shape, chunk, dtype):
    (folder / "params").mkdir(parents=True)
    return arrays.create(epath.Path(folder) / "params", "w", shape, dtype.name, chunk)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)])
@pytest.mark.parametrize(("shape", "chunk", "block"), LAYOUTS)
def test_chunks_are_filled_and_copied_as_tensorstore_does(tmp_path, dtype, shape, chunk, block):
    values = values_of(shape, dtype)
    written, filled = (created(tmp_path / name, shape, chunk, dtype) for name in ("written", "filled"))
    part = values if block is None else values[block]
    (written if block is None else written[block]).write(part).result()
    source = tmp_path / "source"
    source.write_bytes(b"header" + part.tobytes())
    out = tmp_path / "out"
    ours, seen = chunk_files(filled, block), []
    with source.open("rb") as opened:
        for first in range(0, len(part) - len(part) % ours.rows, ours.rows):
            offset = 6 + first * ours.row_bytes
            assert ours.fill(first, opened.fileno(), offset, lambda data: seen.append(data.tobytes()))
    if len(part) % ours.rows:  # a chunk that is not full is TensorStore's to write
        last = slice(len(part) // ours.rows * ours.rows, None)
        (filled if block is None else filled[block])[last].write(part[last]).result()
    else:
        assert b"".join(seen) == part.tobytes()
    assert files_in(tmp_path / "filled") == files_in(tmp_path / "written")

    theirs, seen = chunk_files(written, block), []
    with out.open("wb+") as opened:
        for first in range(0, len(part), theirs.rows):
            check = theirs.copy(first, opened.fileno(), 5 + first * theirs.row_bytes)
            check(lambda data: seen.append(data.tobytes()))
    assert out.read_bytes() == bytes(5) + part.tobytes()
    assert b"".join(seen) == part.tobytes()


def test_a_source_that_ends_early_fills_nothing(tmp_path):
    chunks = chunk_files(created(tmp_path, (4, 2), (2, 2), BFLOAT16))
    (tmp_path / "source").write_bytes(b"1234567")
    before = files_in(tmp_path)
    with (tmp_path / "source").open("rb") as source:
        assert not chunks.fill(0, source.fileno(), 0, len)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("shape", [(4, 2), (3, 2)])
@pytest.mark.parametrize("place", [0, 5, -9, -1])
def test_each_byte_of_a_chunk_is_checked(tmp_path, shape, place):
    array = created(tmp_path, shape, (4, 2), BFLOAT16)
    array.write(values_of(shape, BFLOAT16)).result()
    (file,) = (path for path in Path(tmp_path).rglob("c/*/0"))
    content = bytearray(file.read_bytes())
    content[place] ^= 8
    file.write_bytes(content)
    with (tmp_path / "out").open("wb+") as out, pytest.raises(UnreadableError, match="crc32c differs"):
        chunk_files(array).copy(0, out.fileno(), 0)(len)
    for cut in (content[:-1], content + b"0", b""):
        file.write_bytes(cut)
        with (tmp_path / "out").open("wb+") as out, pytest.raises(UnreadableError, match="bytes of 20"):
            chunk_files(array).copy(0, out.fileno(), 0)(len)
    file.unlink()
    with (tmp_path / "out").open("wb+") as out, pytest.raises(FileNotFoundError):
        chunk_files(array).copy(0, out.fileno(), 0)(len)


def test_what_is_stored_otherwise_is_not_copied(tmp_path):
    split, joined = ((2, 4, 3), None), ((2, 4, 6), 0)
    for number, (chunk, block) in enumerate([((4, 3), None), split, joined]):
        array = created(tmp_path / str(number), (4, 6) if len(chunk) == 2 else (2, 4, 6), chunk, BFLOAT16)
        assert chunk_files(array, block) is None
    for driver, base in (("zarr", "file"), ("zarr3", "ocdbt"), ("zarr3", "memory")):
        store = {"driver": base}
        if base == "ocdbt":
            store["base"] = f"file://{tmp_path}/ocdbt/"
        elif base == "file":
            store["path"] = f"{tmp_path}/{driver}/"
        spec = {"driver": driver, "kvstore": store}
        assert chunk_files(ts.open(spec, create=True, dtype=ts.bfloat16, shape=[4, 6]).result()) is None
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/compressed/"}}
    for codecs in (["bytes"], ["bytes", "zstd"], [{"name": "bytes", "configuration": {"endian": "big"}}, "crc32c"]):
        named = [{"name": codec} if isinstance(codec, str) else codec for codec in codecs]
        spec["metadata"] = {"codecs": named}
        opened = ts.open(spec, create=True, delete_existing=True, dtype=ts.bfloat16, shape=[4, 6]).result()
        assert chunk_files(opened) is None, codecs

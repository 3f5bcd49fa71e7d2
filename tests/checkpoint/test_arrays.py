"""Arrays that are written slice by slice: chunks that devices and slices need, and damage that is seen."""

import math
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.checkpoint import arrays
from medllm_jax.checkpoint.handle import DamagedError, open_checkpoint
from medllm_jax.cli.convert import main
from medllm_jax.config.load import load_model_config
from medllm_jax.conversion.names import parameter_shapes
from medllm_jax.distributed.sharding import parts_of
from medllm_jax.errors import UserError
from tests.tiny_hf import make_hf_folder

MIB = 1 << 20


@pytest.mark.parametrize("size", ["0.5b", "7b", "72b"])
@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 16, "tensor": 4}])
def test_chunks_of_published_shapes(size, mesh):
    """Each is a part of what a device reads and of what a slice writes, and neither huge nor tiny."""
    if size == "0.5b" and mesh and mesh["tensor"] == 4:
        return  # its 14 heads don't divide
    for path, shape in parameter_shapes(load_model_config(Path("configs/model") / f"qwen2.5-{size}.yaml")).items():
        stacked = path.startswith("layers/")
        parts = mesh and parts_of(path, shape, mesh)
        chunk = arrays.chunk_shape(shape, 2, parts, stacked=stacked)
        assert chunk[0] == 1 or not stacked
        assert math.prod(chunk) * 2 <= 8 * MIB, path
        if len(shape) - stacked == 2:
            assert chunk[-2] * shape[-1] * 2 <= 64 * MIB, path
            assert math.prod(chunk) * 2 >= min(math.prod(shape[-2:]) * 2 // math.prod(parts or (1,)), 1.5 * MIB), path
        for dimension, part in enumerate(parts or ()):
            share = shape[dimension] // part
            # A chunk is read by more than one device only across the columns, where parts would be too narrow.
            narrow = dimension == len(shape) - 1 and share < 512
            assert share % chunk[dimension] == 0 or narrow or math.prod(shape) * 2 < MIB, (path, dimension)


@given(
    rows=st.integers(1, 5000),
    columns=st.integers(1, 5000),
    blocks=st.none() | st.integers(1, 5),
    parts=st.none() | st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8])),
)
def test_chunks_of_any_shape_are_valid(rows, columns, blocks, parts):
    if parts is not None:
        rows, columns = rows * parts[0], columns * parts[1]
        parts = parts if blocks is None else (1, *parts)
    shape = (rows, columns) if blocks is None else (blocks, rows, columns)
    chunk = arrays.chunk_shape(shape, 2, parts, stacked=blocks is not None)
    assert len(chunk) == len(shape)
    assert all(1 <= size <= whole for size, whole in zip(chunk, shape, strict=True))
    assert shape[-1] % chunk[-1] == 0


@pytest.fixture
def written(tmp_path):
    """A weight of 2 blocks in 4 chunks, its values, and its folder."""
    values = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
    item = epath.Path(tmp_path) / "params"
    item.mkdir()
    array = arrays.create(item, "layers/w", values.shape, "float32", (1, 4, 6))
    array.write(values).result()
    return array, values, Path(tmp_path) / "params" / "layers.w"


def chunk_files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")


def test_what_is_written_is_read(written):
    array, values, folder = written
    np.testing.assert_array_equal(array.read().result(), values)
    assert len(chunk_files(folder)) == 4
    again = arrays.create(epath.Path(folder.parent), "layers/w", values.shape, "float32", (1, 4, 6))
    np.testing.assert_array_equal(again[1, 2:5].read().result(), values[1, 2:5])


def test_another_array_in_its_place_is_an_error(written):
    _, values, folder = written
    with pytest.raises(UserError, match="an array of another conversion"):
        arrays.create(epath.Path(folder.parent), "layers/w", values.shape, "float32", (1, 2, 6))


def test_a_description_that_nests_deep_is_not_given_to_libraries(written, tmp_path):
    """They follow it until the process ends."""
    _, values, folder = written
    deep = '{"codecs": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (folder / "zarr.json").write_text(deep)
    with pytest.raises(UserError, match=r"layers.w is damaged, or .*JSON"):
        arrays.create(epath.Path(folder.parent), "layers/w", values.shape, "float32", (1, 4, 6))
    assert main(["from-hf", str(make_hf_folder(tmp_path / "hf")), str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "checkpoints" / "0" / "params" / "norm.weight" / "zarr.json").write_text(deep)
    checkpoint = open_checkpoint(tmp_path / "run")
    for read in (checkpoint.open_arrays, checkpoint.stored_params, checkpoint.host_params):
        with pytest.raises(DamagedError, match=r"norm.weight/zarr.json is not JSON"):
            read()


def test_a_lost_chunk_is_no_weight(written):
    array, _, folder = written
    chunk_files(folder)[0].unlink()
    assert np.isnan(array[0, :4].read().result()).all()


@pytest.mark.parametrize("damage", ["flipped", "cut", "lost"])
def test_damaged_chunks_are_not_exported(tmp_path, capsys, damage):
    source = make_hf_folder(tmp_path / "hf")
    assert main(["from-hf", str(source), str(tmp_path / "run")]) == 0
    file = chunk_files(tmp_path / "run" / "checkpoints" / "0" / "params" / "layers.mlp.up_proj.weight")[0]
    content = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        content[17] ^= 4
        file.write_bytes(content)
    capsys.readouterr()
    for step in (
        ["to-hf", str(tmp_path / "run"), str(tmp_path / "out")],
        ["verify", str(source), str(tmp_path / "run")],
    ):
        assert main(step) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "can't be read in layers/mlp/up_proj/weight" in error
    assert not (tmp_path / "out").exists()

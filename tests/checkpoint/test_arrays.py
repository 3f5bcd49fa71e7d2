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
from medllm_jax.distributed.sharding import reading_parts
from medllm_jax.errors import UserError
from tests.tiny_hf import make_hf_folder

MIB = 1 << 20


MESHES = [
    None,
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 16, "tensor": 4},
    {"data": 1, "fsdp": 64, "tensor": 1},  # of the shipped runs of 72B
    {"data": 1, "fsdp": 64, "tensor": 4},
]


@pytest.mark.parametrize("size", ["0.5b", "7b", "72b"])
@pytest.mark.parametrize("mesh", MESHES)
def test_chunks_of_published_shapes(size, mesh):
    """Each is whole rows, which one device reads, and neither huge nor tiny."""
    if size != "72b" and mesh and (mesh["tensor"] == 4 or mesh["fsdp"] == 64):
        return  # heads of smaller models don't divide
    for path, shape in parameter_shapes(load_model_config(Path("configs/model") / f"qwen2.5-{size}.yaml")).items():
        stacked = path.startswith("layers/")
        parts = reading_parts(path, shape, mesh) if mesh else (1,) * len(shape)
        chunk = arrays.chunk_shape(shape, 2, parts[stacked], stacked=stacked)
        assert chunk[0] == 1 or not stacked
        assert chunk[stacked + 1 :] == shape[stacked + 1 :]
        assert math.prod(chunk) * 2 <= 8 * MIB, path
        share, row_bytes = shape[stacked] // parts[stacked], 2 * math.prod(shape[stacked + 1 :])
        assert math.prod(chunk) * 2 >= min(share * row_bytes, 1.5 * MIB), path
        if mesh:
            # Only what is small is read by more than one device.
            assert share % chunk[stacked] == 0 or share * row_bytes < MIB // 4, path
            if len(shape) - stacked == 2:
                assert parts[-1] == 1
                assert math.prod(parts) == mesh["fsdp"] * mesh["tensor"], path


@given(
    rows=st.integers(1, 5000),
    columns=st.none() | st.integers(1, 5000),
    blocks=st.none() | st.integers(1, 5),
    parts=st.sampled_from([1, 2, 4, 8]),
)
def test_chunks_of_any_shape_are_valid(rows, columns, blocks, parts):
    shape = (*(() if blocks is None else (blocks,)), rows * parts, *(() if columns is None else (columns,)))
    stacked = blocks is not None
    chunk = arrays.chunk_shape(shape, 2, parts, stacked=stacked)
    assert len(chunk) == len(shape)
    assert all(1 <= size <= whole for size, whole in zip(chunk, shape, strict=True))
    assert chunk[stacked + 1 :] == shape[stacked + 1 :]
    assert shape[stacked] % chunk[stacked] == 0 or parts == 1


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

"""What a model began with decides the dtype of its export, and exports are compared as they are made."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import DataConfig, InitConfig, RunConfig
from medllm_jax.conversion.history import history_of
from tests.conversion.hf_folders import run, tensors_in


@pytest.fixture
def trained(converted, tmp_path):
    """A run in float32 that began with a model in bfloat16."""
    return write_run(tmp_path / "trained", converted, init=str(converted))


def write_run(folder, converted, *, init):
    """A run with other weights than the converted model's, of which some need all of float32."""
    before = open_checkpoint(converted)
    params = unflatten_dict(before.host_params(), sep="/")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) * 1.00001 + 1e-6, params)
    data = DataConfig(store="store", batch_size=4)
    config = RunConfig(run=str(folder), steps=40, data=data, init=InitConfig(init), model=before.model)
    write_model(folder, params, to_plain(before.model), config=to_plain(config))
    return folder


def dtype_of(folder):
    return json.loads((folder / "config.json").read_text())["torch_dtype"]


def test_a_model_in_bfloat16_comes_back_in_bfloat16(trained, tmp_path, capsys):
    assert run("to-hf", trained, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "the model came in bfloat16 and was trained in float32: it is exported in bfloat16; --dtype float32" in said
    assert dtype_of(tmp_path / "out") == "bfloat16"
    for name, value in tensors_in(tmp_path / "out").items():
        assert value.dtype.name == "bfloat16", name
    assert run("verify", tmp_path / "out", trained) == 0
    assert f"{trained}: its float32 is compared in bfloat16, as it is exported" in capsys.readouterr().out
    assert run("verify", trained, tmp_path / "out", "--by", "hash") == 0


def test_float32_is_kept_where_it_is_asked_for(trained, tmp_path, capsys):
    assert run("to-hf", trained, tmp_path / "out", "--dtype", "float32") == 0
    assert "came in bfloat16" not in capsys.readouterr().out
    stored = open_checkpoint(trained).host_params()
    np.testing.assert_array_equal(tensors_in(tmp_path / "out")["model.norm.weight"], stored["norm/weight"])
    assert run("verify", tmp_path / "out", trained) == 0
    assert "is compared in bfloat16" not in capsys.readouterr().out


def test_what_began_with_random_weights_or_is_not_at_hand_is_exported_as_stored(converted, trained, tmp_path):
    drawn = write_run(tmp_path / "drawn", converted, init=None)
    away = write_run(tmp_path / "away", converted, init=str(tmp_path / "gone"))
    for folder in (drawn, away):
        assert history_of(open_checkpoint(folder)).dtype is None
        assert run("to-hf", folder, tmp_path / f"{folder.name}-out") == 0
        assert dtype_of(tmp_path / f"{folder.name}-out") == "float32"
        assert run("verify", tmp_path / f"{folder.name}-out", folder, "--by", "hash") == 0


def test_a_folder_in_another_dtype_still_differs(converted, trained, tmp_path, capsys):
    drawn = write_run(tmp_path / "drawn", converted, init=None)
    assert run("to-hf", drawn, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert run("verify", tmp_path / "out", drawn, "--by", "hash") == 1
    assert "bfloat16 and float32" in capsys.readouterr().out

"""The memory that conversions say they take, counted for the published shapes without their weights, and measured."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from benchmarks.convert import CONVERT, make_checkpoint, measured
from medllm_jax.checkpoint.arrays import CHUNK_BYTES
from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.write_model import finish_model, new_arrays
from medllm_jax.cli.convert import main
from medllm_jax.config.load import load_model_config, to_plain
from medllm_jax.conversion import from_hf, to_hf
from medllm_jax.conversion.from_hf import memory_needed, plan_of
from medllm_jax.conversion.hf_weights import HFFolder
from medllm_jax.conversion.names import tensors_of
from medllm_jax.conversion.run_weights import RunWeights
from medllm_jax.model.quantize import Storage

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GIB = 1 << 30


def source_of(size):
    config = load_model_config(Path("configs/model") / f"qwen2.5-{size}.yaml")
    return HFFolder(epath.Path("absent"), config, BFLOAT16, tensors_of(config), {})


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 16, "tensor": 2}])
@pytest.mark.parametrize("storage", [None, Storage("nf4", True), Storage("int8", False)])
@pytest.mark.parametrize("size", ["7b", "72b"])
def test_importing_takes_less_than_two_gibibytes_whatever_the_size(size, storage, mesh):
    _, tasks = plan_of(source_of(size), storage, mesh)
    assert memory_needed(tasks) < 2 * GIB
    if storage is None:
        assert memory_needed(tasks, is_copied=True) <= 3 * from_hf._COPIERS * CHUNK_BYTES


@pytest.mark.parametrize("storage", [None, Storage("nf4", True), Storage("int8", False)])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)])
def test_exporting_takes_less_than_two_gibibytes_at_72b(tmp_path, monkeypatch, dtype, storage):
    monkeypatch.setattr(to_hf, "_SHARDS", to_hf._MOST_SHARDS)  # as on a machine with more cores
    source = source_of("72b")
    weights, _ = plan_of(source, storage, None)
    new_arrays(tmp_path, weights)  # of which nothing is written
    meta = {"model": to_plain(source.config)} | ({"storage": to_plain(storage)} if storage else {})
    finish_model(tmp_path, weights, meta)
    opened = RunWeights(open_checkpoint(tmp_path))
    needed, with_copies = (to_hf.memory_needed(opened, dtype, may_copy=may_copy) for may_copy in (False, True))
    assert with_copies <= needed < 2 * GIB
    if storage is None and dtype == BFLOAT16:
        assert with_copies <= to_hf._MOST_SHARDS * CHUNK_BYTES


@pytest.mark.slow
def test_weights_of_three_gigabytes_are_converted_in_less_than_two_gibibytes(tmp_path):
    assert make_checkpoint("1.5b", tmp_path / "hf") > 3e9
    for verb, source, target in (("from-hf", "hf", "run"), ("to-hf", "run", "out")):
        assert measured(CONVERT, verb, tmp_path / source, tmp_path / target).peak < 2
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "out"), "--by", "hash"]) == 0

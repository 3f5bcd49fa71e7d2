"""The memory that conversions say they take, counted for the published shapes without their weights."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from medllm_jax import checkpoint
from medllm_jax.model.quantize import Storage
from medllm_jax.settings import load_model_config, to_plain
from tools.convert_hf import to_hf
from tools.convert_hf.from_hf import memory_needed, plan_of
from tools.convert_hf.hf_weights import HFFolder
from tools.convert_hf.names import tensors_of
from tools.convert_hf.run_weights import open_run

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GIB = 1 << 30


def source_of(size):
    config = load_model_config(Path("configs/model") / f"qwen2.5-{size}.yaml")
    return HFFolder(epath.Path("absent"), config, BFLOAT16, tensors_of(config), {})


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 16, "tensor": 2}])
@pytest.mark.parametrize("storage", [None, Storage("nf4", True), Storage("int8", False)])
@pytest.mark.parametrize("size", ["7b", "72b"])
def test_importing_takes_less_than_two_gibibytes_whatever_the_size(size, storage, mesh):
    _, slices = plan_of(source_of(size), storage, mesh)
    assert memory_needed(slices) < 2 * GIB


@pytest.mark.parametrize("storage", [None, Storage("nf4", True)])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)])
def test_exporting_takes_less_than_two_gibibytes_at_72b(tmp_path, dtype, storage):
    source = source_of("72b")
    weights, _ = plan_of(source, storage, None)
    checkpoint.new_arrays(tmp_path, weights)  # of which nothing is written
    meta = {"model": to_plain(source.config)} | ({"storage": to_plain(storage)} if storage else {})
    checkpoint.finish_model(tmp_path, weights, meta)
    needed = to_hf.memory_needed(open_run(str(tmp_path)), dtype)
    assert needed < 2 * GIB

from pathlib import Path

import numpy as np
import pytest

from medllm_jax.conversion.finite import non_finite
from tests.conversion.hf_folders import Q_PROJ, assert_same_tensors, rewrite, run
from tests.tiny_hf import DTYPES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_no_numbers_are_counted(dtype):
    values = np.random.default_rng(0).standard_normal((3, 700_001)).astype(DTYPES[dtype])
    assert non_finite(values) == (0, 0)
    values[0, :5], values[2, -3:], values[1, 7] = np.nan, np.inf, -np.inf
    assert non_finite(values) == (5, 4)
    assert non_finite(values[:, ::2]) == (3, 2)


def odd_weights(folder: Path) -> None:
    rewrite(lambda w: (w[Q_PROJ].__setitem__((0, slice(3)), np.nan), w[NORM].__setitem__(0, -np.inf)))(folder)


NORM = "model.norm.weight"


def test_weights_that_are_no_numbers_pass_only_if_asked_for(broken, tmp_path, capsys):
    odd_weights(broken)
    said = f"in 2 tensors: {Q_PROJ} (3 NaN), {NORM} (1 infinite); --allow-non-finite takes them as they are\n"
    assert run("from-hf", broken, tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert run("from-hf", broken, tmp_path / "run", "--resume") == 2  # what was odd is looked at again
    assert said in capsys.readouterr().err
    assert run("from-hf", broken, tmp_path / "run", "--resume", "--allow-non-finite") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert run("to-hf", tmp_path / "run", tmp_path / "out", "--resume", "--allow-non-finite") == 0
    assert_same_tensors(broken, tmp_path / "out")


def test_what_float16_cannot_hold_is_counted(broken, tmp_path, capsys):
    rewrite(lambda w: w[Q_PROJ].__setitem__((0, slice(2)), 7e4))(broken)
    assert run("from-hf", broken, tmp_path / "run") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out", "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert f"in 1 tensors: {Q_PROJ} (2 infinite); float16 can't hold all of bfloat16: give another --dtype" in error
    assert error.count("\n") == 1

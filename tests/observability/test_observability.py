"""What else a run can write: traces, and Weights & Biases; and what a bucket gets of metrics."""

import dataclasses
import json
import re
import sys
import types

import pytest

from medllm_jax.config.schema import LoggingConfig
from medllm_jax.distributed.chips import CHIPS, peak_flops
from medllm_jax.errors import UserError
from medllm_jax.terminal.version import install_line
from medllm_jax.training.loop import train
from tests.training.test_train import config_of


def test_a_trace_of_some_steps(world, tmp_path, metrics_of):
    config = dataclasses.replace(config_of(world, tmp_path / "run"), profile="steps=3:4")
    train(config)
    files = [path.name for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file()]
    assert any(name.endswith(".xplane.pb") for name in files), files
    assert list(metrics_of(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("wrong", ["steps=4:3", "steps=0:3", "3", "steps=a:b", ""])
def test_steps_that_are_none_are_refused(world, tmp_path, wrong):
    with pytest.raises(UserError, match="steps=FIRST:LAST is expected"):
        dataclasses.replace(config_of(world, tmp_path), profile=wrong)


def test_wandb_gets_every_step_and_goes_on(world, tmp_path, monkeypatch):
    """Its own client writes to a folder, and asks no server."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda self, row, step: [logged.append((step, row)), log(self, row, step=step)][1],
    )
    config = dataclasses.replace(config_of(world, tmp_path / "run", steps=4), logging=LoggingConfig(2, wandb="tests"))
    train(config)
    assert [step for step, _ in logged] == [1, 2, 3, 4] and {"loss", "grad_norm", "goodput"} <= set(logged[0][1])
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_without_wandb_its_setting_says_what_to_install(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(config_of(world, tmp_path / "run"), logging=LoggingConfig(2, wandb="tests"))
    with pytest.raises(UserError, match=re.escape(install_line("wandb"))):
        train(config)


def test_a_wandb_run_has_one_name_in_all_sessions(world, tmp_path, monkeypatch):
    inits = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **how: [inits.append(how), run][1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        train(dataclasses.replace(config_of(world, tmp_path / "run"), logging=LoggingConfig(2, wandb="tests")))
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert json.dumps(inits[0]["config"]) and inits[0]["project"] == "tests"


def test_peaks_are_those_that_plans_use():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == CHIPS["v5p"].flops
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_mfu_is_the_share_of_the_peak(world, tmp_path, monkeypatch, metrics_of):
    from medllm_jax.distributed.flops import train_flops
    from medllm_jax.observability import progress
    from tests.world import SEQUENCE_LENGTH, tiny_config

    monkeypatch.setattr(progress, "peak_flops", lambda kind: 1e9)
    train(config_of(world, tmp_path / "run", steps=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    flops = train_flops(tiny_config(), 8, SEQUENCE_LENGTH)
    assert "mfu" not in lines[0]
    assert lines[2]["mfu"] == pytest.approx(flops / lines[2]["step_seconds"] / (8 * 1e9))

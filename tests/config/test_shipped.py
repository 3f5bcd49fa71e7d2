"""Shipped configs are found by their names from any folder; a path works as it always did."""

import pytest

from medllm_jax.cli import main
from medllm_jax.config.load import load_model_config, load_run_config
from medllm_jax.config.shipped import CONFIGS, find_config, shipped_configs
from medllm_jax.errors import UserError
from medllm_jax.recipes.rounds import load_rounds_config


def test_a_name_is_the_shipped_file_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_run_config("cpt-72b-v5p-4x4x4")
    assert config == load_run_config(CONFIGS / "runs" / "cpt-72b-v5p-4x4x4.yaml")
    assert config.model == load_model_config("qwen2.5-72b")
    assert load_rounds_config("rpo-tiny").train == str(CONFIGS / "runs" / "rpo-tiny.yaml")


@pytest.mark.parametrize("kind", ["runs", "model", "rounds"])
def test_every_kind_has_its_files(kind):
    assert set(shipped_configs(kind).values()) == set((CONFIGS / kind).glob("*.yaml")) != set()


def test_a_file_that_is_there_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpt-tiny").mkdir()
    assert find_config("cpt-tiny", "runs").parent == CONFIGS / "runs", "a folder is no config"
    (tmp_path / "cpt-tiny").rmdir()
    (tmp_path / "cpt-tiny").write_text("run: x\nsteps: 1\ndata: {store: a}\ninit: {checkpoint: b}\n")
    assert load_run_config("cpt-tiny").run == "x"


def test_models_by_name_inside_a_config_and_as_an_override(tmp_path):
    (tmp_path / "run.yaml").write_text("run: x\nsteps: 1\ndata: {store: a}\nmodel: qwen2.5-7b\n")
    assert load_run_config(tmp_path / "run.yaml").model == load_model_config("qwen2.5-7b")
    changed = load_run_config(tmp_path / "run.yaml", ["--model", "qwen2.5-0.5b"])
    assert changed.model == load_model_config("qwen2.5-0.5b")


def test_rounds_may_train_by_a_shipped_config(tmp_path):
    (tmp_path / "rounds.yaml").write_text("folder: x\nstart: y\ntrain: rpo-tiny\nquestions: q\nheld_out: h\n")
    assert load_rounds_config(str(tmp_path / "rounds.yaml")).train == str(CONFIGS / "runs" / "rpo-tiny.yaml")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cpt-tinny", "no shipped config has that name: did you mean cpt-tiny"),
        (
            "xyzzy",
            "no shipped config has that name: there are cpt-7b-v5p-2x2x1, cpt-32b-v5p-2x4x4, ",
        ),
        ("configs/runs/cpt-tiny.yaml", "does not exist; shipped configs are given by name: cpt-tiny"),
        ("none.yaml", "config file none.yaml does not exist"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_near_ones(name, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_run_config(name)
    assert line in str(caught.value)
    assert main(["train", "--config", name]) == 2
    assert line in (error := capsys.readouterr().err) and error.count("\n") == 1

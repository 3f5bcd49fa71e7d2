"""Configs from YAML and overrides: types, unknown keys, duplicates, numbers."""

import dataclasses

import pytest

from medllm_jax.config.load import (
    build,
    describe,
    load_model_config,
    load_run_config,
    read_yaml,
    run_config_with_origins,
    to_plain,
    to_yaml,
)
from medllm_jax.config.schema import ModelConfig, RunConfig
from medllm_jax.config.schema_reader import dotted_keys
from medllm_jax.errors import UserError

MODEL = """vocab_size: 100
hidden_size: 8
intermediate_size: 8
num_hidden_layers: 2
num_attention_heads: 2
num_key_value_heads: 1
"""
RUN = """run: somewhere
steps: 5
model: model.yaml
data: {store: a}
optimizer: {learning_rate: 1e-5, weight_decay: 0}
"""


@pytest.fixture
def run_file(tmp_path):
    (tmp_path / "model.yaml").write_text(MODEL)
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


def test_reads_what_is_written(run_file):
    config = load_run_config(run_file)
    assert config.model == load_model_config(run_file.with_name("model.yaml"))
    assert config.optimizer.learning_rate == 1e-5 and type(config.optimizer.weight_decay) is float
    assert build(RunConfig, to_plain(config), "here") == config


def test_yaml_of_a_config_reads_back(run_file, tmp_path):
    config = load_run_config(run_file, ["--optimizer.learning_rate", "7e-7"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", ".1e-4", "0.00001", "+1e-05"])
def test_every_spelling_of_a_number_is_a_number(run_file, text):
    run_file.write_text(RUN.replace("1e-5", text))
    assert load_run_config(run_file).optimizer.learning_rate == pytest.approx(1e-5)
    assert load_run_config(run_file, ["--optimizer.learning_rate", text]).optimizer.learning_rate == pytest.approx(1e-5)


def test_overrides_win_in_both_forms(run_file):
    config = load_run_config(run_file, ["--steps=7", "--model.head_dim", "6", "--optimizer.schedule", "linear"])
    assert (config.steps, config.model.dim_of_head, config.optimizer.schedule) == (7, 6, "linear")


def test_a_model_file_as_an_override(run_file, tmp_path, monkeypatch):
    (tmp_path / "other.yaml").write_text(MODEL.replace("hidden_size: 8", "hidden_size: 16", 1))
    monkeypatch.chdir(tmp_path)
    assert load_run_config(run_file, ["--model", "other.yaml"]).model.hidden_size == 16


@pytest.mark.parametrize("text", ["a", "[a, b]", "[a]", "gs://bucket/a b", "'[a, b]'", "'null'"])
def test_a_store_or_a_list_of_stores(run_file, tmp_path, text):
    by_file = RUN.replace("{store: a}", f"{{store: {text}}}" if "gs" not in text else "{store: 'gs://bucket/a b'}")
    run_file.write_text(by_file)
    config = load_run_config(run_file)
    stores = {"a": ("a",), "[a, b]": ("a", "b"), "[a]": ("a",)}
    assert config.data.stores == stores.get(text, (text.strip("'"),))
    assert load_run_config(run_file, ["--data.store", text]) == config
    assert build(RunConfig, to_plain(config), "here") == config
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "again.yaml") == config


def test_a_mix_and_one_weight_of_it(run_file, tmp_path):
    run_file.write_text(RUN.replace("{store: a}", "{store: a, mix: {papers: 3, ノート: 0.5}}"))
    config = load_run_config(run_file)
    assert config.data.mix == {"papers": 3.0, "ノート": 0.5}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "again.yaml") == build(RunConfig, to_plain(config), "here") == config
    assert load_run_config(run_file, ["--data.mix.papers", "1e-3"]).data.mix == {"papers": 0.001, "ノート": 0.5}
    assert load_run_config(run_file, ["--data.mix", "{papers: 1}"]).data.mix == {"papers": 1.0}
    assert load_run_config(run_file, ["--data.mix", "null"]).data.mix is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--data.store", "[a, 5]"], "data.store: expected text or a list of text, got ['a', 5]"),
        (["--data.store", "{a: b}"], "data.store: expected text or a list of text, got {'a': 'b'}"),
        (["--data.store", "null"], "data.store: expected text or a list of text, got null"),
        (["--run", "[a]"], "run: expected text, got ['a']"),
        (["--data.store", "[]"], "data.store is an empty list: name at least one store"),
        (["--data.mix", "a"], "data.mix: expected a mapping of text to a number or null, got 'a'"),
        (["--data.mix.a", "much"], "data.mix: expected a mapping of text to a number or null, got {'a': 'much'}"),
        (["--data.mix", "{2024: 1}"], "data.mix: a name in it is not text; write it in quotes"),
        (
            ["--optimizer.learnign_rate", "1"],
            "unknown key optimizer.learnign_rate: did you mean optimizer.learning_rate?",
        ),
        (
            ["--optimizer.state_dtype", "bfloat16", "--optimizer.b2", "0.999"],
            "optimizer.state_dtype is bfloat16 and optimizer.b2 is 0.999",
        ),
        (["--optmizer.b1", "1"], "unknown key optmizer: did you mean optimizer?"),
        (["--qqqq", "1"], "unknown key qqqq: known keys: run, data, steps"),
        (["--steps", "x"], "steps: expected a whole number or null, got 'x'"),
        (["--steps", "5.5"], "steps: expected a whole number or null, got 5.5"),
        (["--steps", "true"], "steps: expected a whole number or null, got True"),
        (["--steps", "'5'"], "steps: expected a whole number or null, got '5'"),
        (["--optimizer.b1", "true"], "optimizer.b1: expected a number, got True"),
        (["--optimizer.b1", ".nan"], "optimizer.b1: expected a number, got nan"),
        (["--distributed", "1"], "distributed: expected true or false, got 1"),
        (["--seed", "2026-13-45"], "seed: expected a whole number, got '2026-13-45'"),
        (["--data", "{}"], "data.store is not set: it has no default"),
        (["--adapter", "{projections: [z]}"], "adapter.projections: expected a list of one of q_proj, k_proj"),
        (["--run", "5"], "run: expected text, got 5"),
        (["--objective.name", "dpo"], "objective.name: expected one of cpt, sft, rpo, got 'dpo'"),
        (["--data", "5"], "data: a mapping is expected, got 5"),
        (["--model.head_dim", "x"], "model.head_dim: expected a whole number or null, got 'x'"),
        (["--steps", "0"], "steps is 0: it must be at least 1 and at most 1,000,000,000"),
        (["--data.accumulate", "3"], "data.batch_size 8 is not a multiple of data.accumulate 3"),
        (["--data.prefetch", "1"], "data.prefetch 1 is less than data.threads 4"),
        (["--mesh.fsdp", "-1", "--mesh.data", "-1"], "at most one is -1"),
        (["--model.num_key_value_heads", "3"], "num_attention_heads 2 is not a multiple of"),
        (["--objective.beta", "0"], "objective.beta is 0.0: it must be at least 1e-06 and at most 1,000"),
        (["--objective.vocab_chunks", "3"], "objective.vocab_chunks 3 does not divide the vocabulary of 100"),
        (["--model", "null"], "neither model nor init.checkpoint is set"),
        (["stray"], "unexpected argument 'stray'"),
        (["--steps"], "--steps has no value"),
    ],
)
def test_mistakes_are_one_clear_line(run_file, overrides, line):
    with pytest.raises(UserError) as caught:
        load_run_config(run_file, overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 5\nrun: x\nsteps: 6\n", ":3: the key 'steps' stands twice"),
        ("data: {store: a, store: b}\n", "the key 'store' stands twice"),
        ("- a\n- b\n", "a mapping of settings is expected, found list"),
        ("steps: [1\n", "expected"),
        ("run: x\nsteps: 5\n", "data is not set"),
        ("", "a mapping of settings is expected, found NoneType"),
    ],
)
def test_broken_files_name_the_place(tmp_path, text, line):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run_config(file)
    assert line in str(caught.value) and str(file) in str(caught.value)


def test_missing_file_and_missing_model_file(tmp_path, run_file):
    with pytest.raises(UserError, match="does not exist"):
        read_yaml(str(tmp_path / "none.yaml"))
    run_file.with_name("model.yaml").unlink()
    with pytest.raises(UserError, match=r"model\.yaml does not exist"):
        load_run_config(run_file)


def test_not_utf8(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"run: \xff\n")
    with pytest.raises(UserError, match="not UTF-8 text at byte 5"):
        load_run_config(tmp_path / "run.yaml")


def test_yaml_can_not_make_objects(tmp_path):
    (tmp_path / "run.yaml").write_text("run: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match=r"the tag .* is not read here"):
        load_run_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("key", ["limit", "max_skipped"])
def test_an_older_name_of_a_setting_means_the_same(run_file, key):
    run_file.write_text(RUN + f"guard: {{{key}: 3}}\n")
    assert load_run_config(run_file).guard.max_skipped == 3
    assert load_run_config(run_file, ["--guard.limit", "4"]).guard.max_skipped == 4
    assert load_run_config(run_file, ["--guard.max_skipped", "4"]).guard.max_skipped == 4
    assert load_run_config(run_file, ["--guard", "{limit: 5}"]).guard.max_skipped == 5
    assert build(RunConfig, to_plain(load_run_config(run_file)), "here").guard.max_skipped == 3


def test_both_names_of_a_setting_are_one_too_many(run_file):
    with pytest.raises(UserError, match=r"guard\.limit is the older name of guard\.max_skipped: keep one"):
        load_run_config(run_file, ["--guard", "{limit: 5, max_skipped: 5}"])


def test_every_field_is_described():
    lines = describe().splitlines()
    keys = [line.strip().split(":")[0] for line in lines[::2]]
    names = {field.name for field in dataclasses.fields(RunConfig)}
    names |= {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)}
    for name in names:
        assert any(key == name or key.startswith(f"{name}.") for key in keys), name
    assert all(line.strip() for line in lines), "a field without a description"


def test_a_printed_config_is_the_config_and_says_where_each_value_came_from(run_file, tmp_path):
    overrides = ["--optimizer.b1", "0.8", "--data.mix.a", "2", "--data.mix.b=1", "--model.rope_theta", "5000"]
    text = run_config_with_origins(run_file, overrides)
    (tmp_path / "printed.yaml").write_text(text)
    assert load_run_config(tmp_path / "printed.yaml") == load_run_config(run_file, overrides)
    origins = {line.split(":")[0].strip(): line.partition("# ")[2] for line in text.splitlines() if "#" in line}
    assert origins["steps"] == origins["weight_decay"] == str(run_file)
    assert origins["hidden_size"] == str(run_file.with_name("model.yaml"))
    assert (origins["b1"], origins["rope_theta"]) == ("--optimizer.b1", "--model.rope_theta")
    assert origins["mix"] == "--data.mix.a, --data.mix.b"
    assert origins["b2"] == origins["head_dim"] == origins["adapter"] == origins["every"] == "default"

    without = run_config_with_origins(run_file, ["--model", "null", "--init.checkpoint", "there"])
    assert "model: null                                       # --model\n" in without
    assert "steps: 100                                        # configs/runs/cpt-tiny.yaml, shipped\n" in (
        run_config_with_origins("cpt-tiny")
    )


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.warmup", "optimizer.warmup_steps"),
        ("data.bs", "data.batch_size"),
        ("per_device_train_batch_size", "data.batch_size"),
        ("train_batch_size", "data.batch_size"),
        ("checkpoint.save_every", "checkpoint.every"),
        ("optimiser.b1", "optimizer"),
        ("objective.betaa", "objective.beta"),
    ],
)
def test_an_unknown_setting_names_the_one_that_was_meant(run_file, unknown, meant):
    with pytest.raises(UserError, match=f"unknown key .*: did you mean {meant}\\?$"):
        load_run_config(run_file, [f"--{unknown}", "1"])


def test_what_is_like_no_setting_lists_those_beside_it(run_file):
    with pytest.raises(UserError, match=r"unknown key optimizer\.banana: known keys: learning_rate, schedule"):
        load_run_config(run_file, ["--optimizer.banana", "1"])


def test_other_programs_names_lead_to_settings_that_exist():
    assert set(RunConfig.NAMES_ELSEWHERE.values()) <= set(dotted_keys(RunConfig))
    assert not set(RunConfig.NAMES_ELSEWHERE) & set(dotted_keys(RunConfig))

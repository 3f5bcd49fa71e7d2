"""What may change when a run is resumed: every setting has its rule."""

import dataclasses

import pytest

from medllm_jax.config.load import load_run_config, to_yaml
from medllm_jax.config.schema import RunConfig
from medllm_jax.config.schema_reader import documented_fields, dotted_keys
from medllm_jax.errors import UserError
from medllm_jax.storage.run_folder import on_resume, open_run, record_config

# Sections stand for all that is in them; every setting that is named neither here nor there is kept unless forced.
FREE = [
    "run",
    "mesh",
    "checkpoint",
    "logging",
    "data.store",
    "data.accumulate",
    "data.epochs",  # the steps that they come to have a rule of their own
    "data.threads",
    "data.prefetch",
    "distributed",
    "guard.action",
    "guard.max_skipped",
    "watchdog",
    "profile",
    "held_out",
    "init.checkpoint",
    "objective.vocab_chunks",
    "attention",
    "remat",
]
FIXED = ["model", "adapter", "precision.params", "optimizer.state_dtype", "objective.name", "data.batch_size"]
CONFIG = load_run_config("cpt-tiny")
CONSTANT = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, schedule="constant"))


def in_one_of(key, names):
    return any(key == name or key.startswith(f"{name}.") for name in names)


def test_every_setting_has_its_rule():
    rules = {"free", "fixed", "free if the schedule is constant"}
    assert {f.metadata.get("resume", "free") for _, f, _ in documented_fields(RunConfig)} <= rules
    keys = [key for key, _, _ in documented_fields(RunConfig)]
    assert all(in_one_of(name, dotted_keys(RunConfig)) for name in FREE + FIXED)
    for key in [*keys, "held_out", "adapter", "data.mix.papers"]:
        expected = "free" if in_one_of(key, FREE) else "fixed" if in_one_of(key, FIXED) else "kept unless forced"
        assert on_resume(key, CONFIG) == expected, key
        assert on_resume(key, CONSTANT) == ("free" if key == "steps" else expected), key


def changed(config, key, value):
    first, _, rest = key.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("steps", 7, "kept"),
        ("seed", 1, "kept"),
        ("data.mix", {"papers": 1.0}, "kept"),
        ("checkpoint.every", 7, "free"),
        ("guard.max_skipped", 3, "free"),
        ("data.batch_size", 16, "fixed"),
        ("model.hidden_size", 128, "fixed"),
    ],
)
def test_a_run_is_resumed_by_these_rules(tmp_path, key, value, rule):
    before = changed(CONFIG, "run", str(tmp_path / "run"))
    now = changed(before, key, value)
    folder, _ = open_run(before)
    record_config(folder, before)
    assert open_run(before) == open_run(now) == (folder, {}), "it has no checkpoint yet, and so is a new run"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    assert open_run(before) == (folder, {})
    if rule == "free":
        assert open_run(now) == (folder, {})
        return
    with pytest.raises(UserError, match=f"{key}.* was ") as caught:
        open_run(now)
    assert str(caught.value).endswith(", or give --force") == (rule == "kept")
    if rule == "kept":
        assert all(name.startswith(key) for name in open_run(now, force=True)[1])
    else:
        with pytest.raises(UserError, match=key):
            open_run(now, force=True)


def test_a_recorded_run_with_older_names_goes_on(tmp_path):
    config = changed(changed(CONFIG, "run", str(tmp_path)), "guard.max_skipped", 4)
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("max_skipped: 4", "limit: 4"))
    assert open_run(config) == (tmp_path, {})

"""Steps whose numbers are not finite, or spike, change nothing, are written down, and end the run if they are many."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.schema import GuardConfig
from medllm_jax.data.loader import BatchStream
from medllm_jax.data.rows import Rows
from medllm_jax.errors import RunError, UserError
from medllm_jax.reliability.bad_steps import BadStepGuard
from medllm_jax.training import loop as train_module
from medllm_jax.training.loop import train
from tests.training.test_train import assert_equal_bits, config_of, params_of


@pytest.fixture
def poison(monkeypatch):
    """Makes the losses of some steps NaN, as a broken chip might."""

    def at(*bad):
        put, made = train_module.put_batch, []

        def put_batch(batch, mesh):
            made.append(None)
            if len(made) in bad:
                weights = batch.arrays.loss_weights * np.float32("nan")
                batch = dataclasses.replace(batch, arrays=batch.arrays._replace(loss_weights=weights))
            return put(batch, mesh)

        monkeypatch.setattr(train_module, "put_batch", put_batch)

    return at


def test_a_run_stops_and_goes_on_as_if_nothing_had_been(world, tmp_path, poison, monkeypatch, metrics_of):
    config = config_of(world, tmp_path / "run")
    with monkeypatch.context():
        poison(4)
        with pytest.raises(RunError, match=r"loss nan and gradient norm nan: not finite numbers \(step 4; rows"):
            train(config)
        monkeypatch.undo()
    assert steps(tmp_path / "run") == [2], "nothing is saved after a step that was bad"
    (report,) = (tmp_path / "run" / "crashes").iterdir()
    assert json.loads(report.read_text())["error"] == "RunError"
    (line,) = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    with BatchStream(Rows.open(config.data.stores), config.data.batch_size, config.seed, position=3) as stream:
        row_ids = next(stream).row_ids
    assert line["rows"] == row_ids.tolist() and (line["step"], line["loss"]) == (4, "nan")
    train(config)
    train(config_of(world, tmp_path / "undisturbed"))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
    assert_equal_bits(params_of(tmp_path / "run"), params_of(tmp_path / "undisturbed"))


def test_a_run_goes_on_without_bad_steps_up_to_a_limit(world, tmp_path, poison, metrics_of):
    config = dataclasses.replace(config_of(world, tmp_path / "run"), guard=GuardConfig("skip", max_skipped=2))
    poison(2, 5)
    train(config)
    found = metrics_of(tmp_path / "run")
    assert [step for step, row in found.items() if row["skipped"]] == [2, 5]
    rates = [row["learning_rate"] for row in found.values()]
    assert rates[1] == rates[2] and rates[4] == rates[5] and len(set(rates)) == 4, "the schedule waits for them"
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_of(tmp_path / "run")))
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 2

    poison(2, 5)
    with pytest.raises(RunError, match=r"2 steps were skipped, guard\.max_skipped is 1"):
        train(dataclasses.replace(config, run=str(tmp_path / "other"), guard=GuardConfig("skip", max_skipped=1)))


def test_a_spike_changes_nothing(world, tmp_path, metrics_of):
    config = config_of(world, tmp_path / "plain", steps=2)
    train(config)
    norms = [row["grad_norm"] for row in metrics_of(tmp_path / "plain").values()]
    guard = GuardConfig("skip", grad_norm=min(norms) * 0.99)
    train(dataclasses.replace(config, run=str(tmp_path / "run"), guard=guard))
    assert [row["skipped"] for row in metrics_of(tmp_path / "run").values()] == [1, 1]
    assert_equal_bits(params_of(tmp_path / "run"), params_of(world.model))
    with pytest.raises(RunError, match=r"the gradient's norm .* is above guard\.grad_norm"):
        train(dataclasses.replace(config, run=str(tmp_path / "other"), guard=GuardConfig(grad_norm=1e-9)))
    with pytest.raises(RunError, match=r"the loss .* is above guard\.loss 0\.01"):
        train(dataclasses.replace(config, run=str(tmp_path / "third"), guard=GuardConfig(loss=0.01)))


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_state_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, action):
    guard = BadStepGuard(GuardConfig(action), 0, epath.Path(tmp_path))
    with pytest.raises(RunError, match="step 3 made parameters or moments that are not finite"):
        guard.check([{"step": 3, "loss": 1.0, "grad_norm": 1.0, "skipped": 1.0}], {3: np.arange(2)})
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (line["step"], line["cause"], line["rows"]) == (3, "the update is not finite", [0, 1])


@pytest.mark.parametrize("wrong", [{"max_skipped": 0}, {"grad_norm": -1.0}, {"loss": -1.0}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(UserError, match="must"):
        GuardConfig(**wrong)

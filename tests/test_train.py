"""Runs: resumed equals uninterrupted, bit for bit; RPO starts at its reference; what can't go on says so."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from medllm_jax import train as train_module
from medllm_jax.checkpoint import abstract_params, load_meta, load_params
from medllm_jax.config import (
    CheckpointConfig,
    DataConfig,
    InitConfig,
    LoggingConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)
from medllm_jax.errors import UserError
from medllm_jax.loading import blueprint
from medllm_jax.reference import cache_reference
from medllm_jax.settings import to_yaml
from medllm_jax.sharding import make_mesh
from medllm_jax.train import train


def config_of(world, run, kind="cpt", *, steps=6, every=2, accumulate=1, store=None, **changes):
    default_store = world.token_store if kind == "cpt" else world.pair_store
    return RunConfig(
        run=str(run),
        steps=steps,
        data=DataConfig(store=str(store or default_store), batch_size=8, accumulate=accumulate),
        **({"init": InitConfig(str(world.model)), "precision": PrecisionConfig(compute="float32")} | changes),
        objective=ObjectiveConfig(name=kind),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=every, keep=2),
        logging=LoggingConfig(every=3),
    )


def params_of(run):
    from medllm_jax.checkpoint import load_model_config

    plan = blueprint(load_model_config(run), PrecisionConfig(), make_mesh(MeshConfig()))
    return jax.device_get(load_params(run, plan.abstract))


def assert_equal_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Uninterrupted runs of both kinds."""
    root = tmp_path_factory.mktemp("finished")
    cache_reference(config_of(world, root / "rpo", "rpo"))
    for kind in ("cpt", "rpo"):
        train(config_of(world, root / kind, kind))
    return root


class KilledError(Exception):
    pass


def break_at(monkeypatch, step):
    """The loop dies right before it would make a step."""
    original = train_module.Progress.add

    def add(self, number, metrics):
        if number == step:
            raise KilledError
        original(self, number, metrics)

    monkeypatch.setattr(train_module.Progress, "add", add)


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_equals_uninterrupted(world, finished, tmp_path, monkeypatch, metrics_of, kind, step):
    config = config_of(world, tmp_path / "run", kind)
    with monkeypatch.context() as patch:
        break_at(patch, step)
        with pytest.raises(KilledError):
            train(config)
    train(config)
    assert metrics_of(tmp_path / "run") == metrics_of(finished / kind)
    assert list(metrics_of(tmp_path / "run")) == list(range(1, 7))
    assert_equal_bits(params_of(tmp_path / "run"), params_of(finished / kind))


@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_bfloat16_stays_close(world, finished, tmp_path, metrics_of, params):
    """The losses are float32 whatever the products are; weights in bfloat16 learn, more coarsely."""
    config = config_of(world, tmp_path / "run", precision=PrecisionConfig(params=params, compute="bfloat16"))
    train(config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(abstract_params(tmp_path / "run"))} == {params}
    for step, row in metrics_of(tmp_path / "run").items():
        assert row["loss"] == pytest.approx(metrics_of(finished / "cpt")[step]["loss"], abs=0.05)


def test_a_finished_run_is_left_as_it_is(world, finished, metrics_of):
    before = metrics_of(finished / "cpt")
    train(config_of(world, finished / "cpt"))
    assert metrics_of(finished / "cpt") == before
    assert load_meta(finished / "cpt")["position"] == 6


def test_goes_on_on_another_mesh_and_in_micro_batches(world, finished, tmp_path, monkeypatch, metrics_of):
    config = config_of(world, tmp_path / "run")
    with monkeypatch.context() as patch:
        break_at(patch, 4)
        with pytest.raises(KilledError):
            train(config)
    train(config_of(world, tmp_path / "run", accumulate=2, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    expected = metrics_of(finished / "cpt")
    for step, row in metrics_of(tmp_path / "run").items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], abs=1e-5)


def test_killed_process_goes_on(world, finished, tmp_path, metrics_of):
    """SIGKILL at an arbitrary moment, then the same command again."""
    config = config_of(world, tmp_path / "run", steps=6, every=1)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "medllm_jax.cli", "train", "--config", str(file)]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(config)
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "cpt")
    assert_equal_bits(params_of(tmp_path / "run"), params_of(finished / "cpt"))


def test_restored_weights_come_back_split(finished):
    from medllm_jax.checkpoint import load_model_config

    plan = blueprint(load_model_config(finished / "cpt"), PrecisionConfig(), make_mesh(MeshConfig()))
    large = [leaf for leaf in jax.tree.leaves(load_params(finished / "cpt", plan.abstract)) if leaf.size > 1000]
    assert len(large) == 8
    for leaf in large:
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards), leaf.sharding


def test_an_unfinished_checkpoint_does_not_count(finished, tmp_path):
    """Where nothing can be renamed, as in a bucket, only the marker says that a checkpoint is whole."""
    import shutil

    from medllm_jax.checkpoint import latest_step, steps

    copy = shutil.copytree(finished / "cpt", tmp_path / "copy")
    assert steps(copy) == [4, 6]
    (copy / "checkpoints" / "6" / "commit_success.txt").unlink()
    assert latest_step(copy) == 4


def test_rpo_starts_at_its_reference(finished, metrics_of):
    """The reference is the model that RPO starts from: at first, both rewards are zero and the DPO term is log 2."""
    first = metrics_of(finished / "rpo")[1]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(first["dpo"] + first["nll"], abs=1e-5)


def test_rpo_logs_what_users_expect_and_learns(finished, metrics_of):
    rows = metrics_of(finished / "rpo")
    expected = {
        "step",
        "loss",
        "dpo",
        "nll",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "tokens",
        "pairs",
    }
    expected |= {"rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm", "entropy", "learning_rate"}
    assert expected == set(rows[1])
    assert rows[6]["rewards/margins"] > 0 and rows[6]["loss"] < rows[1]["loss"]


def test_rpo_without_its_reference_says_what_to_run(world, finished, tmp_path):
    """The CPT run's model has other weights than the one whose log-probabilities are stored."""
    config = config_of(world, tmp_path / "run", "rpo", init=InitConfig(str(finished / "cpt")))
    with pytest.raises(UserError, match="medllm reference"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_tokenizer_travels_with_the_run(finished):
    assert (finished / "rpo" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"steps": 7}, "steps was 6 and is now 7"),
        ({"kind": "rpo"}, "objective.name was 'cpt' and is now 'rpo'"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(world, finished, change, line):
    with pytest.raises(UserError, match=line):
        train(config_of(world, finished / "cpt", **change))


def test_a_folder_that_is_no_run_is_refused(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train(config_of(world, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_rows_than_the_run_began_with_are_refused(world, finished, tmp_path):
    from medllm_jax.data.corpus import prepare_corpus

    (tmp_path / "other.txt").write_text("other text, other rows")
    prepare_corpus([str(tmp_path / "other.txt")], world.tokenizer, tmp_path / "store", 64)
    with pytest.raises(UserError, match="trained on other rows"):
        train(config_of(world, finished / "cpt", store=tmp_path / "store"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mesh": MeshConfig(data=3, fsdp=1)}, "does not divide 8 devices"),
        ({"accumulate": 2}, "micro-batch of 4 rows does not divide"),
        ({"kind": "rpo", "store": "token_store"}, "holds cpt rows, the run needs pairs"),
        ({"store": "missing"}, "no store at"),
        ({"init": InitConfig("nowhere")}, "nowhere holds no checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(world, tmp_path, change, line):
    if "store" in change:
        change = change | {"store": getattr(world, change["store"], tmp_path / change["store"])}
    with pytest.raises(UserError, match=line) as caught:
        train(config_of(world, tmp_path / "run", **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_token_beyond_the_vocabulary_is_refused(world, tmp_path):
    from tests.world import tiny_config

    config = config_of(world, tmp_path / "run", init=InitConfig(), model=tiny_config(vocab_size=64))
    with pytest.raises(UserError, match="beyond the model's vocabulary of 64"):
        train(config)


def test_a_mesh_that_does_not_divide_a_dimension_is_refused(world, tmp_path):
    from tests.world import tiny_config

    narrow = tiny_config(num_key_value_heads=2)
    config = config_of(world, tmp_path / "run", init=InitConfig(), model=narrow, mesh=MeshConfig(1, 2, 4))
    with pytest.raises(UserError, match=r"num_key_value_heads 2 does not divide by mesh\.tensor 4"):
        train(config)


def test_a_model_other_than_the_checkpoints_is_refused(world, tmp_path):
    from tests.world import tiny_config

    with pytest.raises(UserError, match=r"model\.hidden_size is 128 in the config and 64 in"):
        train(config_of(world, tmp_path / "run", model=tiny_config(hidden_size=128)))

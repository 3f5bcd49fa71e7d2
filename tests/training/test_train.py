"""Runs: resumed equals uninterrupted, bit for bit; RPO starts at its reference; what can't go on says so."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.config.load import to_yaml
from medllm_jax.config.schema import (
    CheckpointConfig,
    DataConfig,
    HeldOutConfig,
    InitConfig,
    LoggingConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)
from medllm_jax.data.loader import in_order
from medllm_jax.data.prepare.instructions import prepare_instructions
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.data.reference_log_probs import no_references
from medllm_jax.data.rows import Rows
from medllm_jax.data.store import RowStore
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import abstract_model, random_params
from medllm_jax.observability.progress import Progress
from medllm_jax.storage.run_folder import recorded_config
from medllm_jax.training.loop import train
from medllm_jax.training.losses import objective
from medllm_jax.training.programs import train_program
from medllm_jax.training.reference import cache_reference
from medllm_jax.training.resolve import count_steps, resolve
from medllm_jax.training.step import summed_gradients
from tests.tiny import write_json_lines
from tests.world import SEQUENCE_LENGTH, tiny_config


def config_of(world, run, kind="cpt", *, steps=6, every=2, accumulate=1, store=None, mix=None, **changes):
    default_store = world.token_store if kind == "cpt" else world.pair_store
    return RunConfig(
        run=str(run),
        steps=steps,
        data=DataConfig(store=store or str(default_store), mix=mix, batch_size=8, accumulate=accumulate),
        **({"init": InitConfig(str(world.model)), "precision": PrecisionConfig(compute="float32")} | changes),
        objective=ObjectiveConfig(name=kind),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every=every, keep=2),
        logging=LoggingConfig(every=3),
    )


def params_of(run):
    checkpoint = open_checkpoint(run)
    plan = abstract_model(checkpoint.model, PrecisionConfig(), make_mesh(MeshConfig()))
    return jax.device_get(checkpoint.load_params(plan.abstract))


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
    original = Progress.add

    def add(self, number, *rest):
        if number == step:
            raise KilledError
        original(self, number, *rest)

    monkeypatch.setattr(Progress, "add", add)


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


HALVES = {"first": slice(0, None, 2), "second": slice(1, None, 2)}


def parts_of(path, folder, parts):
    """Paths of stores of one corpus each: name -> the rows of another store that it holds."""
    store = RowStore.open(path)
    rows, about = store.read(range(len(store))), store.metadata
    for name, part in parts.items():
        with RowStoreWriter(folder / name, about.kind, about.sequence_length) as writer:
            writer.append(rows[part], name)
            same = {key: getattr(about, key) for key in ("packing", "vocab_size", "tokenizer_fingerprint")}
            writer.finish({name: CorpusFacts(len(rows[part]))}, eos_token_id=about.eos_token_id, **same)
    return tuple(str(folder / name) for name in parts)


def test_a_mix_of_stores_resumed_equals_uninterrupted(world, tmp_path, monkeypatch, metrics_of):
    stores = parts_of(world.token_store, tmp_path / "stores", HALVES)
    mix = {"store": stores, "mix": {"second": 0.75, "first": 0.25}}
    train(config_of(world, tmp_path / "whole", **mix))
    with monkeypatch.context() as patch:
        break_at(patch, 4)
        with pytest.raises(KilledError):
            train(config_of(world, tmp_path / "run", **mix))
    moved = tuple(str(shutil.copytree(store, tmp_path / Path(store).name)) for store in stores)
    train(config_of(world, tmp_path / "run", **mix | {"store": moved}))
    rows = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "run") == rows
    assert_equal_bits(params_of(tmp_path / "run"), params_of(tmp_path / "whole"))
    tokens = np.cumsum([row["tokens"] for row in rows.values()])
    for step, row in rows.items():
        assert (row["rows/first"], row["rows/second"], "epoch" in row) == (2 * step, 6 * step, False)
        assert row["tokens/first"] + row["tokens/second"] == tokens[step - 1]
    for change, line in (
        ({"mix": mix["mix"] | {"first": 1}}, r"data\.mix\.first was 0\.25 and is now 1"),
        ({"mix": None}, r"data\.mix\.first was 0\.25 and is now None"),
        ({"store": stores[::-1]}, "trained on other rows"),
    ):
        with pytest.raises(UserError, match=line):
            train(config_of(world, tmp_path / "run", **mix | change))


def test_metrics_say_what_was_read_and_what_was_waited_for(world, finished):
    rows = RowStore.open(world.token_store)
    (corpus,) = rows.metadata.corpora
    lines = [json.loads(line) for line in (finished / "cpt" / "metrics.jsonl").read_text().splitlines()]
    tokens = np.cumsum([line["tokens"] for line in lines])
    for step, line in enumerate(lines, 1):
        assert line[f"rows/{corpus.name}"] == 8 * step and line["epoch"] == 8 * step / len(rows)
        assert line[f"tokens/{corpus.name}"] == tokens[step - 1]
        assert ("startup_seconds" if step == 1 else "data_wait") in line and 0 <= line.get("data_wait", 0) < 1
        assert 0 <= line["goodput"] < 1 and line["host_memory_gib"] > 0.1


def test_rpo_on_several_stores_starts_at_its_reference(world, tmp_path, metrics_of):
    config = config_of(world, tmp_path / "run", "rpo", steps=2, store=parts_of(world.pair_store, tmp_path, HALVES))
    cache_reference(config)
    train(config)
    first = metrics_of(tmp_path / "run")[1]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize(("params", "moments"), [("float32",) * 2, ("float32", "bfloat16"), ("bfloat16",) * 2])
def test_bfloat16_stays_close(world, finished, tmp_path, metrics_of, params, moments):
    """The losses are float32 whatever the products are; weights and moments in bfloat16 learn, more coarsely."""
    config = config_of(world, tmp_path / "run", precision=PrecisionConfig(params=params, compute="bfloat16"))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, state_dtype=moments))
    train(config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(open_checkpoint(tmp_path / "run").stored_params())} == {params}
    state = train_program(resolve(config), make_mesh(config.mesh)).abstract.opt_state
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"int32", moments}
    for step, row in metrics_of(tmp_path / "run").items():
        assert row["loss"] == pytest.approx(metrics_of(finished / "cpt")[step]["loss"], abs=0.05)


def test_epochs_are_steps(world, finished, tmp_path, monkeypatch, metrics_of):
    """A run of so many epochs is the run of as many steps, resumed too."""
    epochs = 6 * 8 / len(RowStore.open(world.token_store))
    config = config_of(world, tmp_path / "run")
    by_epochs = dataclasses.replace(config, steps=None, data=dataclasses.replace(config.data, epochs=epochs))
    with monkeypatch.context() as patch:
        break_at(patch, 5)
        with pytest.raises(KilledError):
            train(by_epochs)
    train(by_epochs)
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "cpt")
    assert recorded_config(tmp_path / "run").steps == count_steps(by_epochs) == 6
    assert count_steps(dataclasses.replace(by_epochs, steps=4)) == 4
    with pytest.raises(UserError, match="each corpus has epochs of its own"):
        dataclasses.replace(config.data, epochs=1.0, mix={"corpus": 1.0})
    with pytest.raises(UserError, match=r"neither steps nor data\.epochs"):
        dataclasses.replace(config, steps=None)


def test_a_finished_run_is_left_as_it_is(world, finished, metrics_of):
    before = metrics_of(finished / "cpt")
    train(config_of(world, finished / "cpt"))
    assert metrics_of(finished / "cpt") == before
    assert open_checkpoint(finished / "cpt").meta["position"] == 6


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
    checkpoint = open_checkpoint(finished / "cpt")
    plan = abstract_model(checkpoint.model, PrecisionConfig(), make_mesh(MeshConfig()))
    large = [leaf for leaf in jax.tree.leaves(checkpoint.load_params(plan.abstract)) if leaf.size > 1000]
    assert len(large) == 8
    for leaf in large:
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards), leaf.sharding


def test_an_unfinished_checkpoint_does_not_count(finished, tmp_path):
    """Where nothing can be renamed, as in a bucket, only the marker says that a checkpoint is whole."""
    from medllm_jax.checkpoint.orbax import steps

    copy = shutil.copytree(finished / "cpt", tmp_path / "copy")
    assert steps(copy) == [4, 6]
    (copy / "checkpoints" / "6" / "commit_success.txt").unlink()
    assert open_checkpoint(copy).step == 4


def test_rpo_starts_at_its_reference(finished, metrics_of):
    """The reference is the model that RPO starts from: at first, both rewards are zero and the DPO term is log 2."""
    first = metrics_of(finished / "rpo")[1]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(first["dpo"] + first["nll"], abs=1e-5)


def test_rpo_logs_what_users_expect_and_learns(world, finished, metrics_of):
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
    expected |= {"skipped"}
    (name,) = (corpus.name for corpus in RowStore.open(world.pair_store).metadata.corpora)
    expected |= {f"rows/{name}", f"tokens/{name}", "epoch"}
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


@pytest.mark.parametrize("part", [{"corpus": slice(3)}, {"another": slice(None)}])
def test_other_rows_or_corpora_than_the_run_began_with_are_refused(world, finished, tmp_path, part):
    assert [corpus.name for corpus in RowStore.open(world.token_store).metadata.corpora] == ["corpus"]
    (store,) = parts_of(world.token_store, tmp_path, part)
    with pytest.raises(UserError, match="trained on other rows"):
        train(config_of(world, finished / "cpt", store=store))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mesh": MeshConfig(data=3, fsdp=1)}, "does not divide 8 devices"),
        ({"accumulate": 2}, "micro-batch of 4 rows does not divide"),
        ({"kind": "rpo", "store": "token_store"}, "holds cpt rows, the run needs pairs"),
        ({"store": "missing"}, "no store at"),
        ({"mix": {"none": 1}}, "the mix does not fit the rows: no corpus none"),
        ({"init": InitConfig("nowhere")}, "nowhere holds no checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(world, tmp_path, change, line):
    if "store" in change:
        change = change | {"store": str(getattr(world, change["store"], tmp_path / change["store"]))}
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


# --- other objectives, and rows that are not trained on ---------------------------------------------------------------


@pytest.fixture(scope="module")
def instructions(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("instructions")
    rows = [{"prompt": f"Q{n}: fever?", "response": f" Rest for {n} days."} for n in range(20)]
    file = write_json_lines(root / "rows.jsonl", rows)
    prepare_instructions(file, world.tokenizer, root / "store", 2 * SEQUENCE_LENGTH)
    return root / "store"


def test_responses_are_learnt(world, instructions, tmp_path, metrics_of):
    train(config_of(world, tmp_path / "run", "sft", store=str(instructions)))
    found = metrics_of(tmp_path / "run")
    assert found[6]["loss"] < found[1]["loss"] - 0.5
    assert 0 < found[6]["response_tokens"] < found[6]["tokens"]


def test_instructions_mix_with_pairs(world, instructions, tmp_path, metrics_of):
    stores, mix = (str(world.pair_store), str(instructions)), {"pairs": 1, "instructions": 1}
    config = config_of(world, tmp_path / "run", "rpo", store=stores, mix=mix)
    cache_reference(config)
    train(config)
    found = metrics_of(tmp_path / "run")
    assert found[6]["rows/pairs"] == found[6]["rows/instructions"] == 24
    assert found[1]["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[6]["nll"] < found[1]["nll"] and 0 < found[6]["pairs"] < 24
    with pytest.raises(UserError, match="holds no pairs"):
        train(config_of(world, tmp_path / "other", "rpo", store=str(instructions)))


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_held_out_rows_are_measured_as_trained_ones_are(world, tmp_path, metrics_of, kind):
    """With the rows of the run itself, all in one batch: what the step after a measurement finds is what it found."""
    store = world.token_store if kind == "cpt" else world.pair_store
    rows = len(RowStore.open(store))
    config = config_of(world, tmp_path / "run", kind, steps=3, held_out=HeldOutConfig(str(store), every=1))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows * 8))
    if kind == "rpo":
        cache_reference(config)
    train(config)
    found = metrics_of(tmp_path / "run")
    measured = {name.removeprefix("held_out/") for name in found[1] if name.startswith("held_out/")}
    expected = {"loss", "tokens"}
    if kind == "rpo":
        expected |= {"dpo", "nll", "pairs", "entropy", "logps/chosen", "logps/rejected"}
        expected |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert measured == expected
    for step in (1, 2):
        for name in measured:
            times = 8 if name in ("tokens", "pairs") else 1  # a step reads the rows eight times
            assert found[step + 1][name] == pytest.approx(times * found[step][f"held_out/{name}"], abs=2e-4), name


@pytest.mark.parametrize("layout", [{"prompts": "repeated"}, {"pairs_per_row": 1}], ids=["repeated", "one pair a row"])
def test_every_layout_of_pairs_is_the_same_to_learn_from(world, tmp_path, layout):
    """Losses and gradients beside those of packed rows with shared prompts, to 1e-5 of what is largest."""
    results, row_counts = [], []
    mesh, config = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), config_of(world, tmp_path / "run", "rpo")
    model = abstract_model(tiny_config(), PrecisionConfig(compute="float32"), mesh)
    params = random_params(model, seed=0)
    run = functools.partial(summed_gradients, model=model, loss=objective(config.objective), accumulate=1)
    for name, how in (("packed", {}), ("other", layout)):
        prepare_pairs(str(world.pairs), world.tokenizer, tmp_path / name, 2 * SEQUENCE_LENGTH, **how)
        rows = Rows.open([tmp_path / name])
        (batch, real), *_ = in_order(rows, len(rows), reference=no_references(rows))
        gradients, sums = jax.jit(run)(params, batch, jax.random.key(0))
        results.append(jax.device_get((gradients, sums.total, sums.weight, sums.means)))
        row_counts.append(real)
    packed, other = results
    assert row_counts[0] < row_counts[1] and packed[2] == 24
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), other, packed)

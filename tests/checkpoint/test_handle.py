"""A checkpoint is opened once: one listing and one reading of its meta, and one step of everything that comes of it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from medllm_jax.checkpoint import orbax
from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import RemovedError, open_checkpoint
from medllm_jax.checkpoint.load_model import load_model
from medllm_jax.checkpoint.orbax import steps
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.cli import main
from medllm_jax.cli.convert import main as convert
from medllm_jax.config.schema import AdapterConfig, InitConfig, MeshConfig, PrecisionConfig
from medllm_jax.conversion.run_weights import RunWeights
from medllm_jax.conversion.to_hf import to_hf
from medllm_jax.distributed.sharding import make_mesh, parameter_shardings
from medllm_jax.errors import UserError
from medllm_jax.inference import samplers
from medllm_jax.model.abstract import abstract_model
from medllm_jax.training.loop import train
from medllm_jax.training.reference import cache_reference
from tests.tiny import write_json_lines
from tests.tiny_hf import make_hf_folder
from tests.training.test_train import config_of

FLOAT32 = PrecisionConfig(compute="float32")
LORA = AdapterConfig(rank=2, base="float32", projections=("q_proj",))


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    """A run of adapters with checkpoints 2 and 4, on the world's model."""
    run = tmp_path_factory.mktemp("adapters") / "run"
    train(config_of(world, run, steps=4, adapter=LORA))
    return run


@pytest.fixture
def reads(monkeypatch):
    """Counts, by run folder, how often its checkpoints are listed and how often a meta is read."""
    listed, read = Counter(), Counter()
    listdir, load = os.listdir, orbax.ocp.load_checkpointables

    def count_listing(path="."):
        if Path(os.fsdecode(path)).name == "checkpoints":
            listed[str(Path(os.fsdecode(path)).parent.resolve())] += 1
        return listdir(path)

    def count_meta(folder, wanted):
        if "meta" in wanted:
            read[str(Path(folder).parent.parent.resolve())] += 1
        return load(folder, wanted)

    monkeypatch.setattr(os, "listdir", count_listing)
    monkeypatch.setattr(orbax.ocp, "load_checkpointables", count_meta)
    return listed, read


def ask(verb, run, tmp_path, *arguments):
    """A verb that asks a run's model an exam of one question."""
    row = {"id": "q", "question": "?", "choices": ["1", "2"], "answer": "a"}
    exam = write_json_lines(tmp_path / "exam.jsonl", [row])
    assert main([verb, "--run", str(run), "--exam", str(exam), *arguments]) == 0


def sample(run, config, tmp_path):
    more = ("--conditions", "answer_only", "--samples", "2", "--min-characters", "1000000")
    row = {"id": "q", "question": "?", "choices": ["1", "2"], "answer": "a"}
    exam = write_json_lines(tmp_path / "exam.jsonl", [row])
    # Nothing that a random model writes makes a pair: the verb says so, after sampling.
    main(["pairs", "--run", str(run), "--exam", str(exam), "--output", str(tmp_path / "pairs.jsonl"), *more])
    assert (tmp_path / "pairs.samples.jsonl").exists()


USES = {
    "sample": sample,
    "evaluate": lambda run, config, tmp_path: ask("evaluate", run, tmp_path, "--conditions", "answer_only"),
    "likelihood": lambda run, config, tmp_path: ask("likelihood", run, tmp_path),
    "export": lambda run, config, tmp_path: convert(["to-hf", str(run), str(tmp_path / "out")]),
    "export of adapters": lambda run, config, tmp_path: to_hf(str(run), str(tmp_path / "out"), adapter=True),
    "verify": lambda run, config, tmp_path: convert(["verify", str(run), str(tmp_path / "hf"), "--by", "hash"]),
    "score references": lambda run, config, tmp_path: cache_reference(config("rpo")),
    "start a run": lambda run, config, tmp_path: train(config("cpt")),
}


@pytest.mark.parametrize("use", USES)
def test_a_load_lists_once_and_reads_the_meta_once(world, adapters, tmp_path, reads, use):
    listed, read = reads
    run = shutil.copytree(adapters, tmp_path / "run")

    def config(kind):
        return config_of(world, tmp_path / "new", kind, steps=1, adapter=LORA, init=InitConfig(str(run)))

    if use == "verify":
        assert convert(["to-hf", str(run), str(tmp_path / "hf")]) == 0
        listed.clear()
        read.clear()
    USES[use](run, config, tmp_path)
    there = str(run.resolve())
    base = str(Path(world.model).resolve())
    assert (listed[there], read[there]) == (1, 1)
    # The card of an export names the runs before this one, so it opens the first of them on its own.
    more = 1 if use.startswith("export") else 0
    expected = 0 if use == "export of adapters" else 1
    assert (listed[base], read[base]) == (expected + more, expected + more)


def test_what_appears_between_opening_and_loading_changes_nothing(adapters, tmp_path):
    """Step 2 is opened; then step 4 appears, with other weights and, as if made elsewhere, other settings."""
    run = shutil.copytree(adapters, tmp_path / "run")
    later = run / "checkpoints" / "4"
    later.rename(tmp_path / "4")
    mesh = make_mesh(MeshConfig())
    of_two = model_fingerprint(load_model(open_checkpoint(run), FLOAT32, mesh).params)
    checkpoint = open_checkpoint(run)
    (tmp_path / "4").rename(later)
    assert steps(run) == [2, 4] and open_checkpoint(run).label == f"{run}@4"

    asked = samplers.checkpoint_sampler(checkpoint, batch_size=8, mesh=MeshConfig(), precision=FLOAT32, chat=False)
    assert (asked.where, asked.model) == (f"{run}@2", of_two)
    assert checkpoint.adapter == LORA and checkpoint.step == 2
    assert model_fingerprint(load_model(open_checkpoint(run), FLOAT32, mesh).params) != of_two
    weights = RunWeights(checkpoint)
    tensor = next(tensor for tensor in weights.tensors if tensor.path.endswith("q_proj/weight"))
    newest = RunWeights(open_checkpoint(run)).read(tensor)
    np.testing.assert_array_equal(weights.read(tensor), RunWeights(open_checkpoint(run, 2)).read(tensor))
    assert not np.array_equal(weights.read(tensor), newest)


def test_evaluation_files_what_it_loaded(adapters, tmp_path, monkeypatch):
    """A checkpoint that appears while the model is loaded is neither in the folder's name nor in the label."""
    run = shutil.copytree(adapters, tmp_path / "run")
    (run / "checkpoints" / "4").rename(tmp_path / "4")
    sampler = samplers.checkpoint_sampler

    def appear(*arguments, **named):
        (tmp_path / "4").rename(run / "checkpoints" / "4")
        return sampler(*arguments, **named)

    monkeypatch.setattr(samplers, "checkpoint_sampler", appear)
    ask("evaluate", run, tmp_path, "--conditions", "answer_only")
    (folder,) = (run / "evaluation").iterdir()
    assert folder.name.endswith("-step2")
    assert json.loads((folder / "scores.json").read_text())["model"] == f"{run}@2"


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_step_that_is_removed_while_it_is_open_is_one_line(adapters, tmp_path):
    run = shutil.copytree(adapters, tmp_path / "run")
    checkpoint = open_checkpoint(run, 2)
    opened = RunWeights(checkpoint)
    (run / "checkpoints" / "2").rename(tmp_path / "removed")
    line = "checkpoint 2 of .*run was removed while it was being read: newer ones have replaced it"
    for read in (
        lambda: load_model(checkpoint, FLOAT32, make_mesh(MeshConfig())),
        checkpoint.host_params,
        checkpoint.open_arrays,
        lambda: checkpoint.identity,
        lambda: samplers.checkpoint_sampler(checkpoint, batch_size=8, mesh=MeshConfig(), precision=FLOAT32, chat=False),
    ):
        with pytest.raises(RemovedError, match=line) as raised:
            read()
        assert "\n" not in str(raised.value)
    assert opened.tensors, "what was read before stays"


def test_steps_that_are_not_there_are_one_line(adapters, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint of step 3: it has 2, 4"):
        open_checkpoint(adapters, 3)
    with pytest.raises(UserError, match="holds no checkpoint: a run folder"):
        open_checkpoint(tmp_path)


def test_a_handle_tells_what_is_stored(world, adapters):
    checkpoint, base = open_checkpoint(adapters), open_checkpoint(world.model)
    assert (checkpoint.label, checkpoint.step) == (f"{adapters}@4", 4)
    assert checkpoint.adapter == LORA and checkpoint.model == base.model and checkpoint.storage is None
    assert checkpoint.whole is checkpoint.whole and checkpoint.whole.run_folder == base.run_folder
    assert base.adapter is None and base.whole is base and base.base is None
    stored = base.stored_params()
    for path, value in base.host_params().items():
        leaf = stored
        for name in path.split("/"):
            leaf = leaf[name]
        assert (value.shape, value.dtype) == (leaf.shape, leaf.dtype)
    assert len(base.open_arrays()) == len(jax.tree.leaves(stored))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_whole_rows_are_read_whole_and_then_laid_out(tmp_path, monkeypatch, sizes):
    """As chunks are stored, and not by each device that has a part of their columns."""
    source = make_hf_folder(tmp_path / "hf", hidden=64, heads=(8, 8), layers=2, vocab=96, tokenizer=False)
    assert convert(["from-hf", str(source), str(tmp_path / "run")]) == 0
    checkpoint, asked = open_checkpoint(tmp_path / "run"), []
    read_items = orbax.read_items

    def reading(folder, wanted):
        asked.append(wanted)
        return read_items(folder, wanted)

    monkeypatch.setattr(orbax, "read_items", reading)
    plan = abstract_model(checkpoint.model, FLOAT32, make_mesh(MeshConfig(**{"fsdp": 1, **sizes})))
    loaded = checkpoint.load_params(plan.abstract)
    (wanted,) = asked
    expected = checkpoint.host_params()
    for path, leaf in flatten_dict(wanted["params"], sep="/").items():
        if len(leaf.shape) - path.startswith("layers/") == 2:
            assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1], path
            assert len(set(map(str, leaf.sharding.devices_indices_map(leaf.shape).values()))) == 8 // sizes.get(
                "data", 1
            )
    shardings = flatten_dict(plan.abstract, sep="/")
    for path, value in flatten_dict(loaded, sep="/").items():
        assert value.sharding.is_equivalent_to(shardings[path].sharding, value.ndim)
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_what_devices_stored_in_parts_is_read_as_it_lies(tmp_path, monkeypatch):
    mesh = make_mesh(MeshConfig(fsdp=8))
    weights = {"lm_head": {"weight": np.arange(64, dtype=np.float32).reshape(4, 16)}}
    weights = jax.device_put(weights, parameter_shardings(weights, mesh))
    write_model(tmp_path / "run", weights, {})
    checkpoint = open_checkpoint(tmp_path / "run")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights)
    assert checkpoint._as_read(abstract) == abstract
    np.testing.assert_array_equal(checkpoint.load_params(abstract)["lm_head"]["weight"], weights["lm_head"]["weight"])

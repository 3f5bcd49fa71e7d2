"""Runs of adapters: the base is frozen, elsewhere, and itself; steps are the same on every mesh; RPO follows CPT."""

import dataclasses
import functools
import json
import re
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import initial_weights, load_model
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.cli.convert import main as convert
from medllm_jax.config.load import build, to_plain
from medllm_jax.config.schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    InitConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)
from medllm_jax.conversion.hf_weights import open_hf
from medllm_jax.conversion.run_weights import RunWeights
from medllm_jax.conversion.verify import logits_here, stacked_weights
from medllm_jax.data.prefetch import put_batch
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import abstract_model, merge_params, random_params
from medllm_jax.observability.progress import Progress
from medllm_jax.training.loop import train
from medllm_jax.training.programs import abstract_batch, train_program
from medllm_jax.training.reference import cache_reference
from tests.training.test_step import rows_of
from tests.world import tiny_config

MODEL = tiny_config(hidden_size=128, intermediate_size=256)
FLOAT32 = PrecisionConfig(compute="float32")
QLORA = AdapterConfig(rank=4, base="nf4", double_quantization=True, projections=("q_proj", "down_proj"))
INT8 = AdapterConfig(rank=4, base="int8", double_quantization=True)


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A run folder with a random model of a width that blocks divide, and the world's tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    plan = abstract_model(MODEL, FLOAT32, make_mesh(MeshConfig()))
    write_model(folder, random_params(plan, seed=0), to_plain(MODEL))
    shutil.copytree(world.tokenizer, folder / "tokenizer")
    return folder


def config_of(store, init, run="unused", kind="cpt", *, adapter=QLORA, mesh=(1, -1, 1), accumulate=1, **changes):
    return RunConfig(
        run=str(run),
        steps=6,
        data=DataConfig(store=str(store), batch_size=8, accumulate=accumulate),
        init=InitConfig(str(init)),
        model=MODEL,
        adapter=adapter,
        mesh=MeshConfig(*mesh),
        precision=FLOAT32,
        objective=ObjectiveConfig(name=kind),
        # eps: see test_step.py
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-5),
        checkpoint=CheckpointConfig(every=2),
        **changes,
    )


# --- steps ---------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """A few steps: losses, adapters, what is frozen before and after, the state, and the program's text."""

    losses: list
    adapters: Any
    before: Any
    after: Any
    state: Any
    text: str


def steps(base, *, kind="rpo", devices=8, number=3, adapter=INT8, **how):
    config = config_of("unused", base, kind=kind, adapter=adapter, **how)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program = train_program(config, mesh)
    params, frozen, _ = initial_weights(program.model, open_checkpoint(base), config.seed)
    before = jax.tree.map(np.array, frozen)
    batches = [put_batch(rows_of(kind, step), mesh) for step in range(number)]
    compiled = program.step.lower(program.abstract, batches[0], program.model.frozen).compile()
    state, losses = program.initialise(params), []
    for batch in batches:
        state, metrics = compiled(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    return Steps(losses, jax.device_get(state.params), before, jax.device_get(frozen), state, compiled.as_text())


ONE = {"devices": 1, "mesh": (1, 1, 1)}


@pytest.fixture(scope="module")
def alone(base):
    return steps(base, **ONE)


@pytest.mark.parametrize(
    "how",
    [{"mesh": (1, 8, 1)}, {"mesh": (2, 2, 2), "remat": "full", "accumulate": 2}],
    ids=["fsdp", "all axes, remat, micro-batches"],
)
def test_the_same_steps_on_every_mesh_and_in_micro_batches(base, alone, how):
    made, expected = steps(base, **how), alone
    np.testing.assert_allclose(made.losses, expected.losses, atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=0), made.adapters, expected.adapters)
    jax.tree.map(np.testing.assert_array_equal, made.after, expected.before)  # the same bits on every mesh
    gathers = [line.split(" all-gather(")[0] for line in made.text.splitlines() if " all-gather(" in line]
    if how["mesh"] == (1, 8, 1):  # codes travel, and not what they stand for
        assert any("s8[1,256,128]" in line for line in gathers)
        assert not any(re.search(r"(f32|bf16)\[(1,)?(128,128|128,256|256,128)\]", line) for line in gathers)


def test_adapters_move_and_nothing_else_does(alone):
    _, adapters, before, after, state, _ = alone
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(adapters))
    size = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * size < sum(leaf.size for leaf in jax.tree.leaves(before)) / 10


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_in_the_step_where_it_is_asked_for(dropout):
    config = config_of("unused", "unused", adapter=dataclasses.replace(QLORA, dropout=dropout))
    program = train_program(config, make_mesh(config.mesh))
    batch = abstract_batch(make_mesh(config.mesh), 8, 24, None)
    text = program.step.lower(program.abstract, batch, program.model.frozen).as_text()
    assert ("bernoulli" in text) == (dropout > 0)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, base, tmp_path_factory):
    """CPT with adapters, with dropout, then RPO of what came out."""
    root = tmp_path_factory.mktemp("finished")
    train(config_of(world.token_store, base, root / "cpt", adapter=dataclasses.replace(QLORA, dropout=0.1)))
    rpo = config_of(world.pair_store, root / "cpt", root / "rpo", "rpo")
    cache_reference(rpo)
    train(rpo)
    return root


def test_learns_and_keeps_only_adapters(base, finished, metrics_of):
    losses = [row["loss"] for row in metrics_of(finished / "cpt").values()]
    assert losses[-1] < losses[0] - 0.5
    for kind in ("cpt", "rpo"):
        assert set(open_checkpoint(finished / kind).stored_params()) == {"layers"}
        assert len(jax.tree.leaves(open_checkpoint(finished / kind).stored_params())) == 2 * 2
        assert open_checkpoint(finished / kind).meta["base"]["checkpoint"] == str(base)


class KilledError(Exception):
    pass


def test_resumed_equals_uninterrupted(world, base, finished, tmp_path, monkeypatch, metrics_of):
    config = config_of(world.token_store, base, tmp_path / "run", adapter=dataclasses.replace(QLORA, dropout=0.1))
    add = Progress.add

    def break_at_4(self, step, *rest):
        if step == 4:
            raise KilledError
        add(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", break_at_4)
        with pytest.raises(KilledError):
            train(config)
    train(config)
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "cpt")
    runs = map(open_checkpoint, (tmp_path / "run", finished / "cpt"))
    models = (load_model(run, FLOAT32, make_mesh(MeshConfig())).params for run in runs)
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_rpo_starts_at_the_cpt_model_and_not_at_its_base(world, base, finished, metrics_of):
    first = metrics_of(finished / "rpo")[1]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-5)
    assert metrics_of(finished / "rpo")[6]["rewards/margins"] > 0.1

    cpt = load_model(open_checkpoint(finished / "cpt"), FLOAT32, make_mesh(MeshConfig()))
    assert open_checkpoint(finished / "rpo").meta["reference_model"] == model_fingerprint(cpt.params)
    assert np.abs(cpt.params["layers"]["mlp"]["down_proj"]["lora_B"]).max() > 1e-3


def test_adapters_off_is_the_cached_reference(world, base, finished, tmp_path, metrics_of):
    """On a whole model; on adapters it would be the raw base, and is refused."""
    for reference in ("cached", "adapters_off"):
        config = config_of(world.pair_store, base, tmp_path / reference, "rpo")
        config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, reference=reference))
        if reference == "cached":
            cache_reference(config)
        train(config)
    cached, computed = (metrics_of(tmp_path / reference) for reference in ("cached", "adapters_off"))
    assert cached[6]["rewards/margins"] > 0.01
    for step, row in computed.items():
        assert row == pytest.approx(cached[step], abs=1e-5)
    with pytest.raises(UserError, match="raw base"):
        train(dataclasses.replace(config, run=str(tmp_path / "no"), init=InitConfig(str(finished / "cpt"))))
    with pytest.raises(UserError, match="reads no cached ones"):
        cache_reference(config)


def test_merged_equals_unmerged(finished, tmp_path):
    """Exported weights, through the plain model, predict what base and adapters do."""
    tokens = np.random.default_rng(0).integers(MODEL.vocab_size, size=48).tolist()
    model = load_model(open_checkpoint(finished / "rpo"), FLOAT32, make_mesh(MeshConfig(), jax.devices()[:1]))
    row = jnp.asarray([tokens], jnp.int32)
    network = nnx.merge(model.structure, model.params)
    with jax.default_matmul_precision("highest"):
        hidden = network(row, jnp.arange(48)[None], jnp.ones_like(row), jnp.zeros_like(row))
        unmerged = np.asarray(hidden[0] @ network.head_weight.T)
    assert convert(["to-hf", str(finished / "rpo"), str(tmp_path / "hf")]) == 0
    (merged,) = logits_here(open_hf(tmp_path / "hf"), [tokens])
    np.testing.assert_allclose(merged, unmerged, atol=1e-4)
    sides = RunWeights(open_checkpoint(finished / "rpo")), open_hf(tmp_path / "hf")
    ours, exported = map(stacked_weights, sides)
    jax.tree.map(np.testing.assert_array_equal, ours, exported)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(structure, params, batch):
    return nnx.merge(structure, params)(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)


def test_new_adapters_change_nothing_and_a_quantised_base_little(base):
    """Hidden states: root mean square of the change, relative; none on the same base, some with its weights in bits."""
    mesh, batch = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), rows_of("cpt", 0)
    half = load_model(open_checkpoint(base), PrecisionConfig(params="bfloat16", compute="float32"), mesh)
    there = hidden_states(half.structure, half.params, batch)
    for base_format, bound in (("bfloat16", 0), ("nf4", 0.25)):
        plan = abstract_model(MODEL, FLOAT32, mesh, adapter=AdapterConfig(base=base_format))
        weights = initial_weights(plan, open_checkpoint(base), seed=0)
        here = hidden_states(plan.structure, merge_params(*weights[:2]), batch)
        change = np.sqrt(np.mean((here - there) ** 2) / np.mean(there**2))
        assert bound / 10 <= change <= bound, base_format


# --- what can't be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        (None, r"holds adapters and adapter is not set: .* make a whole model of it first"),
        (dataclasses.replace(QLORA, rank=8), r"adapter\.rank is 8 in the config and 4 in"),
        (dataclasses.replace(QLORA, base="int4"), r"adapter\.base is int4 in the config and nf4 in"),
    ],
)
def test_adapters_go_on_as_they_began(world, finished, tmp_path, adapter, line):
    with pytest.raises(UserError, match=line):
        cache_reference(config_of(world.pair_store, finished / "cpt", tmp_path / "run", "rpo", adapter=adapter))


def test_a_base_that_is_gone_or_another_is_refused(world, base, finished, tmp_path):
    config = config_of(world.token_store, base, finished / "cpt", adapter=dataclasses.replace(QLORA, dropout=0.1))
    aside = tmp_path / "checkpoints"
    (base / "checkpoints").rename(aside)
    try:
        with pytest.raises(UserError, match=r"holds adapters of the model in .*model, step 0, and it is not there"):
            train(config)
        plan = abstract_model(MODEL, FLOAT32, make_mesh(MeshConfig()))
        write_model(base, random_params(plan, seed=1), to_plain(MODEL))
        for attempt in (
            lambda: train(config),
            lambda: load_model(open_checkpoint(finished / "rpo"), FLOAT32, make_mesh(MeshConfig())),
            lambda: stacked_weights(RunWeights(open_checkpoint(finished / "rpo"))),
        ):
            with pytest.raises(UserError, match="is not the model that the adapters were trained on: its step 0 has"):
                attempt()
    finally:
        shutil.rmtree(base / "checkpoints", ignore_errors=True)
        aside.rename(base / "checkpoints")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rank": 0}, r"adapter\.rank is 0"),
        ({"alpha": 0.0}, r"adapter\.alpha is 0"),
        ({"dropout": 1.0}, r"adapter\.dropout is 1"),
        ({"projections": []}, r"adapter\.projections is empty"),
        ({"projections": ["q_proj", "q_proj"]}, "each once"),
        ({"projections": ["lm_head"]}, r"adapter\.projections: expected a list of one of q_proj"),
        ({"base": "int3"}, "expected one of float32, bfloat16, int8, int4, nf4"),
        ({"double_quantization": True}, "has no scales"),
    ],
)
def test_wrong_settings_are_one_line(settings, line):
    plain = json.loads(json.dumps(to_plain(config_of("store", "init"))))
    assert build(RunConfig, plain, "here").adapter == QLORA
    with pytest.raises(UserError, match=line):
        build(RunConfig, plain | {"adapter": settings}, "here")


def test_adapters_need_a_base():
    with pytest.raises(UserError, match=r"adapter is set and init\.checkpoint is not"):
        dataclasses.replace(config_of("store", "init"), init=InitConfig())


def test_blocks_that_do_not_divide_are_an_error_with_numbers():
    mesh = make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(UserError, match=r"down_proj/absmax \(2, 128, 4\) does not divide by mesh\.tensor 8"):
        abstract_model(MODEL, FLOAT32, mesh, adapter=QLORA)

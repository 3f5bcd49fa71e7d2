"""One step: the same on every mesh and in any number of micro-batches, for both objectives."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medllm_jax.checkpoint.train_state import new_state, state_shardings
from medllm_jax.config.schema import MeshConfig, ObjectiveConfig, OptimizerConfig, PrecisionConfig
from medllm_jax.data.batch import batch_of
from medllm_jax.data.prefetch import put_batch
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import AbstractModel, abstract_model, random_params
from medllm_jax.training.losses import LossSum, objective
from medllm_jax.training.optimizer import make_optimizer, make_schedule
from medllm_jax.training.step import summed_gradients, train_step
from tests.world import tiny_config

ROWS, LENGTH, PAIRS = 8, 24, 2
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


def rows_of(kind, seed):
    """A batch with several segments a row, ragged pairs (one or two a row) and padding."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((ROWS, 3, LENGTH), np.int32)
    rows[:, 0] = rng.integers(0, 384, (ROWS, LENGTH))
    if kind == "cpt":
        for row, cut in enumerate(rng.integers(3, 18, ROWS)):
            rows[row, 1, :cut], rows[row, 1, cut:21] = 1, 3
        return batch_of(rows, "cpt")
    reference = np.zeros((ROWS, PAIRS, 2), np.float32)
    for row in range(ROWS):
        at = 0
        for pair in range(1 + row % 2):
            lengths = rng.integers(2, 5, 3)
            for branch, length in enumerate(lengths):
                rows[row, 1, at : at + length], rows[row, 2, at : at + length] = 2 * pair + 1, branch
                at += length
            reference[row, pair] = rng.normal(-20, 3, 2)
    return batch_of(rows, "pairs", reference)


def one_step(optimizer, params, gradient, **limits):
    """The state before and after a step of parameters whose gradients are given, and its metrics."""

    def loss(params, rows, whole):
        total = sum(jnp.sum(params[name] * gradient[name]) for name in params)
        return LossSum(total, jnp.float32(1), {"loss": ((total, jnp.float32(1)),)}, {})

    state = new_state(jax.tree.map(jnp.float32, params), optimizer, seed=0)
    model = types.SimpleNamespace(merge=lambda params, frozen, key: params)
    run = functools.partial(train_step, model=model, loss=loss, optimizer=optimizer, schedule=lambda _: 0.1, **limits)
    return state, *jax.jit(functools.partial(run, accumulate=1))(state, jnp.zeros(1))


@pytest.mark.parametrize(
    ("optimizer", "params", "gradient"),
    [
        (optax.adamw(0.1, eps=0.0), {"used": [1.0, 2.0], "unused": [1.0]}, {"used": [1.0, 1.0], "unused": [0.0]}),
        (optax.sgd(1e38), {"weight": [1.0]}, {"weight": [1e3]}),
        (optax.sgd(3e38), {"weight": [-3e38]}, {"weight": [1.0]}),  # an update that is finite, and a sum that is not
        (optax.trace(decay=2.0), {"weight": [1.0]}, {"weight": [1.0]}),  # and one that does nothing, which is none
    ],
    ids=["eps 0", "a large step", "a large weight", "a good one"],
)
def test_an_update_that_is_not_finite_is_seen(optimizer, params, gradient, request):
    params, gradient = jax.tree.map(np.float32, (params, gradient), is_leaf=lambda x: isinstance(x, list))
    *_, metrics = one_step(optimizer, params, {name: jnp.asarray(g) for name, g in gradient.items()})
    good = request.node.callspec.id == "a good one"
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["skipped"] == 1 - good


OBJECTIVES = {
    "cpt": ObjectiveConfig(),
    "rpo": ObjectiveConfig(name="rpo"),
    "rpo by token": ObjectiveConfig(name="rpo", nll_reduction="token"),
}


def train_steps(kind, mesh_shape, *, steps=5, accumulate=1, vocab_chunks=1):
    mesh = make_mesh(MeshConfig(*mesh_shape), jax.devices()[: math.prod(mesh_shape)])
    model = abstract_model(tiny_config(), PrecisionConfig(compute="float32"), mesh)
    # Adam divides by the gradient's size: with its usual eps it would blow up the rounding of gradients that cancel to
    # almost nothing, as those of k_proj.bias do.
    settings = OptimizerConfig(learning_rate=1e-3, eps=1e-5)
    optimizer = make_optimizer(settings, steps=10)
    make = functools.partial(new_state, optimizer=optimizer, seed=0)
    shardings = state_shardings(jax.eval_shape(make, model.abstract), optimizer, mesh)
    state = jax.jit(make, out_shardings=shardings)(random_params(model, seed=0))
    loss = objective(dataclasses.replace(OBJECTIVES[kind], vocab_chunks=vocab_chunks))
    step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            loss=loss,
            optimizer=optimizer,
            schedule=make_schedule(settings, steps=10),
            accumulate=accumulate,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    history = []
    for number in range(steps):
        state, metrics = step(state, put_batch(rows_of(kind, number), mesh))
        history.append(float(metrics["loss"]))
    return history, jax.device_get(state.params), state


@functools.cache
def one_device(kind):
    return train_steps(kind, (1, 1, 1))[:2]


def assert_same(result, expected):
    np.testing.assert_allclose(result[0], expected[0], atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), result[1], expected[1])


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_the_steps_change_what_they_should(kind):
    history, params = one_device(kind)
    model = abstract_model(
        tiny_config(), PrecisionConfig(compute="float32"), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    )
    before = jax.device_get(random_params(model, seed=0))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, before)
    assert all(value > 1e-4 for value in jax.tree.leaves(moved)), moved
    assert len(set(history)) == len(history)


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_sharded_equals_unsharded(kind, mesh_shape):
    assert_same(train_steps(kind, mesh_shape), one_device(kind))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(("mesh_shape", "accumulate"), [((1, 1, 1), 8), ((2, 1, 1), 4)])
def test_accumulated_equals_whole_batch(kind, mesh_shape, accumulate):
    assert_same(train_steps(kind, mesh_shape, accumulate=accumulate), one_device(kind))


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_chunked_head_equals_whole_head_on_a_split_vocabulary(kind):
    assert_same(train_steps(kind, (1, 2, 4), vocab_chunks=4), one_device(kind))


def test_no_parameter_or_moment_is_whole_on_one_device():
    *_, state = train_steps("cpt", (1, 8, 1), steps=1)
    large = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.size > 1000]
    assert len(large) >= 3 * 8  # weights and two moments of eight kinds of matrix
    for leaf in large:
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards), leaf.sharding


def test_a_batch_without_targets_changes_nothing_but_the_count():
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = abstract_model(tiny_config(), PrecisionConfig(compute="float32"), mesh)
    empty = batch_of(np.zeros((2, 3, 8), np.int32), "cpt")
    gradients, sums = summed_gradients(
        random_params(model, seed=0),
        put_batch(empty, mesh),
        jax.random.key(0),
        model=model,
        loss=objective(ObjectiveConfig()),
        accumulate=1,
    )
    assert float(sums.weight) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_each_step_draws_another_key():
    seen = []

    class Spy(AbstractModel):
        def merge(self, params, frozen=None, key=None):
            seen.append(key)
            return super().merge(params, frozen, key)

    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    model = Spy(*abstract_model(tiny_config(), PrecisionConfig(compute="float32"), mesh))
    optimizer = make_optimizer(OptimizerConfig(), steps=10)
    state = new_state(random_params(model, seed=0), optimizer, seed=0)
    for number in range(2):
        state, _ = train_step(
            state,
            put_batch(rows_of("cpt", number), mesh),
            model=model,
            loss=objective(ObjectiveConfig()),
            optimizer=optimizer,
            schedule=make_schedule(OptimizerConfig(), steps=10),
            accumulate=1,
        )
    first, second = (np.asarray(jax.random.key_data(key)) for key in seen)
    assert not np.array_equal(first, second)
    assert isinstance(model.structure, nnx.GraphDef)

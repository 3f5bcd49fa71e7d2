"""One optimizer step as a pure function of arrays: micro-batches add up, one division, one update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.data.batch import Batch
from medllm_jax.model.abstract import AbstractModel
from medllm_jax.training.losses import Loss, LossSum, averages


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Any = None,
    *,
    model: AbstractModel,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate: int,
    largest_norm: float = 0.0,
    largest_loss: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from a batch of rows, and its metrics (float32 scalars).

    frozen: tree of the parameters that are not trained, if there are any. schedule: the optimizer's learning rate by
    step. largest_norm, largest_loss: a larger gradient norm, or loss, is a spike; with 0 none is. Where either is not
    finite, or a spike, nothing is updated but the random key, and the metric `skipped` is 1. So it is where an update
    has made a parameter or moment that is not finite: that state must not be saved.
    """
    next_key, key = jax.random.split(jax.random.wrap_key_data(state.key))
    grads, sums = summed_gradients(state.params, batch, key, frozen, model=model, loss=loss, accumulate=accumulate)
    weight = jnp.maximum(sums.weight, 1e-8)  # a batch without a target has zero gradients, not undefined ones
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = averages(sums)
    norm = optax.global_norm(grads).astype(jnp.float32)
    good = jnp.isfinite(norm) & (norm <= (largest_norm or jnp.inf))
    good &= jnp.isfinite(metrics["loss"]) & (metrics["loss"] <= (largest_loss or jnp.inf))
    metrics |= sums.counts | {"grad_norm": norm}
    metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
    after = TrainState(state.step + 1, params, opt_state, state.key)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    # Looked at when it is made: to choose by it would hold both states, and cost the memory of another model.
    finite = all_finite(jax.lax.optimization_barrier(kept[:3]))
    metrics["skipped"] = 1 - (good & finite).astype(jnp.float32)
    return kept._replace(key=jax.random.key_data(next_key)), metrics


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of every array is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def summed_gradients(
    params: Any,
    batch: Batch,
    key: jax.Array,
    frozen: Any = None,
    *,
    model: AbstractModel,
    loss: Loss,
    accumulate: int,
) -> tuple[Any, LossSum]:
    """Gradients of the loss's total, and its sums, over all rows; in `accumulate` micro-batches, added in float32."""

    def total_of(params: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, LossSum]:
        sums = loss(model.merge(params, frozen, key), rows, batch)
        return sums.total, sums

    gradient = jax.grad(total_of, has_aux=True)
    if accumulate == 1:
        return gradient(params, batch, key)

    # Micro-batch a holds rows a, a + A, ...: each device keeps the rows it has.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, accumulate)

    def add(carry, rows_and_key):
        return jax.tree.map(jnp.add, carry, gradient(params, *rows_and_key)), None

    like = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro_batches), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    return jax.lax.scan(add, zeros, (micro_batches, keys))[0]

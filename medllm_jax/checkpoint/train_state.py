"""Everything that a training step reads and writes, and where it lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from medllm_jax.distributed.sharding import parameter_shardings, replicated


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    step: int32 scalar, updates made; params: tree of the arrays that are trained; opt_state: optax's, its moments laid
    out like their parameters; key: uint32 key data of the random numbers still to come. Trees of
    ShapeDtypeStructs and of shardings have this form too.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any


def new_state(params: Any, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; jit it with `state_shardings` as out_shardings."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
    )


def state_shardings(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a TrainState of shapes: parameters by the table, what mirrors a parameter likewise."""
    params = parameter_shardings(abstract.params, mesh)
    whole = replicated(mesh)
    return TrainState(
        step=whole,
        params=params,
        opt_state=optax.tree.map_params(
            optimizer.init,
            lambda _, sharding: sharding,
            abstract.opt_state,
            params,
            transform_non_params=lambda _: whole,
        ),
        key=whole,
    )

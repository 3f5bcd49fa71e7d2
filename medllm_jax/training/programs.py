"""The programs that a run compiles: what `train` and `reference` execute is what `plan` looks at."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from medllm_jax.checkpoint.train_state import TrainState, new_state, state_shardings
from medllm_jax.data.batch import Batch
from medllm_jax.distributed.compiler_options import compiler_options
from medllm_jax.distributed.sharding import check_divisible, is_one_cpu, replicated, rows_over
from medllm_jax.model.abstract import AbstractModel, abstract_model
from medllm_jax.training.losses import LossSum, objective, pair_log_probs
from medllm_jax.training.optimizer import make_optimizer, make_schedule
from medllm_jax.training.resolve import ResolvedConfig
from medllm_jax.training.step import train_step


class TrainProgram(NamedTuple):
    """One optimizer step of a run on a mesh. Nothing is allocated until it is called.

    model: without its weights; abstract: shapes and shardings of the state; initialise: the first state of parameters,
    which it takes over; step: jitted ``(state, batch, frozen) -> (state, metrics)``, which takes over the state and
    leaves the frozen parameters where they are; measure: ``(params, batch, frozen) -> LossSum`` of a micro-batch.
    """

    model: AbstractModel
    abstract: TrainState
    initialise: Callable[[Any], TrainState]
    step: jax.stages.Wrapped
    measure: Callable[[Any, Batch, Any], LossSum]


def train_program(config: ResolvedConfig, mesh: Mesh) -> TrainProgram:
    """The step of a run; UserError where model or micro-batch don't split over the mesh."""
    check_divisible(mesh, config.model, config.micro_batch)
    model = abstract_model(
        config.model,
        config.precision,
        mesh,
        remat=config.remat,
        attention=config.attention,
        branches=config.objective.name == "rpo",
        adapter=config.adapter,
    )
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract, initialise = _state_maker(model, optimizer, config.seed, mesh)
    loss = objective(config.objective, blocks=is_one_cpu(mesh))

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))
    def measure(params: Any, batch: Batch, frozen: Any) -> LossSum:
        return loss(model.merge(params, frozen), batch, batch)

    step = functools.partial(
        train_step,
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        accumulate=config.data.accumulate,
        largest_norm=config.guard.grad_norm,
        largest_loss=config.guard.loss,
    )
    shardings = (jax.tree.map(lambda x: x.sharding, abstract), replicated(mesh))
    step = jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options(mesh))
    return TrainProgram(model, abstract, initialise, step, measure)


def _state_maker(model: AbstractModel, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh):
    make = functools.partial(new_state, optimizer=optimizer, seed=seed)
    shapes = jax.eval_shape(make, model.abstract)
    shardings = state_shardings(shapes, optimizer, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return abstract, jax.jit(make, donate_argnums=0, out_shardings=shardings)


def score_program(structure: nnx.GraphDef, mesh: Mesh, pairs_per_row: int, vocab_chunks: int) -> jax.stages.Wrapped:
    """Jitted ``(params, batch) -> float32 [B, P, 2]``: log-probabilities of a micro-batch's pairs, on each device."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))
    def score(params: Any, batch: Batch) -> jax.Array:
        return pair_log_probs(nnx.merge(structure, params), batch, pairs_per_row, vocab_chunks)

    return score


def abstract_batch(mesh: Mesh, rows: int, sequence_length: int, pairs_per_row: int | None) -> Batch:
    """Shapes and shardings of a batch; with reference log-probabilities where pairs_per_row is not None."""

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=rows_over(mesh))

    integers, weights = array(sequence_length), array(sequence_length, dtype=jnp.float32)
    reference = None if pairs_per_row is None else array(pairs_per_row, 2, dtype=jnp.float32)
    return Batch(integers, integers, integers, integers, weights, reference)

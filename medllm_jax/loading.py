"""A model on a mesh: its structure, and its weights, from a checkpoint or random, never whole on one device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from medllm_jax.checkpoint import load_model_config, load_params
from medllm_jax.config import ModelConfig, PrecisionConfig
from medllm_jax.model.qwen2 import Backend, Qwen2
from medllm_jax.sharding import activation_constraint, parameter_shardings


class Blueprint(NamedTuple):
    """A model without its weights.

    structure: `nnx.merge(structure, params)` is the model. abstract: tree of ShapeDtypeStructs with shardings.
    """

    config: ModelConfig
    structure: nnx.GraphDef
    abstract: Any


def blueprint(config: ModelConfig, precision: PrecisionConfig, mesh: Mesh, *, remat: str = "none") -> Blueprint:
    """The structure of a model on a mesh, and where its weights go. Allocates nothing."""
    backend = Backend(
        compute_dtype=jnp.dtype(precision.compute),
        param_dtype=jnp.dtype(precision.params),
        remat=remat,
        constrain=activation_constraint(mesh),
    )
    structure, state = nnx.split(nnx.eval_shape(lambda: Qwen2(config, backend, rngs=nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    shardings = parameter_shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Blueprint(config, structure, abstract)


def random_params(plan: Blueprint, seed: int) -> Any:
    """Random weights, each drawn in its own sharding; the same on every mesh."""
    backend = Backend(param_dtype=plan.abstract["norm"]["weight"].dtype)

    def draw() -> Any:
        return nnx.to_pure_dict(nnx.state(Qwen2(plan.config, backend, rngs=nnx.Rngs(seed))))

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, plan.abstract))()


class LoadedModel(NamedTuple):
    """A model with weights, for scoring and generation."""

    config: ModelConfig
    structure: nnx.GraphDef
    params: Any
    mesh: Mesh


def load_model(run: str, precision: PrecisionConfig, mesh: Mesh) -> LoadedModel:
    """The newest model of a run folder, on a mesh."""
    plan = blueprint(load_model_config(run), precision, mesh)
    return LoadedModel(plan.config, plan.structure, load_params(run, plan.abstract), mesh)

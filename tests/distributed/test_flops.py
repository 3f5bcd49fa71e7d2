"""FLOPs by formula against the products that JAX traces."""

import math

import jax
import jax.numpy as jnp
import pytest

from medllm_jax.config.load import load_model_config
from medllm_jax.config.schema import MeshConfig, ObjectiveConfig, PrecisionConfig
from medllm_jax.data.batch import Batch
from medllm_jax.distributed.flops import forward_flops, matrix_parameters, train_flops
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import abstract_model
from medllm_jax.training.losses import objective
from tests.world import tiny_config

ROWS, LENGTH = 2, 64


def products(jaxpr, times=1):
    """FLOPs of every dot_general, those in a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[d] for d in contracted]
            total += 2 * times * equation.outvars[0].aval.size * math.prod(sizes)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                total += products(getattr(inner, "jaxpr", inner), times * equation.params.get("length", 1))
    return total


def is_jaxpr(value):
    """A Jaxpr, or a ClosedJaxpr around one."""
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.fixture(scope="module")
def traced():
    from flax import nnx

    config = tiny_config()
    plan = abstract_model(config, PrecisionConfig(), make_mesh(MeshConfig(), jax.devices()[:1]))
    loss = objective(ObjectiveConfig())
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = Batch(rows, rows, rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32))
    total = lambda params, batch: loss(nnx.merge(plan.structure, params), batch, batch).total  # noqa: E731
    forward = jax.make_jaxpr(total)(plan.abstract, batch)
    return config, products(forward.jaxpr), products(jax.make_jaxpr(jax.grad(total))(plan.abstract, batch).jaxpr)


def test_the_formulas_are_what_is_traced(traced):
    config, forward, both = traced
    # Rows this short are attended to whole; the formula has the half that causality lets through.
    width = config.num_attention_heads * config.dim_of_head
    hidden_half = 2 * ROWS * LENGTH**2 * width * config.num_hidden_layers
    assert forward == forward_flops(config, ROWS, LENGTH) + hidden_half
    assert both == train_flops(config, ROWS, LENGTH) + 3 * hidden_half


def test_72b_needs_six_flops_a_token_and_parameter():
    model = load_model_config("configs/model/qwen2.5-72b.yaml")
    embedding = model.vocab_size * model.hidden_size
    assert matrix_parameters(model) == pytest.approx(72_706_203_648 - embedding, rel=1e-4)
    assert train_flops(model, 1, 4096) == pytest.approx(3.97 * 459e12, rel=1e-3)  # v5p seconds at its peak

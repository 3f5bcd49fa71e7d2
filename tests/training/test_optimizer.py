"""AdamW against its formula, its schedule, and moments kept in fewer bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medllm_jax.config.schema import OptimizerConfig
from medllm_jax.training.optimizer import make_optimizer, make_schedule

CONSTANT = {"learning_rate": 0.1, "schedule": "constant"}


def parameters():
    projection, norm = jax.random.normal(jax.random.key(0), (2, 4, 8)), jnp.ones((8,))
    return {"layers": {"mlp": {"up_proj": {"weight": projection}}}, "norm": {"weight": norm}}


def gradients(step):
    """Of sizes as in training: an element's vary around its own."""
    return jax.tree.map(lambda x: x * (1 + 0.3 * jnp.sin(step + jnp.arange(x.size).reshape(x.shape))), parameters())


def run(config, steps):
    optimizer, params = make_optimizer(config, steps), parameters()
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = jax.jit(optimizer.update)(gradients(step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def test_steps_are_those_of_the_formula():
    config = OptimizerConfig(**CONSTANT, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5, clip_norm=2.0)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters())
    first = second = jax.tree.map(np.zeros_like, params)
    for step in range(1, 4):
        grads = jax.tree.map(lambda x: np.asarray(x, np.float64), gradients(step - 1))
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, norm=norm: g * 2.0 / norm, grads)
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, second, grads)
        decays = {"layers": {"mlp": {"up_proj": {"weight": 0.5}}}, "norm": {"weight": 0.0}}
        params = jax.tree.map(
            lambda p, m, v, d, t=step: p - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3) + d * p),
            params,
            first,
            second,
            decays,
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run(config, 3)[0], params)


def test_moments_in_bfloat16_take_half_and_lead_to_nearly_the_same():
    moved, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        params, state = run(OptimizerConfig(**CONSTANT, weight_decay=0.0, state_dtype=dtype), 20)
        moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert {leaf.dtype for leaf in moments} == {jnp.dtype(dtype)} and len(moments) == 2 * 2
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        moved[dtype] = np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(jax.tree.map(jnp.subtract, params, parameters()))]
        )
        sizes[dtype] = sum(leaf.nbytes for leaf in moments)
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=0.02)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_the_rate_rises_and_falls(schedule, middle):
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4, final_fraction=0.1), 24)
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert float(rate(14)) == pytest.approx(middle)
    assert float(rate(24)) == pytest.approx(1.0 if schedule == "constant" else 0.1)

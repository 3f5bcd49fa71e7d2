"""A model's hash: the same on every mesh, another for any change."""

import jax
import jax.numpy as jnp
import pytest

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import abstract_model, random_params
from tests.world import tiny_config


def params_on(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: shape[0] * shape[1] * shape[2]])
    return random_params(abstract_model(tiny_config(), PrecisionConfig(), mesh), seed=0)


@pytest.fixture(scope="module")
def params():
    return params_on((1, 1, 1))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_does_not_depend_on_the_mesh(params, shape):
    assert model_fingerprint(params_on(shape)) == model_fingerprint(params)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.at[0, 0].set(w[0, 0] + jnp.finfo(jnp.float32).eps * jnp.abs(w[0, 0])),
        lambda w: w.at[jnp.array([0, 1])].set(w[jnp.array([1, 0])]),
        lambda w: w.at[:, jnp.array([2, 3])].set(w[:, jnp.array([3, 2])]),
        lambda w: -w,
        lambda w: w.astype(jnp.bfloat16),
        lambda w: w.T,
    ],
    ids=["one bit", "rows swapped", "columns swapped", "signs", "dtype", "shape"],
)
def test_any_change_shows(params, change):
    changed = params | {"embed_tokens": {"weight": change(params["embed_tokens"]["weight"])}}
    assert model_fingerprint(changed) != model_fingerprint(params)


def test_half_precision_too(params):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert model_fingerprint(half) == model_fingerprint(half) != model_fingerprint(params)

"""Adapters: nothing at first, the published formula after that, dropout only where there is a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medllm_jax.config.schema import AdapterConfig
from medllm_jax.model.linear import Linear
from medllm_jax.model.lora import adapted_linear, freeze, merge, new_factors, set_dropout, storage_of
from medllm_jax.model.quantize import quantize
from medllm_jax.model.qwen2 import Backend, Qwen2
from tests.world import tiny_config

MAKE = {"bias": True, "std": 0.1, "param_dtype": jnp.float32}


def layer_of(adapter, name="q_proj"):
    make = adapted_linear(adapter, jnp.float32, lambda array, kind: array)(name)
    return make(128, 64, **MAKE, rngs=nnx.Rngs(0))


def with_random_b(layer):
    layer.lora_B[...] = jax.random.normal(jax.random.key(7), layer.lora_B.shape)
    return layer


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, 5, 128))


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_a_new_adapter_changes_no_bit(x, base):
    adapted, plain = layer_of(AdapterConfig(base=base)), layer_of(AdapterConfig(base=base, projections=("v_proj",)))
    assert not isinstance(plain, type(adapted)) and hasattr(adapted, "lora_A") and not hasattr(plain, "lora_A")
    for name, value in nnx.to_pure_dict(nnx.state(plain)).items():
        setattr(adapted, name, nnx.Param(value))
    np.testing.assert_array_equal(adapted(x), plain(x))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 2)])
@pytest.mark.parametrize("base", ["float32", "int8"])
def test_the_formula_and_the_merged_weight(x, base, rslora, scale):
    adapter = AdapterConfig(rank=4, alpha=32, rslora=rslora, base=base)
    layer = with_random_b(layer_of(adapter))
    a, b = layer.lora_A[...], layer.lora_B[...]
    assert (a.shape, b.shape) == ((4, 128), (64, 4))
    without = layer_of(adapter)(x)
    np.testing.assert_allclose(layer(x), without + scale * x @ a.T @ b.T, atol=1e-3)
    weight = MAKE["std"] * jax.random.normal(nnx.Rngs(0).params(), (64, 128))
    np.testing.assert_allclose(x @ merge(weight, (a, b), adapter).T, layer(x), atol=1e-3)
    np.testing.assert_allclose(x @ merge(weight, None, adapter).T, without, atol=1e-4)


def test_a_starts_as_in_peft_and_b_at_zero():
    like = {"lora_A": jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)}
    like["lora_B"] = jax.ShapeDtypeStruct((2, 96, 64), jnp.float32)
    made, again, other = (new_factors({"k_proj": like, "q_proj": like}, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, made, again)
    blocks = [made["k_proj"]["lora_A"], made["q_proj"]["lora_A"], other["k_proj"]["lora_A"], layer_of(RANK_64).lora_A]
    blocks = np.concatenate([np.reshape(a[...], (-1, 64 * 128)) for a in blocks])
    assert len(np.unique(blocks[:, 0])) == len(blocks) == 7
    bound = 128**-0.5  # torch's kaiming_uniform_(a=sqrt(5))
    assert np.abs(blocks).max() <= bound
    np.testing.assert_allclose(blocks.std(axis=1), bound / 3**0.5, rtol=0.03)
    assert not np.any(made["q_proj"]["lora_B"]) and not np.any(layer_of(RANK_64).lora_B[...])


RANK_64 = AdapterConfig(rank=64)


def adapted_model(**settings):
    linear = adapted_linear(AdapterConfig(rank=2, base="float32", **settings), jnp.float32, lambda array, kind: array)
    return Qwen2(tiny_config(), Backend(linear=linear), rngs=nnx.Rngs(0))


def test_only_the_named_projections_are_adapted():
    trained = nnx.to_pure_dict(nnx.state(adapted_model(projections=("q_proj", "down_proj")), nnx.LoRAParam))
    assert {key: set(value) for key, value in trained["layers"].items()} == {
        "self_attn": {"q_proj"},
        "mlp": {"down_proj"},
    }
    assert trained["layers"]["self_attn"]["q_proj"]["lora_A"].shape == (2, 2, 64)


def test_dropout_needs_a_key_and_keeps_the_mean():
    layer = with_random_b(layer_of(AdapterConfig(dropout=0.25)))
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (128,)), (20_000, 128))
    plain = layer(x)
    layer.key = nnx.Variable(jax.random.key(0))
    dropped = layer(x)
    np.testing.assert_array_equal(dropped, layer(x))
    assert np.all(np.any(dropped != plain, axis=-1))
    np.testing.assert_allclose(dropped.mean(0), plain[0], atol=6 * np.std(dropped - plain) / len(x) ** 0.5)


def test_every_adapter_of_every_block_draws_its_own():
    def keys(seed):
        set_dropout(model, jax.random.key(seed))
        layers = [module for _, module in nnx.iter_modules(model) if hasattr(module, "lora_A")]
        return np.concatenate([jax.random.key_data(layer.key[...]) for layer in layers])

    model = adapted_model(dropout=0.5)
    first, again, other = (keys(seed) for seed in (0, 0, 1))
    assert len(np.unique(first, axis=0)) == len(first) == 7 * 2
    np.testing.assert_array_equal(first, again)
    assert not np.any(np.all(first == other, axis=-1))


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_base_freezes_block_by_block(base):
    adapter = AdapterConfig(base=base, double_quantization=True)
    weight = jax.random.normal(jax.random.key(0), (3, 64, 128))
    whole = quantize(weight, storage_of(adapter))
    jax.tree.map(np.testing.assert_array_equal, freeze(weight, adapter), whole)


def test_without_an_adapter_the_layer_is_the_plain_one():
    assert Backend().linear("q_proj") is Linear
    assert type(layer_of(AdapterConfig(base="float32", projections=("v_proj",)))) is Linear

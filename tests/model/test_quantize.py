"""Quantised weights: bitsandbytes' NF4, how far values move, and that nothing unquantised is kept or travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.model.quantize import BLOCK, NF4, QuantizedLinear, Storage, dequantize, quantize

STORAGES = [Storage(format, double) for format in ("int8", "int4", "nf4") for double in (False, True)]

# From bitsandbytes' dQuantizeNF4 (csrc/kernels.cu): a value above a threshold has the code at least of its place.
THRESHOLDS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)


def matrix(*shape, seed=0):
    """Rows of very different sizes, an outlier and a row of zeros."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32) * np.exp(rng.normal(size=(*shape[:-1], 1))).astype(
        np.float32
    )
    weight[..., 0, 0], weight[..., 1, :] = 30, 0
    return jnp.asarray(weight)


def codes_of(values):
    """Codes of up to 63 values of a block whose largest is 1."""
    row = np.zeros((1, BLOCK), np.float32)
    row[0, : len(values)], row[0, -1] = values, 1
    packed = np.asarray(quantize(jnp.asarray(row), Storage("nf4"))["codes"])[0]
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: len(values)].tolist()


def test_nf4_levels_have_their_own_codes_and_come_back():
    assert codes_of(NF4) == list(range(16))
    row = jnp.asarray([NF4 * 4], jnp.float32) * 0.37
    back = dequantize(quantize(row, Storage("nf4")), Storage("nf4"), jnp.float32)
    np.testing.assert_array_equal(back, row)


def test_nf4_takes_the_nearest_level_as_bitsandbytes_does():
    at = np.float32(THRESHOLDS)
    assert codes_of(at) == list(range(15))  # exactly in the middle: the lower one
    assert codes_of(np.nextafter(at, np.float32(2))) == list(range(1, 16))


def test_the_first_code_is_in_the_high_bits():
    row = np.zeros((1, BLOCK), np.float32)
    row[0, :4] = (1, -1, 0, 1)
    assert np.asarray(quantize(jnp.asarray(row), Storage("nf4"))["codes"])[0, :2].tolist() == [0xF0, 0x7F]


# Half the widest gap between values, of one part of a block's absmax.
WIDEST = {"int8": 0.5 / 127, "int4": 0.5 / 7, "nf4": (1 - 0.6961928009986877) / 2}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_values_move_by_half_a_gap_at_most(storage):
    weight = matrix(16, 512)
    back = dequantize(quantize(weight, storage), storage, jnp.float32)
    absmax = np.abs(weight.reshape(16, -1, BLOCK)).max(-1)
    allowed = WIDEST[storage.format] * absmax
    if storage.double:  # and absmax itself by half a step of its row
        allowed = allowed + np.ptp(absmax, axis=-1, keepdims=True) / 255 / 2
    moved = np.abs(back - weight).reshape(16, -1, BLOCK).max(-1)
    assert np.all(moved <= allowed * (1 + 1e-5))
    assert not np.any(back[1])
    assert (
        np.sqrt(np.mean((back - weight) ** 2) / np.mean(weight**2))
        < {"int8": 0.01, "int4": 0.12, "nf4": 0.1}[storage.format]
    )


@pytest.mark.parametrize(
    ("storage", "bits"), [(Storage("nf4"), 4.5), (Storage("nf4", True), 4.14), (Storage("int8"), 8.5)]
)
def test_bits_a_parameter(storage, bits):
    arrays = jax.eval_shape(lambda w: quantize(w, storage), jax.ShapeDtypeStruct((64, 8192), jnp.bfloat16))
    stored = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values()) / (64 * 8192)
    assert stored == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("storage", [Storage("nf4", True), Storage("int8")], ids=str)
def test_the_same_bits_however_a_weight_is_split(storage):
    weight = matrix(2, 16, 512)
    expected = jax.jit(lambda w: quantize(w, storage))(weight)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    for spec in (PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")):
        split = jax.device_put(weight, NamedSharding(mesh, spec))
        jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda w: quantize(w, storage))(split), expected)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_layer_is_the_product_with_its_weight_and_keeps_only_codes(storage):
    layer = QuantizedLinear(128, 256, bias=True, std=0.1, param_dtype=jnp.float32, rngs=nnx.Rngs(0), storage=storage)
    arrays = {name: leaf[...] for name, leaf in nnx.state(layer).items() if name != "bias"}
    weight = dequantize(arrays, storage, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (4, 128))
    y, backward = jax.vjp(layer, x)
    np.testing.assert_allclose(y, x @ weight.T, atol=1e-4)
    np.testing.assert_allclose(backward(jnp.ones_like(y))[0], jnp.ones_like(y) @ weight, atol=1e-4)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert kept <= sum(leaf.nbytes for leaf in arrays.values()) + x.nbytes + 1024 < weight.nbytes / 2


def test_columns_that_blocks_do_not_divide_are_refused():
    with pytest.raises(UserError, match="96 columns"):
        QuantizedLinear(96, 64, bias=False, std=1.0, param_dtype=jnp.float32, rngs=nnx.Rngs(0), storage=Storage("nf4"))

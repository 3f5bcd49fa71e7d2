"""Weights in 8 or 4 bits, in blocks of 64 along a row, each block scaled by its largest absolute value (absmax).

Three formats, of which a weight is `absmax * value(code)`:

    int8    value = code / 127
    int4    value = (code - 8) / 7, code 1 to 15
    nf4     value = NF4[code]: the 4-bit NormalFloat of QLoRA (arXiv 2305.14314)

4-bit codes are packed two to a byte, the first in the high bits, as bitsandbytes packs them: bytes split over devices
and are gathered where 4-bit types are not. With `double`, absmax is stored in 8 bits: `low + step * code`, low and step
one a row. QLoRA takes blocks of 256 around their mean instead; rows split over devices as the weight does, and their
smallest and largest values, unlike a mean, are the same bits however they are split.

Shapes: weights are [..., out, in]; codes uint8 [..., out, in / 2], or int8 [..., out, in]; absmax [..., out, in / 64],
float32 or uint8; absmax_low, absmax_step float32 [..., out].
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Integer

from medllm_jax.errors import UserError
from medllm_jax.model.linear import LinearLayer

BLOCK = 64  # columns

# bitsandbytes' table (csrc/kernels.cu, dDequantizeNF4; functional.py, get_4bit_type("nf4")).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: the format of its codes, and whether absmax is quantised too."""

    format: Literal["int8", "int4", "nf4"]
    double: bool = False


def quantize(weight: Float[Array, "*blocks out in"], storage: Storage) -> dict[str, Array]:
    """The stored arrays, by name, of a weight [..., out, in]; `in` is a multiple of 64."""
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = (blocks / jnp.where(absmax == 0, 1, absmax)[..., None]).reshape(weight.shape)
    codes = _encode(scaled, storage.format)
    arrays = {"codes": codes if storage.format == "int8" else codes[..., ::2] << 4 | codes[..., 1::2]}
    if not storage.double:
        return arrays | {"absmax": absmax}
    low, high = jnp.min(absmax, axis=-1), jnp.max(absmax, axis=-1)
    step = (high - low) / 255
    code = jnp.round((absmax - low[..., None]) / jnp.where(step == 0, 1, step)[..., None])
    return arrays | {"absmax": code.astype(jnp.uint8), "absmax_low": low, "absmax_step": step}


def dequantize(arrays: dict[str, Array], storage: Storage, dtype) -> Float[Array, "*blocks out in"]:
    """The weight [..., out, in] that stored arrays stand for."""
    codes, absmax = arrays["codes"], arrays["absmax"].astype(jnp.float32)
    if storage.double:
        absmax = arrays["absmax_low"][..., None] + arrays["absmax_step"][..., None] * absmax
    # Where codes are packed, what is put together are values of `dtype`, and not the larger ones before.
    halves = [codes] if storage.format == "int8" else [codes >> 4, codes & 15]
    scales = jnp.repeat(absmax, halves[0].shape[-1] // absmax.shape[-1], axis=-1)
    values = [(_decode(half, storage.format) * scales).astype(dtype) for half in halves]
    return jnp.stack(values, axis=-1).reshape(*absmax.shape[:-1], -1)


def _encode(scaled: Float32[Array, "*shape"], format: str) -> Integer[Array, "*shape"]:
    """The code of the nearest value; for NF4, of the lower one where two are equally near, as in bitsandbytes."""
    if format == "int8":
        return jnp.round(127 * scaled).astype(jnp.int8)
    if format == "int4":
        return (jnp.round(7 * scaled) + 8).astype(jnp.uint8)
    middles = ((np.array(NF4[1:]) + np.array(NF4[:-1])) / 2).astype(np.float32)
    return functools.reduce(operator.add, [(scaled > middle).astype(jnp.uint8) for middle in middles])


def _decode(codes: Integer[Array, "*shape"], format: str) -> Float32[Array, "*shape"]:
    """float32 values, -1 to 1, of codes."""
    if format == "int8":
        return codes.astype(jnp.float32) / 127
    if format == "int4":
        return (codes.astype(jnp.float32) - 8) / 7
    # A tree of selections: it fuses with what is around it, where a look-up in a table would be a gather.
    values = [jnp.float32(value) for value in NF4]
    for bit in (1, 2, 4, 8):
        is_set = codes & bit != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class QuantizedLinear(LinearLayer):
    """``y = x W^T (+ b)`` of a frozen, quantised W; the product is computed in ``x``'s dtype.

    gather: what is done to each stored array, [out, ...], before it is used. Pinning them to where the product needs
    them lets them travel between devices, and not the weight that they stand for.
    Raises UserError for in_features that blocks don't divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        std: float,
        param_dtype,
        rngs: nnx.Rngs,
        storage: Storage,
        gather: Callable[[jax.Array], jax.Array] = lambda array: array,
    ):
        if in_features % BLOCK:
            raise UserError(f"a weight of {in_features} columns can't be quantised: blocks of {BLOCK} don't divide it")
        weight = std * jax.random.normal(rngs.params(), (out_features, in_features))
        for name, array in quantize(weight, storage).items():
            setattr(self, name, nnx.Param(array))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None
        self.storage, self.gather = storage, gather

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        names = ("codes", "absmax", "absmax_low", "absmax_step") if self.storage.double else ("codes", "absmax")
        y = self._product({name: getattr(self, name)[...] for name in names}, x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def _product(self, arrays: dict[str, jax.Array], x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        # The backward pass needs the weight again: keeping it from the forward pass would undo the quantisation.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(arrays: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            weight = dequantize(jax.tree.map(self.gather, arrays), self.storage, x.dtype)
            return jnp.einsum("...i,oi->...o", x, weight)

        return product(arrays, x)

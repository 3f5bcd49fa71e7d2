"""The linear layer, stored as Hugging Face stores it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class LinearLayer(nnx.Module):
    """A layer [..., in] -> [..., out], however its weight is stored."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError


class Linear(LinearLayer):
    """``y = x W^T (+ b)``.

    weight: [out, in], bias: [out], in ``param_dtype``; the product is computed in ``x``'s dtype.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, std: float, param_dtype, rngs: nnx.Rngs):
        shape = (out_features, in_features)
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

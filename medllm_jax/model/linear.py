"""The linear layer, stored as Hugging Face stores it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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
        y = product(x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*B in"], weight: Float[Array, "out in"], dtype: Any = None) -> Float[Array, "*B out"]:
    """``x W^T``, in a dtype (default x's). In its backward pass the narrower operand is turned.

    The weight's gradient is a product over tokens of two matrices [tokens, ...], one of which a CPU copies to turn it.
    Left to itself it turns the output's gradient, which is the wide one at gate, up and an LM head.
    """
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)


def _product_forward(x, weight, dtype):
    return product(x, weight, dtype), (x, weight)


def _product_backward(dtype, residuals, d_y):
    x, weight = residuals
    d_y = d_y.astype(x.dtype)
    if x.shape[-1] < d_y.shape[-1]:
        d_weight = jnp.einsum("...i,...o->io", x, d_y).T
    else:
        d_weight = jnp.einsum("...o,...i->oi", d_y, x)
    return jnp.einsum("...o,oi->...i", d_y, weight), d_weight


product.defvjp(_product_forward, _product_backward)

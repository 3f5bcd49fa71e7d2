"""Annotated shapes and dtypes are checked while tests run."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from medllm_jax.model.attention import TokenLayout, attend_in_blocks, visible
from medllm_jax.model.qwen2 import rotary
from tests import shapes


@pytest.mark.parametrize("name", shapes.CHECKED)
def test_the_modules_are_there(name):
    importlib.import_module(name)


def test_a_wrong_shape_or_dtype_is_refused_under_jit_too():
    ids = jnp.zeros((2, 8), jnp.int32)
    layout = TokenLayout(jnp.arange(8), ids, ids)
    q, k = jnp.zeros((2, 8, 4, 16)), jnp.zeros((2, 8, 2, 16))
    assert visible(layout, layout).shape == (2, 8, 8)
    assert jax.jit(attend_in_blocks)(q, k, k, layout, layout).shape == q.shape
    for call in (attend_in_blocks, jax.jit(attend_in_blocks)):
        with pytest.raises(TypeCheckError):
            call(q, k[:1], k, layout, layout)
    with pytest.raises(TypeCheckError):
        rotary(jnp.zeros((2, 8)), 16, 1e6)

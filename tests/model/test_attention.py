import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import attention_on
from medllm_jax.model.attention import TokenLayout, attend_by_cudnn, attend_in_blocks, visible

# Rows of segments with branches, and padding at the end: segment ids and branch ids.
SEGMENTS = "1111122222222200"
BRANCHES = "0000000011122200"


def place(rows: int = 1, repeat: int = 1) -> TokenLayout:
    """The row above, each token `repeat` times; row r is rolled so that no two rows are alike in the mask."""
    segments, branches = (np.repeat([int(c) for c in text], repeat) for text in (SEGMENTS, BRANCHES))
    shifted = [np.concatenate([np.full(r, 1), segments + 1])[: len(segments)] if r else segments for r in range(rows)]
    branched = [np.concatenate([np.zeros(r, int), branches])[: len(branches)] for r in range(rows)]
    index = jnp.arange(len(segments))
    return TokenLayout(index, jnp.asarray(np.stack(shifted), jnp.int32), jnp.asarray(np.stack(branched), jnp.int32))


def arrays(rows: int, tokens: int, heads: int, kv_heads: int, width: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = (heads, kv_heads, kv_heads)
    return [jax.random.normal(k, (rows, tokens, n, width)) for k, n in zip(keys, sizes, strict=True)]


def attend_slowly(q, k, v, where: TokenLayout) -> np.ndarray:
    """The definition, one query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segments, branches = np.asarray(where.segment_ids), np.asarray(where.branch_ids)
    group = q.shape[2] // k.shape[2]
    out = np.zeros_like(q)
    for row, query, head in np.ndindex(*q.shape[:3]):
        seen = [
            key
            for key in range(query + 1)
            if segments[row, key] == segments[row, query] and branches[row, key] in (0, branches[row, query])
        ]
        scores = k[row, seen, head // group] @ q[row, query, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights / weights.sum() @ v[row, seen, head // group]
    return out


def attend_at_once(q, k, v, query: TokenLayout, key: TokenLayout) -> jax.Array:
    """The definition, in a form that has gradients."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhe,bthe->bhqt", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1, where=visible(query, key)[:, None])
    return jnp.einsum("bhqt,bthe->bqhe", weights, v)


def test_visible_is_the_rule_spelt_out():
    where = place()
    seen = np.asarray(visible(where, where))[0]
    for query, key in np.ndindex(seen.shape):
        same = SEGMENTS[query] == SEGMENTS[key]
        allowed = BRANCHES[key] in ("0", BRANCHES[query])
        assert seen[query, key] == (key <= query and same and allowed), (query, key)
    # The three sights that the rule is about: response to prompt, response to itself, chosen hidden from rejected.
    assert seen[11, 5]
    assert seen[12, 11]
    assert not seen[11, 10]
    assert not seen[8, 11]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_is_the_definition(heads, kv_heads):
    where = place(rows=2)
    q, k, v = arrays(2, len(SEGMENTS), heads, kv_heads, 8)
    exact = attend_slowly(q, k, v, where)
    for function in (attend_in_blocks, attend_at_once):
        np.testing.assert_allclose(jax.jit(function)(q, k, v, where, where), exact, atol=2e-6)


def test_attention_keeps_the_dtype_and_scores_in_float32():
    where = place()
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(1, len(SEGMENTS), 4, 2, 8))
    # Large scores that differ by less than bfloat16 can tell apart once scaled up: float32 softmax keeps them.
    out = attend_in_blocks(q * 30, k, v, where, where)
    assert out.dtype == jnp.bfloat16
    exact = attend_slowly(q * 30, k, v, where)
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 0.03


# cuDNN's own kernel needs a GPU; what it is told is the same for any implementation.
attend_by_cudnns_interface = functools.partial(attend_by_cudnn, implementation="xla")


@pytest.mark.parametrize(
    ("function", "repeat"), [(attend_in_blocks, 16), (attend_in_blocks, 3), (attend_by_cudnns_interface, 3)]
)
def test_back_ends_are_the_definition(function, repeat):
    """Values and gradients; 256 tokens are cut into blocks, 48 are not."""
    where = place(rows=2, repeat=repeat)
    q, k, v = arrays(2, repeat * len(SEGMENTS), 4, 2, 8)

    def weighted(function):
        def total(q, k, v):
            out = function(q, k, v, where, where)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape)))

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    found, whole = weighted(function), weighted(attend_at_once)
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found[1], whole[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_blocks_are_taken():
    """A row of 256 tokens really is cut: the scores of block n end where the block does."""
    for repeat, sizes in ((16, [64] * 4), (24, [64] * 6), (48, [96] * 8), (3, [48])):
        where = place(repeat=repeat)
        program = jax.make_jaxpr(attend_in_blocks)(*arrays(1, repeat * len(SEGMENTS), 2, 2, 4), where, where)
        exponentials = [eqn.outvars[0].aval.shape[-2:] for eqn in program.eqns if eqn.primitive.name == "exp"]
        assert exponentials == [(size, size * n) for n, size in enumerate(sizes, 1)]


def test_a_choice_that_the_devices_cannot_run_is_refused():
    choose = functools.partial(attention_on, make_mesh(MeshConfig()), precision=PrecisionConfig(), branches=True)
    assert choose("auto") is choose("xla") is attend_in_blocks
    for choice, needed in (("splash", "tpu"), ("cudnn", "gpu")):
        with pytest.raises(UserError, match=f"{choice} needs a {needed} and the devices are cpu"):
            choose(choice)

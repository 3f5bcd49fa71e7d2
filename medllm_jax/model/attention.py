"""Attention under the row rule: same segment, not later in the row, branch 0 or the query's own.

Every back end of whole rows has the signature of `attend_in_blocks`, and names what its backward pass needs beside q, k
and v `RESIDUALS`.

Shapes: B rows, Q queries and T keys a row, H query heads, K key/value heads, G = H / K, E width of a head.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

RESIDUALS = "attention"  # for remat policies

# Scores of one block are [B, H, Q / blocks, T]; later blocks see more keys. Eight blocks skip 7/16 of the products.
_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 64


class TokenLayout(NamedTuple):
    """Where tokens stand: index in the row int32 [S] or [], segment_ids and branch_ids int32 [B, S]."""

    index: Int[Array, "*S"]
    segment_ids: Int[Array, "B S"]
    branch_ids: Int[Array, "B S"]


def visible(query: TokenLayout, key: TokenLayout) -> Bool[Array, "B Q T"]:
    """bool [B, Q, T]: may this query see this key?"""
    not_later = key.index[None, :] <= query.index[:, None]
    same_segment = key.segment_ids[:, None, :] == query.segment_ids[:, :, None]
    key_branch = key.branch_ids[:, None, :]
    shared_or_own = (key_branch == 0) | (key_branch == query.branch_ids[:, :, None])
    return not_later[None] & same_segment & shared_or_own


def attend_in_blocks(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    query: TokenLayout,
    key: TokenLayout,
) -> Float[Array, "B Q H E"]:
    """Scaled dot-product attention, grouped-query, of whole rows (query is key); scores and softmax in float32.

    q: [B, Q, H, E]; k, v: [B, T, K, E]. Returns [B, Q, H, E] in v's dtype. A query that sees no key is not allowed
    (padding sees padding). It goes by causal blocks of queries: no block sees the keys after it.

    Heads come before tokens, and the queries that share keys are rows of one matrix: two products of a block, whose
    operands no back end has to turn.
    """
    batch, length, heads, width = q.shape
    kv_heads, most = k.shape[2], max(1, min(_MOST_BLOCKS, length // _SMALLEST_BLOCK))
    blocks = next(n for n in range(most, 0, -1) if length % n == 0)
    size, group = length // blocks, heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    # Split and put together again, they have gradients that are sums of parts: slices would have them padded to rows.
    of_q = jnp.split(q, blocks, axis=3)
    of_k, of_v = (jnp.split(x.transpose(0, 2, 1, 3), blocks, axis=2) for x in (k, v))

    def block(number: int) -> Float[Array, "B K G q E"]:
        start, end = number * size, (number + 1) * size
        queries = TokenLayout(query.index[start:end], query.segment_ids[:, start:end], query.branch_ids[:, start:end])
        keys = TokenLayout(key.index[:end], key.segment_ids[:, :end], key.branch_ids[:, :end])
        hidden = jnp.where(visible(queries, keys), 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
        seen_k, seen_v = (jnp.concatenate(x[: number + 1], axis=2) for x in (of_k, of_v))
        rows = of_q[number].reshape(batch, kv_heads, group * size, width)
        scores = jnp.einsum("bkme,bkte->bkmt", rows, seen_k, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, group, size, end) * width**-0.5 + hidden
        # A softmax whose division comes last: it then goes over [q, E] and not over [q, T].
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        rows = weights.astype(v.dtype).reshape(batch, kv_heads, group * size, end)
        out = jnp.einsum("bkmt,bkte->bkme", rows, seen_v, preferred_element_type=jnp.float32)
        out = out.reshape(batch, kv_heads, group, size, width) / jnp.sum(weights, axis=-1, keepdims=True)
        return out.astype(v.dtype)

    out = jnp.concatenate([block(number) for number in range(blocks)], axis=3)
    return checkpoint_name(out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width), RESIDUALS)


def attend_to_cache(
    q: Float[Array, "B Q H E"],
    keys: Float[Array, "B K E T"],
    values: Float[Array, "B K T E"],
    seen: Bool[Array, "B Q T"],
) -> Float[Array, "B Q H E"]:
    """`attend_in_blocks` of few queries to what a cache holds, as it lies there; seen: which columns each may see."""
    batch, queries, heads, width = q.shape
    kv_heads = keys.shape[1]
    q = q.reshape(batch, queries, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, width)  # the queries of all heads that share a key are rows of one product
    hidden = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)[:, None]
    hidden = jnp.tile(hidden, (1, 1, heads // kv_heads, 1))
    scores = jnp.einsum("bkqe,bket->bkqt", q, keys, preferred_element_type=jnp.float32) * width**-0.5 + hidden
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("bkqt,bkte->bkqe", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype)
    return out.reshape(batch, heads, queries, width).swapaxes(1, 2)


def attend_by_cudnn(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    query: TokenLayout,
    key: TokenLayout,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B Q H E"]:
    """`attend_in_blocks` by cuDNN's flash attention: bfloat16 or float16, on Nvidia GPUs.

    The rule is given as an array: bool [B, 1, Q, T] becomes a bias in q's dtype, 2 B Q T bytes that all heads share.
    cuDNN's own log-sum-exp has no name, so a remat policy that saves its output still runs its forward pass again.
    """
    mask = visible(query, key)[:, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return checkpoint_name(out, RESIDUALS)

"""Attention on TPU: the splash kernel (flash attention, arXiv 2205.14135, that skips blocks which causality hides).

Segments are the kernel's own. It knows nothing of branches, so they ride in the scores: each query gets a one-hot of
its branch as further columns, each key a large negative number in the columns of the branches that must not see it, and
q . k falls by so much that exp() is exactly 0. What is visible gets exactly 0 added. For rows of 4096 tokens and heads
128 wide this makes the kernels 1.45 times as long (1.31 forward, 1.54 backward: the bundles that the compiler schedules
for v5p), where a pass for each branch, merged by log-sum-exp, would take twice as long; heads of 64 take no longer,
since the products are 128 wide either way. Rows without branches carry no columns.

Shapes as in attention.py; G = H / K query heads share a key/value head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mqa,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from medllm_jax.model.attention import RESIDUALS, TokenLayout

MAX_BRANCH = 2

# The kernel works on tiles of 128 lanes; rows are padded to a multiple of it.
_LANES = 128
# Sides of a block, the best first. At 4096 tokens, E = 128 and bfloat16 the schedules for v5p add up to 66 thousand
# cycles forward and 105 backward a row and head with 1024, to 87 and 115 with 512, although a larger block spends more
# above the diagonal. From 1 KiB for a token's q and v on, blocks of 1024 may not fit into the VMEM.
_BLOCKS = (1024, 512, 256, 128)
_BYTES_FOR_1024 = 1024
_FORWARD_KEYS_AT_ONCE = 512
# One backward kernel for dq, dk and dv computes the scores once, 105 thousand cycles instead of 149, and holds as many
# partial dq, each as large as q, as a row has blocks of keys. From here on there are two kernels, which hold none.
_TOO_MANY_PARTS = 9
# A power of two, which every float format holds, far beyond any score.
_HIDDEN = -(2.0**30)


def make_splash(mesh: Mesh, heads: P, *, branches: bool, interpret: bool = False) -> Callable:
    """Attention for whole rows (query is key) with the signature of `attend_in_blocks`, run on each device's part.

    heads: how [B, S, H, E] lies on the mesh; S and E must be whole. branches: rows may have branches; a branch id above
    MAX_BRANCH, or above 0 without `branches`, makes NaN of that query and never a wrong number. interpret: run the
    kernel's definition on any platform, slowly.

    q is scaled in its own dtype; scores, softmax and sums are float32, but the parts of dq that the blocks of keys give
    are in q's dtype. Output and log-sum-exp are named `RESIDUALS` for remat policies.
    """
    run = functools.partial(_run, highest=MAX_BRANCH if branches else 0, interpret=interpret)
    rows = P(heads[0], None)
    # The kernel's outputs don't say over which axes they vary, so shard_map can't check it.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(heads,) * 3 + (rows,) * 2, out_specs=heads, check_vma=False)

    def splash(q: jax.Array, k: jax.Array, v: jax.Array, query: TokenLayout, key: TokenLayout) -> jax.Array:
        return sharded(q, k, v, query.segment_ids, query.branch_ids)

    return splash


def _run(q, k, v, segment_ids, branch_ids, *, highest: int, interpret: bool) -> jax.Array:
    """One device's rows and heads."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    scale = jnp.where(branch_ids <= highest, width**-0.5, jnp.nan)[..., None, None]
    q = (q * scale).astype(q.dtype)
    if highest:
        q, k = _with_branches(q, k, branch_ids, highest)
    # Padding has segment 0, and stands after every token that could see it.
    q, k, v, segment_ids = (
        jnp.pad(x, [(0, 0), (0, -length % _LANES)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, segment_ids)
    )
    q = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    # One call for each row and key head, which has the G query heads of that key head: the two cores of a chip share
    # out calls, and nothing else of a backward pass. One call for all heads of a row would leave a core idle.
    kernel = _kernel(q, v, interpret)
    out = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, SegmentIds(q=segment_ids, kv=segment_ids))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, width)[:, :length]


def _with_branches(q, k, branch_ids: jax.Array, highest: int) -> tuple[jax.Array, jax.Array]:
    """q and k with further columns whose part of q . k is 0 where the branch rule allows, and `_HIDDEN` elsewhere."""
    width = q.shape[-1]
    columns = jnp.arange(-(width + highest + 1) % _LANES + highest + 1)  # up to whole lanes, which they take anyway
    branch = branch_ids[..., None, None]
    hidden = (branch != 0) & (branch != columns)

    def beside(x: jax.Array, further: jax.Array) -> jax.Array:
        further = jnp.broadcast_to(further.astype(x.dtype), (*x.shape[:-1], len(columns)))
        return jnp.concatenate([x, further], axis=-1)

    return beside(q, branch == columns), beside(k, hidden * _HIDDEN)


def _kernel(q: jax.Array, v: jax.Array, interpret: bool) -> Callable:
    """The kernel for one of q [B, K, G, S, E] and v [B, K, S, E]: (q, k, v, segment ids) -> [G, S, E]."""
    heads, length, width = q.shape[2:]
    too_wide = (width + v.shape[-1]) * q.dtype.itemsize >= _BYTES_FOR_1024
    size = next(block for block in _BLOCKS[too_wide:] if length % block == 0)
    fused = length // size < _TOO_MANY_PARTS
    blocks = BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=min(size, _FORWARD_KEYS_AT_ONCE),
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=None if fused else size,
        block_kv_dq=None if fused else size,
        use_fused_bwd_kernel=fused,
    )
    return make_splash_mqa(
        MultiHeadMask([CausalMask((length, length))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

"""Qwen2.5: RMSNorm, rotary positions, grouped-query attention with QKV bias, SwiGLU.

Parameters are named and laid out as in Hugging Face's checkpoints, with the blocks' stacked along a first axis:
``layers/self_attn/q_proj/weight`` is [L, out, in]. The network follows `transformers` `Qwen2ForCausalLM`.

Shapes: B rows, S tokens a row, D hidden size, F MLP width, H query heads, K key/value heads, E width of a head,
V vocabulary, L blocks, C columns of a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from medllm_jax.config.schema import ModelConfig
from medllm_jax.model.attention import RESIDUALS, TokenLayout, attend_in_blocks, attend_to_cache, visible
from medllm_jax.model.linear import Linear


@dataclass(frozen=True)
class Backend:
    """What the same network runs on; every field has a default that works on one device.

    linear: a projection's name -> its layer's constructor. attention: for whole rows, signature of `attend_in_blocks`.
    constrain: `(array, kind) -> array` pins an activation's sharding, kind a row of `sharding.ACTIVATIONS`.
    remat: name of a row of `REMAT_POLICIES`. unroll: blocks that one iteration of the loop over them holds.
    """

    compute_dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    linear: Callable[[str], Callable] = lambda name: Linear
    attention: Callable = attend_in_blocks
    constrain: Callable[[jax.Array, str], jax.Array] = lambda array, kind: array


# Named values of a block that policies keep for the backward pass. A token has (H + 2 K) E elements of qkv, H E of
# attention, D of residual, F each of gate and up. Each element is a contraction over about D, so a byte kept saves as
# much time whichever it is, and memory alone decides how many.
_KEPT = {
    "attention": ("qkv", RESIDUALS),
    "attention_gate": ("qkv", RESIDUALS, "gate"),
    "attention_mlp": ("qkv", RESIDUALS, "gate", "up"),
    "elementwise": ("qkv", RESIDUALS, "residual", "gate", "up"),
}

# What jax.checkpoint keeps of a block for the backward pass, beside its input. There is none with remat "none".
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    **{name: jax.checkpoint_policies.save_only_these_names(*kept) for name, kept in _KEPT.items()},
    "attention_offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=_KEPT["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the columns seen so far: an array of all blocks each, or a tuple of one a block.

    keys: [L, B, K, E, C], or L times [B, K, E, C]: scores are then sums of whole runs of columns. values: the same with
    [C, E]. segment_ids: int32 [B, C], 0 where nothing may be seen; length: int32 scalar, columns already written.
    """

    keys: Float[Array, "L B K E C"] | tuple[Float[Array, "B K E C"], ...]
    values: Float[Array, "L B K C E"] | tuple[Float[Array, "B K C E"], ...]
    segment_ids: Int[Array, "B C"]
    length: Int[Array, ""]

    def with_columns(self, columns: int) -> "Cache":
        """The same with so many columns, at least as many as it has."""
        more = columns - self.segment_ids.shape[1]
        keys = jax.tree.map(lambda keys: _pad(keys, -1, more), self.keys)
        values = jax.tree.map(lambda values: _pad(values, -2, more), self.values)
        return Cache(keys, values, _pad(self.segment_ids, -1, more), self.length)


def _pad(array: jax.Array, axis: int, more: int) -> jax.Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return jnp.pad(array, widths)


Angles = tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]]  # cos and sin


class Embedding(nnx.Module):
    """Rows of ``weight`` [V, D] by token id."""

    def __init__(self, config: ModelConfig, backend: Backend, *, rngs: nnx.Rngs):
        self.backend = backend
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape, backend.param_dtype))

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        table = self.backend.constrain(self.weight[...].astype(self.backend.compute_dtype), "embedding")
        return self.backend.constrain(table[tokens], "hidden")


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight``, the mean square in float32."""

    def __init__(self, config: ModelConfig, *, param_dtype):
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), param_dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotary(positions: Int[Array, "B S"], width: int, theta: float) -> Angles:
    """cos and sin, float32 [B, S, 1, E / 2], of RoPE (arXiv 2104.09864) with base ``theta``."""
    frequencies = theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B S heads E"], cos: Float[Array, "B S 1 half"], sin: Float[Array, "B S 1 half"]
) -> Float[Array, "B S heads E"]:
    """Rotates heads, halves paired as Hugging Face pairs them: i with i + E / 2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with biases on q, k and v."""

    def __init__(self, config: ModelConfig, backend: Backend, *, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        hidden, width = config.hidden_size, config.dim_of_head
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        make = {"std": config.initializer_range, "param_dtype": backend.param_dtype, "rngs": rngs}
        self.q_proj = backend.linear("q_proj")(hidden, queries, bias=True, **make)
        self.k_proj = backend.linear("k_proj")(hidden, keys, bias=True, **make)
        self.v_proj = backend.linear("v_proj")(hidden, keys, bias=True, **make)
        self.o_proj = backend.linear("o_proj")(queries, hidden, bias=False, **make)

    def qkv(
        self, x: Float[Array, "B S D"], angles: Angles
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """q, k and v; q and k rotated."""
        q, k, v = (
            self.backend.constrain(proj(x).reshape(*x.shape[:-1], -1, self.config.dim_of_head), "heads")
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *angles), rotate(k, *angles)
        return checkpoint_name(q, "qkv"), checkpoint_name(k, "qkv"), checkpoint_name(v, "qkv")

    def out(self, attended: Float[Array, "B S H E"]) -> Float[Array, "B S D"]:
        return self.o_proj(attended.reshape(*attended.shape[:-2], -1))


class MLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, backend: Backend, *, rngs: nnx.Rngs):
        self.backend = backend
        hidden, width = config.hidden_size, config.intermediate_size
        make = {"bias": False, "std": config.initializer_range, "param_dtype": backend.param_dtype, "rngs": rngs}
        self.gate_proj = backend.linear("gate_proj")(hidden, width, **make)
        self.up_proj = backend.linear("up_proj")(hidden, width, **make)
        self.down_proj = backend.linear("down_proj")(width, hidden, **make)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        gate = checkpoint_name(self.gate_proj(x), "gate")
        up = checkpoint_name(self.up_proj(x), "up")
        return self.down_proj(self.backend.constrain(jax.nn.silu(gate) * up, "mlp"))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, backend: Backend, *, rngs: nnx.Rngs):
        self.backend = backend
        self.input_layernorm = RMSNorm(config, param_dtype=backend.param_dtype)
        self.self_attn = Attention(config, backend, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, param_dtype=backend.param_dtype)
        self.mlp = MLP(config, backend, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S D"], angles: Angles, attend_to: Callable
    ) -> tuple[Float[Array, "B S D"], Any]:
        """``attend_to(q, k, v) -> (attended, carry)`` holds the mask, and the cache if there is one."""
        attended, carry = attend_to(*self.self_attn.qkv(self.input_layernorm(x), angles))
        x = checkpoint_name(self.backend.constrain(x + self.self_attn.out(attended), "hidden"), "residual")
        x = self.backend.constrain(x + self.mlp(self.post_attention_layernorm(x)), "hidden")
        return x, carry


class Qwen2(nnx.Module):
    """The decoder. Its output is hidden states: `head_weight` turns them into logits where and when a caller wants."""

    def __init__(self, config: ModelConfig, backend: Backend = Backend(), *, rngs: nnx.Rngs):
        self.config, self.backend = config, backend
        self.embed_tokens = Embedding(config, backend, rngs=rngs)
        make_blocks = nnx.vmap(lambda rngs: Block(config, backend, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = make_blocks(rngs.split(config.num_hidden_layers))
        self.norm = RMSNorm(config, param_dtype=backend.param_dtype)
        make = {"std": config.initializer_range, "param_dtype": backend.param_dtype, "rngs": rngs}
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, **make)

    @property
    def head_weight(self) -> Float[Array, "V D"]:
        """The LM head, or the embedding where they are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        branch_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Final hidden states in the compute dtype; all arguments as in data/batch.py."""
        place = TokenLayout(jnp.arange(tokens.shape[1]), segment_ids, branch_ids)
        x, angles = self._embed(tokens, positions)
        structure, blocks = nnx.split(self.layers)

        def body(x, weights):
            x, _ = nnx.merge(structure, weights)(
                x, angles, lambda q, k, v: (self.backend.attention(q, k, v, place, place), None)
            )
            return x, None

        if self.backend.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.backend.remat], prevent_cse=False)
        x, _ = jax.lax.scan(body, x, blocks, unroll=self.backend.unroll)
        return self.norm(x)

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        columns: int,
        *,
        stacked: bool,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Hidden states of whole prompts, and a cache of C columns of which the first S are theirs; else as `extend`.

        stacked: the form of the cache, and so of the program of `extend`. One that scans the blocks is small; one that
        has them one after the other is what CPUs want: they would copy a block's part of a stack, for every token.
        """
        place = TokenLayout(jnp.arange(tokens.shape[1]), segment_ids, jnp.zeros_like(segment_ids))
        more = columns - tokens.shape[1]
        x, angles = self._embed(tokens, positions)
        structure, blocks = nnx.split(self.layers)

        def body(x, weights):
            def attend_and_keep(q, k, v):
                kept = _pad(k.transpose(0, 2, 3, 1), -1, more), _pad(v.transpose(0, 2, 1, 3), -2, more)
                return attend_in_blocks(q, k, v, place, place), kept

            return nnx.merge(structure, weights)(x, angles, attend_and_keep)

        x, (keys, values) = jax.lax.scan(body, x, blocks)
        if not stacked:
            keys, values = tuple(keys), tuple(values)
        length = jnp.array(tokens.shape[1], jnp.int32)
        return self.norm(x), Cache(keys, values, _pad(segment_ids, -1, more), length)

    def separate_blocks(self) -> list[Any]:
        """The weights of each block, cut out of the stacks, matrices turned to [in, out].

        XLA for CPUs cuts and turns them for every product of few rows; who has many such products does it once.
        """
        weights = nnx.split(self.layers)[1]
        return [_turned(jax.tree.map(lambda stack, at=at: stack[at], weights)) for at in self._numbers]

    def extend(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        cache: Cache,
        blocks: Sequence[Any] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Hidden states of S more columns after those in the cache, and the cache with them in it.

        Same rule, one branch: a column is seen by later ones of the same segment; padding columns have segment 0.

        blocks: `separate_blocks()`, for a cache that is not stacked; by default made here.
        """
        start = cache.length
        segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, start))
        query = TokenLayout(start + jnp.arange(tokens.shape[1]), segment_ids, jnp.zeros_like(segment_ids))
        key = TokenLayout(jnp.arange(segments.shape[1]), segments, jnp.zeros_like(segments))
        seen = visible(query, key)
        x, angles = self._embed(tokens, positions)
        structure, stacked = nnx.split(self.layers)

        def attention(keys, values, *number):
            """Keys and values are the block's own, or those of all blocks, of which it is the one with this number."""

            def attend_and_keep(q, k, v):
                new = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
                new_keys, new_values = (array.reshape((1,) * len(number) + array.shape) for array in new)
                kept_keys = jax.lax.dynamic_update_slice(keys, new_keys, (*number, 0, 0, 0, start))
                kept_values = jax.lax.dynamic_update_slice(values, new_values, (*number, 0, 0, start, 0))
                attended = attend_to_cache(q, kept_keys[number], kept_values[number], seen)
                return attended, (kept_keys, kept_values)

            return attend_and_keep

        def body(carry, layer):
            # The cache is carried, not scanned over: it is updated in place instead of being copied every step.
            x, kept = carry
            number, weights = layer
            return nnx.merge(structure, weights)(x, angles, attention(*kept, number)), None

        if isinstance(cache.keys, tuple):
            kept = []
            for turned, *own in zip(blocks or self.separate_blocks(), cache.keys, cache.values, strict=True):
                x, new = nnx.merge(structure, _turned(turned))(x, angles, attention(*own))
                kept.append(new)
            keys, values = zip(*kept, strict=True)
        else:
            layers = jnp.array(self._numbers), stacked
            (x, (keys, values)), _ = jax.lax.scan(body, (x, (cache.keys, cache.values)), layers)
        return self.norm(x), Cache(keys, values, segments, start + tokens.shape[1])

    @property
    def _numbers(self) -> range:
        return range(self.config.num_hidden_layers)

    def _embed(self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"]) -> tuple[Float[Array, "B S D"], Angles]:
        return self.embed_tokens(tokens), rotary(positions, self.config.dim_of_head, self.config.rope_theta)


def _turned(weights: Any) -> Any:
    """A tree with its matrices transposed."""
    return jax.tree.map(lambda weight: weight.T if weight.ndim == 2 else weight, weights)

"""The one table of weight names: ours, and Hugging Face's.

Both sides store a weight in the same layout, [out, in]; ours has the blocks' stacked on a first axis.
"""

from typing import NamedTuple

import jax
from flax import nnx

from medllm_jax.config.schema import ModelConfig
from medllm_jax.distributed.sharding import path_of
from medllm_jax.model.qwen2 import Qwen2

# Parameter path -> name in a checkpoint, in the order in which checkpoints hold them.
WEIGHTS: tuple[tuple[str, str], ...] = (
    ("embed_tokens/weight", "model.embed_tokens.weight"),
    ("layers/self_attn/q_proj/weight", "model.layers.{layer}.self_attn.q_proj.weight"),
    ("layers/self_attn/q_proj/bias", "model.layers.{layer}.self_attn.q_proj.bias"),
    ("layers/self_attn/k_proj/weight", "model.layers.{layer}.self_attn.k_proj.weight"),
    ("layers/self_attn/k_proj/bias", "model.layers.{layer}.self_attn.k_proj.bias"),
    ("layers/self_attn/v_proj/weight", "model.layers.{layer}.self_attn.v_proj.weight"),
    ("layers/self_attn/v_proj/bias", "model.layers.{layer}.self_attn.v_proj.bias"),
    ("layers/self_attn/o_proj/weight", "model.layers.{layer}.self_attn.o_proj.weight"),
    ("layers/mlp/gate_proj/weight", "model.layers.{layer}.mlp.gate_proj.weight"),
    ("layers/mlp/up_proj/weight", "model.layers.{layer}.mlp.up_proj.weight"),
    ("layers/mlp/down_proj/weight", "model.layers.{layer}.mlp.down_proj.weight"),
    ("layers/input_layernorm/weight", "model.layers.{layer}.input_layernorm.weight"),
    ("layers/post_attention_layernorm/weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    ("norm/weight", "model.norm.weight"),
    ("lm_head/weight", "lm_head.weight"),
)


class Tensor(NamedTuple):
    """A tensor of a checkpoint: its name and shape, the parameter it belongs to, and its block (None: not in one)."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None


class RowRange(NamedTuple):
    """Consecutive rows of a tensor: those from `first` to before `last`."""

    tensor: Tensor
    first: int
    last: int


def in_words(tensor: Tensor, config: ModelConfig) -> str:
    """Where a tensor is in the model, for people who wait."""
    return tensor.name if tensor.layer is None else f"layer {tensor.layer + 1} of {config.num_hidden_layers}"


def row_ranges(tensor: Tensor, rows: int) -> list[RowRange]:
    """All rows of a tensor in order, in ranges of at most so many."""
    size = tensor.shape[0]
    return [RowRange(tensor, first, min(first + rows, size)) for first in range(0, size, rows)]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of the model, blocks stacked."""
    state = nnx.state(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {path_of(key_path): tuple(leaf.shape) for key_path, leaf in leaves}


def tensors_of(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of this shape: the embedding, block after block, the last norm, the head.

    LookupError if the model has a parameter that is not in the table.
    """
    shapes = parameter_shapes(config)
    rows = [(path, name) for path, name in WEIGHTS if path in shapes]
    if unnamed := shapes.keys() - {path for path, _ in rows}:
        raise LookupError(f"parameters without a name in the table: {', '.join(sorted(unnamed))}")

    stacked = [(path, name) for path, name in rows if "{layer}" in name]
    blocks = [
        Tensor(name.format(layer=layer), shapes[path][1:], path, layer)
        for layer in range(config.num_hidden_layers)
        for path, name in stacked
    ]
    around = [Tensor(name, shapes[path], path, None) for path, name in rows if "{layer}" not in name]
    return [around[0], *blocks, *around[1:]]

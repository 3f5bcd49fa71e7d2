"""A tiny random Qwen2 checkpoint in Hugging Face's format, made without torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.tiny import make_tokenizer

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def make_hf_folder(
    folder: str | Path,
    *,
    tied: bool = True,
    dtype: str = "float32",
    shards: int = 1,
    layers: int = 2,
    heads: tuple[int, int] = (4, 2),
    hidden: int = 32,
    head_dim: int | None = None,
    vocab: int = 288,
    rope_theta: float = 10_000.0,
    tokenizer: bool = True,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes config.json, generation_config.json, safetensors files and, if asked for, a tokenizer into a folder.

    heads: query and key/value heads. Every weight is random and matters: biases are not zero, norms not one. The
    tokenizer has up to 284 tokens, so a model with one needs ``vocab`` >= 284. ``config`` overrides config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 512,
        "max_window_layers": layers,
        "num_attention_heads": heads[0],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
        **({} if head_dim is None else {"head_dim": head_dim}),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 2]}))
    if tokenizer:
        make_tokenizer(folder, vocab_size=284, like_qwen2=True)
    write_weights(folder, dict(random_weights(settings, DTYPES[dtype], seed)), shards)
    return folder


def random_weights(config: dict[str, Any], dtype: np.dtype, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor of a checkpoint, scaled so that all of them move the logits."""
    rng = np.random.default_rng(seed)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + std * rng.standard_normal(shape)).astype(dtype)

    def matrix(out: int, into: int) -> np.ndarray:
        return draw(out, into, std=into**-0.5)

    yield "model.embed_tokens.weight", draw(config["vocab_size"], hidden, std=0.3)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.self_attn.{name}_proj.weight", matrix(size, hidden)
            yield f"{block}.self_attn.{name}_proj.bias", draw(size, std=0.3)
        yield f"{block}.self_attn.o_proj.weight", matrix(hidden, queries)
        yield f"{block}.mlp.gate_proj.weight", matrix(width, hidden)
        yield f"{block}.mlp.up_proj.weight", matrix(width, hidden)
        yield f"{block}.mlp.down_proj.weight", matrix(hidden, width)
        yield f"{block}.input_layernorm.weight", draw(hidden, std=0.2, mean=1.0)
        yield f"{block}.post_attention_layernorm.weight", draw(hidden, std=0.2, mean=1.0)
    yield "model.norm.weight", draw(hidden, std=0.2, mean=1.0)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", draw(config["vocab_size"], hidden, std=0.3)


def write_weights(folder: Path, weights: dict[str, np.ndarray], shards: int = 1) -> None:
    """One model.safetensors, or several files that the tensors are dealt to, and their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(weights)}
    for file in files:
        part = {name: value for name, value in weights.items() if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def our_model(folder: str | Path, *, remat: str = "none") -> tuple[Any, Any, Any]:
    """Shape, structure and float32 parameters of the model in a folder: `nnx.merge(structure, params)` runs it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from flax.traverse_util import unflatten_dict

    from medllm_jax.conversion.hf_weights import open_hf
    from medllm_jax.conversion.verify import stacked_weights
    from medllm_jax.model.qwen2 import Backend, Qwen2

    model = open_hf(folder)
    structure, _ = nnx.split(nnx.eval_shape(lambda: Qwen2(model.config, Backend(remat=remat), rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), unflatten_dict(stacked_weights(model), sep="/"))
    return model.config, structure, params

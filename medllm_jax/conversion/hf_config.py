"""config.json and generation_config.json: a ModelConfig and a tokenizer in Hugging Face's terms, and back."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from medllm_jax.config.foreign import ForeignSettings, Key, anything
from medllm_jax.config.load import build, to_plain
from medllm_jax.config.schema import ModelConfig
from medllm_jax.errors import UserError
from medllm_jax.storage.json_files import read_json

_ARCHITECTURE = "Qwen2ForCausalLM"

_FULL = "only full attention can be converted"
_UNSCALED = "rope scaling changes the positions: only unscaled rotary positions can be converted"

# How positions are rotated: `rope_parameters` of transformers 5, `rope_scaling` of transformers 4.
_ROPE = ForeignSettings(
    understood={"rope_theta": Key(float, None)},
    harmless={"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1, None)},
    hints={"rope_type": _UNSCALED, "type": _UNSCALED},
)


def _no_window(value: Any, beside: Mapping[str, Any]) -> bool:
    return not value or beside.get("sliding_window", 4096) is None  # transformers' default


def _full_attention(value: Any, beside: Mapping[str, Any]) -> bool:
    return value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"})


def _is_id(value: Any, beside: Mapping[str, Any]) -> bool:
    return value is None or type(value) is int


def _are_ids(value: Any, beside: Mapping[str, Any]) -> bool:
    return all(_is_id(each, beside) for each in (value if isinstance(value, list) else [value]))


# config.json of a Qwen2 model, as transformers 4 and 5 write it; the defaults are those of its Qwen2Config. A shape has
# none: a file that does not say it was not written for the weights beside it.
_QWEN2 = ForeignSettings(
    understood={
        "vocab_size": Key(int),
        "hidden_size": Key(int),
        "intermediate_size": Key(int),
        "num_hidden_layers": Key(int),
        "num_attention_heads": Key(int),
        "num_key_value_heads": Key(int, nullable=True),
        "head_dim": Key(int, None, nullable=True),
        "rms_norm_eps": Key(float, 1e-6),
        "tie_word_embeddings": Key(bool, False),
        "max_position_embeddings": Key(int, 32768),
        "initializer_range": Key(float, 0.02),
        "rope_theta": Key(float, None, nullable=True),
        "rope_parameters": Key(dict, None, nullable=True),
        "rope_scaling": Key(dict, None, nullable=True),
    },
    harmless={
        # What the model here computes.
        "model_type": ("qwen2",),
        "architectures": ([_ARCHITECTURE], None, []),
        "hidden_act": ("silu",),
        "attention_dropout": (0,),
        "partial_rotary_factor": (1, None),
        "use_sliding_window": _no_window,
        "layer_types": _full_attention,
        "quantization_config": (None, {}),
        "is_encoder_decoder": (False,),
        "is_decoder": (False,),
        "is_causal": (True, None),
        "add_cross_attention": (False,),
        "cross_attention_hidden_size": (None,),
        "tie_encoder_decoder": (False,),
        "chunk_size_feed_forward": (0,),
        "pruned_heads": ({}, None),
        "attention_bias": (True, None),
        "mlp_bias": (False, None),
        "pretraining_tp": (1, None),
        "use_mrope": (False, None),
        # They say something of a window that is used only where use_sliding_window says so.
        "sliding_window": anything,
        "max_window_layers": anything,
        # The tokenizer and generation_config.json beside it say where text ends.
        "bos_token_id": _is_id,
        "eos_token_id": _are_ids,
        "pad_token_id": _is_id,
        "tokenizer_class": anything,
        # How the file was made, how the weights are stored (their own headers say it), and how they are run elsewhere.
        "_name_or_path": anything,
        "_commit_hash": anything,
        "_attn_implementation": anything,
        "_attn_implementation_autoset": anything,
        "_attn_implementation_internal": anything,
        "attn_implementation": anything,
        "dtype": anything,
        "torch_dtype": anything,
        "torchscript": anything,
        "transformers_version": anything,
        "transformers.js_config": anything,
        "unsloth_fixed": anything,
        "unsloth_version": anything,
        "use_bfloat16": anything,
        "use_cache": anything,
        # What a call returns, and what heads of other tasks are called.
        "output_attentions": anything,
        "output_hidden_states": anything,
        "return_dict": (True, None),
        "id2label": anything,
        "label2id": anything,
        "num_labels": anything,
        "problem_type": anything,
        "finetuning_task": anything,
        "task_specific_params": anything,
    },
    hints={
        "model_type": f"only {_ARCHITECTURE} of model_type 'qwen2' can be converted",
        "architectures": f"only {_ARCHITECTURE} of model_type 'qwen2' can be converted",
        "use_sliding_window": f"sliding-window attention: {_FULL}",
        **dict.fromkeys(("bos_token_id", "pad_token_id"), "the id of a token, or null, is expected"),
        "eos_token_id": "the id of a token, a list of them, or null is expected",
        "layer_types": f"sliding-window attention: {_FULL}",
        "quantization_config": "quantised weights: convert the checkpoint they were made from",
        "auto_map": "a model with code of its own: only what transformers itself computes can be converted",
    },
)


def read_config(folder: epath.Path) -> ModelConfig:
    """The shape of the model in a folder, from a config.json that transformers 4 or 5 wrote.

    Raises UserError where the file is missing, or asks for something that the model here does not compute, or is not
    known to.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / "checkpoints").exists():
            raise UserError(f"{folder} has no config.json: it is a run folder; `medllm convert to-hf` exports it")
        raise UserError(f"{folder} has no config.json: the folder of a Hugging Face checkpoint is expected")
    content, where = read_json(path), str(path)
    # What it is a model of is judged first: the other keys of another model mean nothing here.
    values = _QWEN2.read({"model_type": content.get("model_type"), **content}, where)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    theta = _rope_theta(values, where)
    return build(ModelConfig, values | {"rope_theta": theta}, where=where)


def _rope_theta(values: dict[str, Any], where: str) -> float:
    """Transformers 4 has rope_theta and rope_scaling, transformers 5 both in rope_parameters; a file may have all."""
    tables = {key: values.pop(key) for key in ("rope_parameters", "rope_scaling")}
    tables = {key: table for key, table in tables.items() if table}
    stated = [values.pop("rope_theta")]
    stated += [_ROPE.read(table, f"{where}: {key}")["rope_theta"] for key, table in tables.items()]
    found = sorted({theta for theta in stated if theta is not None})
    if len(found) > 1 or (len(tables) > 1 and tables["rope_parameters"] != tables["rope_scaling"]):
        raise UserError(
            f"{where}: rope_theta {' and '.join(map(str, found))}, {' and '.join(tables)}: readers differ in which of "
            "them they take: keep one"
        )
    return found[0] if found else 10_000.0


def config_json(config: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """config.json in the form of Qwen2.5's own, which transformers 4 and 5 both read.

    token_ids: ``bos_token_id`` and ``eos_token_id``, where known.
    """
    shape = {key: value for key, value in to_plain(config).items() if value is not None}
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "qwen2",
        **token_ids,
        **shape,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "torch_dtype": dtype,
    }


def token_ids_of(tokenizer: Any, generation: dict[str, Any] | None) -> dict[str, Any]:
    """Ids that begin and end text. The tokenizer of Qwen2.5 names no beginning; its generation config does."""
    first = (generation or {}).get("bos_token_id", tokenizer.bos_token_id)
    ids = {"bos_token_id": first, "eos_token_id": tokenizer.eos_token_id}
    return {name: value for name, value in ids.items() if value is not None}


def json_text(content: dict[str, Any]) -> str:
    """As a file for people, too."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

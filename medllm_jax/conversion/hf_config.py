"""config.json and generation_config.json: a ModelConfig and a tokenizer in Hugging Face's terms, and back."""

import json
from typing import Any

from etils import epath

from medllm_jax.config.load import build, to_plain
from medllm_jax.config.schema import ModelConfig
from medllm_jax.errors import UserError

_ARCHITECTURE = "Qwen2ForCausalLM"

# Keys without which the shape is unknown; the others have the defaults of transformers' Qwen2Config.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_OPTIONAL = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
}


def read_config(folder: epath.Path) -> ModelConfig:
    """The shape of the model in a folder, from a config.json that transformers 4 or 5 wrote.

    Raises UserError where the file is missing, or asks for something that the model here does not compute.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json: the folder of a Hugging Face checkpoint is expected")
    config = read_json(path)
    _check_supported(config, path)
    for key in _REQUIRED:
        if key not in config:
            raise UserError(f"{path}: {key} is missing")
    values = {key: config[key] for key in _REQUIRED}
    values |= {key: config.get(key, default) for key, default in _OPTIONAL.items()}
    return build(ModelConfig, values | {"rope_theta": _rope_theta(config, path)}, where=str(path))


def _check_supported(config: dict[str, Any], path: epath.Path) -> None:
    architectures = config.get("architectures") or [_ARCHITECTURE]
    if config.get("model_type") != "qwen2" or architectures != [_ARCHITECTURE]:
        raise UserError(
            f"{path}: architecture {', '.join(map(str, architectures))} of model_type {config.get('model_type')!r}: "
            f"only {_ARCHITECTURE} of model_type 'qwen2' can be converted"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']!r}: only 'silu' can be converted")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        raise UserError(f"{path}: sliding-window attention: only full attention can be converted")
    if config.get("quantization_config"):
        raise UserError(f"{path}: quantised weights: convert the checkpoint they were made from")


def _rope_theta(config: dict[str, Any], path: epath.Path) -> float:
    # transformers 4: rope_theta and rope_scaling; transformers 5: both in rope_parameters.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: rope_parameters {scaling!r}: a mapping is expected")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UserError(f"{path}: rope scaling {kind!r}: only unscaled rotary positions can be converted")
    return scaling.get("rope_theta", config.get("rope_theta", 10_000.0))


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


def read_json(path: epath.Path) -> dict[str, Any]:
    """The mapping in a JSON file; UserError if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping is expected, found {type(content).__name__}")
    return content


def json_text(content: dict[str, Any]) -> str:
    """As a file for people, too."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

"""Adapters as PEFT's files: adapter_config.json and adapter_model.safetensors."""

import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.foreign import ForeignSettings, Key, anything
from medllm_jax.config.load import build
from medllm_jax.config.schema import AdapterConfig, ModelConfig, Projection
from medllm_jax.conversion.hf_weights import Entry, listed, one_dtype, read_header, refuse_pickles
from medllm_jax.conversion.names import Tensor, tensors_of
from medllm_jax.errors import UserError
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.remote import names_in

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_NOTHING = (None, [], {})  # asks for nothing, where a list or a mapping would ask for something
_LORA_ONLY = "adapters here are plain LoRA"

# adapter_config.json of PEFT's LoRA, with the defaults of its LoraConfig. What is harmless leaves what PEFT merges: the
# base's weight plus scale B A.
_LORA = ForeignSettings(
    understood={
        "r": Key(int, 8),
        "lora_alpha": Key(float, 8.0),
        "lora_dropout": Key(float, 0.0),
        "use_rslora": Key(bool, False, nullable=True),
    },
    harmless={
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
        "target_modules": anything,  # read below: it may be a list or a word
        # How A and B begin. Others than these (pissa, olora, corda, loftq, lora_ga) begin with another base, too.
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
        "bias": ("none",),
        "lora_bias": (False, None),
        "fan_in_fan_out": (False, None),
        "use_dora": (False, None),
        "use_qalora": (False, None),
        "use_bdlora": (False, None),
        "ensure_weight_tying": (False, None),
        "alora_invocation_tokens": _NOTHING,
        "alpha_pattern": _NOTHING,
        "rank_pattern": _NOTHING,
        "exclude_modules": (*_NOTHING, ""),
        "layers_to_transform": _NOTHING,
        "layers_pattern": (*_NOTHING, ""),
        "layer_replication": _NOTHING,
        "modules_to_save": _NOTHING,
        "target_parameters": _NOTHING,
        "trainable_token_indices": (None,),
        "arrow_config": (None,),
        "corda_config": (None,),
        "kasa_config": (None,),
        "loftq_config": _NOTHING,
        "lora_ga_config": (None,),
        "megatron_config": (None,),
        "monteclora_config": (None,),
        "velora_config": (None,),
        "enable_lora": (None,),
        # They go with one of the keys above, and mean nothing without it.
        "eva_config": anything,
        "megatron_core": anything,
        "merge_weights": anything,
        "qalora_group_size": anything,
        # Where it came from, and what it is used for.
        "auto_mapping": anything,
        "base_model_name_or_path": anything,
        "inference_mode": anything,
        "peft_version": anything,
        "revision": anything,
        "runtime_config": anything,
    },
    hints={
        "peft_type": "only LORA can be converted",
        "task_type": "only adapters of a language model (CAUSAL_LM) can be converted",
        "init_lora_weights": (
            "its A and B stand on another base than the model's own weights: save it again with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        ),
        "bias": "trained biases are not done here",
        "use_dora": f"DoRA is not done here: {_LORA_ONLY}",
    },
)


class Adapter(NamedTuple):
    """Adapters in PEFT's files: settings, dtype, and where the tensors are."""

    path: epath.Path
    settings: AdapterConfig
    dtype: np.dtype
    entries: dict[str, Entry]


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter of PEFT's."""
    return (epath.Path(folder) / CONFIG).exists()


def tensors_of_adapter(config: ModelConfig, settings: AdapterConfig) -> list[Tensor]:
    """The tensors of adapters of a model, named as PEFT names them."""
    tensors = []
    for tensor in tensors_of(config):
        layer, _, name = tensor.path.rpartition("/")
        if name != "weight" or layer.rpartition("/")[2] not in settings.projections:
            continue
        module = tensor.name.removesuffix(".weight")
        out, into = tensor.shape
        for matrix, shape in (("A", (settings.rank, into)), ("B", (out, settings.rank))):
            name = f"base_model.model.{module}.lora_{matrix}.weight"
            tensors.append(Tensor(name, shape, f"{layer}/lora_{matrix}", tensor.layer))
    return tensors


def config_json(settings: AdapterConfig, base_name: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": sorted(settings.projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def open_adapter(folder: str, config: ModelConfig, storage: Mapping[str, Any]) -> Adapter:
    """Checks the files of an adapter for a model of this shape; reads no weights.

    storage: how the base is stored in training here, which PEFT's files don't say: `AdapterConfig`'s fields `base` and
    `double_quantization`. Raises UserError for adapters that training here doesn't know.
    """
    path = epath.Path(folder)
    settings = _settings(path, storage)
    names = names_in(path)
    if WEIGHTS not in names:
        refuse_pickles(path, names)
        raise UserError(f"{path} has no {WEIGHTS}: it stands beside {CONFIG} where PEFT saved the adapter")
    found = read_header(path / WEIGHTS)
    expected = {tensor.name: tensor for tensor in tensors_of_adapter(config, settings)}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        what = f"missing tensors: {listed(missing)}" if missing else f"tensors of no projection here: {listed(extra)}"
        blocks = config.num_hidden_layers
        raise UserError(f"{path / WEIGHTS}: {what}; {CONFIG} and a base of {blocks} blocks ask for {len(expected)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(
                f"{path / WEIGHTS}: {name} has shape {list(found[name].shape)}, "
                f"for the base it would be {list(tensor.shape)}"
            )
    dtype = one_dtype(path, {name: entry.dtype for name, entry in found.items()})
    return Adapter(path, settings, dtype, found)


def _settings(path: epath.Path, storage: Mapping[str, Any]) -> AdapterConfig:
    file = path / CONFIG
    content = read_json(file)
    # What kind it is is judged first: the other keys of another kind mean nothing here.
    values = _LORA.read({"peft_type": content.get("peft_type"), **content}, str(file))
    known = typing.get_args(Projection)
    targets = content.get("target_modules")
    if targets == "all-linear":
        targets = list(known)
    # PEFT writes names of projections, or of each module: those of all blocks, as the weights must then show.
    parts = [str(t).rpartition(".")[2] for t in targets] if isinstance(targets, list) else [repr(targets)]
    if not parts or set(parts) - set(known):
        wrong = listed(sorted(part[:60] for part in set(parts) - set(known))) or "[]"
        raise UserError(f"{file}: target_modules has {wrong}: some of {', '.join(known)} are expected")
    settings = {
        "rank": values["r"],
        "alpha": values["lora_alpha"],
        "dropout": values["lora_dropout"],
        "rslora": bool(values["use_rslora"]),
        "projections": [name for name in known if name in parts],
    }
    return build(AdapterConfig, settings | dict(storage), where=str(file))


def factors(adapter: Adapter, config: ModelConfig) -> dict[str, np.ndarray]:
    """Path -> factors of all blocks, [L, rank, in] or [L, out, rank]."""
    stacked: dict[str, list[np.ndarray]] = {}
    for tensor in tensors_of_adapter(config, adapter.settings):
        stacked.setdefault(tensor.path, []).append(adapter.entries[tensor.name].read())
    return {path: np.stack(blocks) for path, blocks in stacked.items()}


class AdapterWeights:
    """The adapters of a checkpoint, in tensors as PEFT names them."""

    def __init__(self, checkpoint: Checkpoint):
        if checkpoint.adapter is None:
            raise UserError(f"{checkpoint.run} holds a whole model, not adapters: export it without --adapter")
        self.checkpoint, self.settings, self.config = checkpoint, checkpoint.adapter, checkpoint.model
        self.tensors = tensors_of_adapter(self.config, self.settings)
        self._factors = checkpoint.host_params()
        self.dtype = next(iter(self._factors.values())).dtype

    def read(
        self, tensor: Tensor, first: int = 0, last: int | None = None, dtype: np.dtype | None = None
    ) -> np.ndarray:
        """Rows of one tensor, in a dtype (default: this one's)."""
        return self._factors[tensor.path][tensor.layer][first:last].astype(dtype or self.dtype, copy=False)

    def rows_at_a_time(self, tensor: Tensor) -> int:
        """All of them."""
        return tensor.shape[0]

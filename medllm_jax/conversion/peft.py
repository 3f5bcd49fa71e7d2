"""Adapters as PEFT's files: adapter_config.json and adapter_model.safetensors."""

import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.schema import AdapterConfig, ModelConfig, Projection
from medllm_jax.conversion.hf_config import read_json
from medllm_jax.conversion.hf_weights import Entry, listed, one_dtype, read_header, refuse_pickles
from medllm_jax.conversion.names import Tensor, tensors_of
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import names_in

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What PEFT's LoRA can be asked for and adapters here don't do, with the value that asks for nothing.
_NOT_DONE = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "exclude_modules": None,
}


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
    if content.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type {content.get('peft_type')!r}: only LORA can be converted")
    for key, nothing in _NOT_DONE.items():
        if content.get(key) not in (nothing, None):
            raise UserError(f"{file}: {key} is {content[key]!r}, which adapters here don't do")
    known = typing.get_args(Projection)
    targets = content.get("target_modules")
    if targets == "all-linear":
        targets = list(known)
    # PEFT writes names of projections, or of each module: those of all blocks, as the weights must then show.
    parts = [str(t).rpartition(".")[2] for t in targets] if isinstance(targets, list) else [repr(targets)]
    if not parts or set(parts) - set(known):
        wrong = listed(sorted(set(parts) - set(known))) or "[]"
        raise UserError(f"{file}: target_modules has {wrong}: some of {', '.join(known)} are expected")
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(content.get(key), kinds) or isinstance(content[key], bool):
            raise UserError(f"{file}: {key} is {content.get(key)!r}: a number is expected")
    return AdapterConfig(
        rank=content["r"],
        alpha=float(content["lora_alpha"]),
        dropout=float(content.get("lora_dropout") or 0.0),
        rslora=bool(content.get("use_rslora")),
        projections=tuple(name for name in known if name in parts),
        **storage,
    )


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

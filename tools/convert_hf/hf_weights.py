"""safetensors files, one or several with an index: reading tensor by tensor, and writing in any order.

A file is 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the tensors' bytes.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from medllm_jax.config import ModelConfig
from medllm_jax.errors import UserError
from tools.convert_hf.hf_config import read_config, read_json, write_json
from tools.convert_hf.names import Tensor, tensors_of

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NAMED = 3  # names that an error message lists


class HFFolder(NamedTuple):
    """A checkpoint whose files hold exactly the tensors its config asks for, all of one dtype.

    files: tensor name -> the file it is in.
    """

    path: Path
    config: ModelConfig
    dtype: np.dtype
    tensors: list[Tensor]
    files: dict[str, Path]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in host memory."""
        with safe_open(self.files[name], "numpy") as file:
            return file.get_tensor(name)


def open_hf(folder: str | Path) -> HFFolder:
    """Checks a folder by its config and the headers of its files; reads no weights.

    Raises UserError for a folder that is not a whole Qwen2 checkpoint in safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}: the folder of a Hugging Face checkpoint is expected")
    config = read_config(folder)
    tensors = tensors_of(config)
    indexed = _indexed_files(folder)
    found = {name: (entry, file) for file in _files(folder, indexed) for name, entry in _header(file).items()}
    _check_names(folder, config, {tensor.name for tensor in tensors}, found, indexed)
    for tensor in tensors:
        shape = found[tensor.name][0].shape
        if shape != tensor.shape:
            raise UserError(
                f"{folder}: {tensor.name} has shape {list(shape)}, config.json asks for {list(tensor.shape)}"
            )
    dtype = _one_dtype(folder, {tensor.name: found[tensor.name][0].dtype for tensor in tensors})
    return HFFolder(folder, config, dtype, tensors, {tensor.name: found[tensor.name][1] for tensor in tensors})


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def _header(file: Path) -> dict[str, _Entry]:
    try:
        with safe_open(file, "numpy") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
            return {name: _Entry(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}; download it again") from None


def _indexed_files(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name by the index, or None where there is no index."""
    path = folder / _INDEX
    if not path.exists():
        return None
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: weight_map is missing: a mapping of tensor names to file names is expected")
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: {tensor} is in {name!r}: the name of a .safetensors file beside it is expected")
    return names


def _files(folder: Path, indexed: dict[str, str] | None) -> list[Path]:
    single = folder / _SINGLE
    if indexed is not None:
        if single.exists() and single.name not in indexed.values():
            raise UserError(f"{folder} holds {_SINGLE} and {_INDEX}, which does not name it: remove one of them")
        files = [folder / name for name in sorted(set(indexed.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UserError(f"{folder}: {_names(missing)} missing, which {_INDEX} names: download what is missing")
        return files
    if single.exists():
        return [single]
    if any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has .safetensors files but no {_INDEX}: download the index too")
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has no .safetensors file, only {_names(pickles)}: pickle files are refused, since reading one "
            "can run code in it; save the model with safe_serialization=True"
        )
    raise UserError(f"{folder} has no .safetensors file: {_SINGLE}, or shards and {_INDEX}, are expected")


def _check_names(
    folder: Path,
    config: ModelConfig,
    expected: set[str],
    found: dict[str, tuple[_Entry, Path]],
    indexed: dict[str, str] | None,
) -> None:
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing:
        raise UserError(f"{folder}: missing tensors: {_names(missing)}; config.json asks for {len(expected)} tensors")
    if extra == ["lm_head.weight"] and config.tie_word_embeddings:
        raise UserError(
            f"{folder}: lm_head.weight is stored though config.json sets tie_word_embeddings: set it to false, "
            "or remove the tensor"
        )
    if extra:
        raise UserError(f"{folder}: tensors that a Qwen2 model of this config.json does not have: {_names(extra)}")
    if indexed is not None:
        wrong = sorted(name for name in expected if indexed.get(name) != found[name][1].name)
        if wrong:
            raise UserError(f"{folder / _INDEX} does not say where {_names(wrong)} is: make the index anew")


def _one_dtype(folder: Path, dtypes: dict[str, str]) -> np.dtype:
    examples = {dtype: name for name, dtype in dtypes.items()}
    for dtype, name in examples.items():
        if dtype not in DTYPES:
            raise UserError(f"{folder}: {name} is {dtype}: only {', '.join(DTYPES)} can be converted")
    if len(examples) > 1:
        listed = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(examples.items()))
        raise UserError(f"{folder}: tensors of several dtypes ({listed}): save the model in one")
    return DTYPES[next(iter(examples))]


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


class ShardWriter:
    """Writes tensors of known shapes into safetensors files of at most ``max_bytes`` of tensors, in any order.

    The files have their full size from the start; the index is written by `close`, after all the tensors.
    """

    def __init__(self, folder: Path, tensors: Sequence[Tensor], dtype: np.dtype, max_bytes: int):
        self._folder, self._dtype = folder, dtype
        shards = _split(tensors, dtype, max_bytes)
        names = [_SINGLE] if len(shards) == 1 else [_shard_name(i + 1, len(shards)) for i in range(len(shards))]
        self._weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        self._places: dict[str, tuple[Any, int]] = {}
        self._total = sum(_bytes(tensor, dtype) for tensor in tensors)
        self._files = ExitStack()
        for name, shard in zip(names, shards, strict=True):
            self._begin(self._files.enter_context((folder / name).open("wb")), shard)

    def _begin(self, file: Any, shard: list[Tensor]) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self._dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in shard:
            end = offset + _bytes(tensor, self._dtype)
            header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors are aligned
        start = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + offset)
        self._places |= {tensor.name: (file, start + header[tensor.name]["data_offsets"][0]) for tensor in shard}

    def write(self, name: str, value: np.ndarray) -> None:
        """One tensor, cast to the files' dtype."""
        file, offset = self._places.pop(name)
        file.seek(offset)
        file.write(np.ascontiguousarray(value.astype(self._dtype, copy=False)).view(np.uint8).data)

    def close(self) -> None:
        """Finishes the files, and writes the index where they are several."""
        if self._places:
            raise ValueError(f"tensors never written: {_names(sorted(self._places))}")
        self.abandon()
        if len(set(self._weight_map.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
            write_json(self._folder / _INDEX, index)

    def abandon(self) -> None:
        """Closes the files as they are."""
        self._files.close()


def _split(tensors: Sequence[Tensor], dtype: np.dtype, max_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _bytes(tensor, dtype) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _bytes(tensor, dtype)
    return shards


def _bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return int(np.prod(tensor.shape)) * dtype.itemsize


def _shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"

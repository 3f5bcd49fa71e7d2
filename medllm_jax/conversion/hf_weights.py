"""Reading safetensors files, one or several with an index, in a local folder or under gs://, in parts of tensors.

A file is 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the tensors' bytes.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from medllm_jax.config.schema import ModelConfig
from medllm_jax.conversion.hf_config import read_config, read_json
from medllm_jax.conversion.names import Tensor, tensors_of
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_folder, is_remote, kvstore_spec, names_in

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMED = 3  # names that an error message lists
_MAX_HEADER = 100 << 20  # bytes, as in the safetensors library


class Entry(NamedTuple):
    """A tensor in a file: its dtype's code, its shape, and where its bytes begin."""

    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """The rows from `first` to before `last` (default: all), in host memory. Safe to call from several threads."""
        rows = self.shape[0]
        last = rows if last is None else last
        dtype = DTYPES[self.dtype]
        row = dtype.itemsize * int(np.prod(self.shape[1:]))
        data = read_bytes(self.file, self.offset + first * row, (last - first) * row)
        return data.view(dtype).reshape(last - first, *self.shape[1:])


class HFFolder(NamedTuple):
    """A checkpoint whose files hold exactly the tensors its config asks for, all of one dtype."""

    path: epath.Path
    config: ModelConfig
    dtype: np.dtype
    tensors: list[Tensor]
    entries: dict[str, Entry]

    def read(self, tensor: Tensor, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows of one tensor, in host memory."""
        return self.entries[tensor.name].read(first, last)

    def identity(self) -> Any:
        """Plain values that another checkpoint, or this one after a change of its layout, does not share."""
        files = sorted({(entry.file.name, entry.file.stat().length) for entry in self.entries.values()})
        modified = [entry.stat().mtime for entry in sorted({e.file for e in self.entries.values()})]
        return {"files": [list(file) for file in files], "modified": modified, "dtype": self.dtype.name}


def open_hf(folder: str | os.PathLike) -> HFFolder:
    """Checks a folder by its config and the headers of its files; reads no weights.

    Raises UserError for a folder that is not a whole Qwen2 checkpoint in safetensors.
    """
    folder = epath.Path(folder)
    if not is_folder(folder):
        raise UserError(f"no folder at {folder}: the folder of a Hugging Face checkpoint is expected")
    config = read_config(folder)
    tensors = tensors_of(config)
    indexed = _indexed_files(folder)
    found = {name: entry for file in _files(folder, indexed) for name, entry in read_header(file).items()}
    _check_names(folder, config, {tensor.name for tensor in tensors}, found, indexed)
    for tensor in tensors:
        shape = found[tensor.name].shape
        if shape != tensor.shape:
            hint = ""
            if tensor.path in ("embed_tokens/weight", "lm_head/weight") and shape[1:] == tensor.shape[1:]:
                hint = f": the vocabulary is padded to {shape[0]} rows there, and vocab_size is {tensor.shape[0]}"
            raise UserError(
                f"{folder}: {tensor.name} has shape {list(shape)}, config.json asks for {list(tensor.shape)}{hint}"
            )
    dtype = one_dtype(folder, {tensor.name: found[tensor.name].dtype for tensor in tensors})
    return HFFolder(folder, config, dtype, tensors, {tensor.name: found[tensor.name] for tensor in tensors})


def read_bytes(file: epath.Path, offset: int, size: int) -> np.ndarray:
    """uint8 [size] of a file, from an offset on. UserError where the file ends before."""
    if is_remote(file):
        store = _kvstore(os.fspath(file.parent))
        data = np.frombuffer(store.read(file.name, byte_range=slice(offset, offset + size)).result().value, np.uint8)
    else:
        data = np.empty(size, np.uint8)
        with Path(file).open("rb", buffering=0) as opened:
            opened.seek(offset)
            read = 0
            while read < size and (count := opened.readinto(data[read:].data)):
                read += count
            data = data[:read]
    if len(data) != size:
        raise UserError(f"{file} ends too early: it has changed meanwhile, or was not copied whole; copy it again")
    return data


@functools.cache
def _kvstore(folder: str) -> ts.KvStore:
    return ts.KvStore.open(kvstore_spec(folder)).result()


def read_header(file: epath.Path) -> dict[str, Entry]:
    """Name -> place of every tensor of a file, which must be whole; UserError otherwise."""
    try:
        return _parse_header(file)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}; download it again") from None


def _parse_header(file: epath.Path) -> dict[str, Entry]:
    size = file.stat().length
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(read_bytes(file, 0, 8).tobytes(), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header should have {length} bytes")
    content = json.loads(read_bytes(file, 8, length).tobytes())
    content.pop("__metadata__", None)
    entries, end = {}, 0
    for name, fields in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, after) = tuple(map(int, fields["shape"])), fields["data_offsets"]
        dtype = DTYPES.get(fields["dtype"])
        if begin != end or after < begin or min(shape, default=0) < 0:
            raise ValueError(f"{name} is not where the tensor before it ends")
        if dtype is not None and after - begin != dtype.itemsize * int(np.prod(shape)):
            raise ValueError(f"{name} has {after - begin} bytes, which is not what its shape {list(shape)} takes")
        entries[name] = Entry(file, fields["dtype"], shape, 8 + length + begin)
        end = after
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    return entries


def _indexed_files(folder: epath.Path) -> dict[str, str] | None:
    """Tensor name -> file name by the index, or None where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return None
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: weight_map is missing: a mapping of tensor names to file names is expected")
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: {tensor} is in {name!r}: the name of a .safetensors file beside it is expected")
    return names


def _files(folder: epath.Path, indexed: dict[str, str] | None) -> list[epath.Path]:
    present = names_in(folder)
    if indexed is not None:
        if SINGLE in present and SINGLE not in indexed.values():
            raise UserError(f"{folder} holds {SINGLE} and {INDEX}, which does not name it: remove one of them")
        missing = sorted(set(indexed.values()) - present)
        if missing:
            raise UserError(f"{folder}: {listed(missing)} missing, which {INDEX} names: download what is missing")
        return [folder / name for name in sorted(set(indexed.values()))]
    if SINGLE in present:
        return [folder / SINGLE]
    if any(name.endswith(".safetensors") for name in present):
        raise UserError(f"{folder} has .safetensors files but no {INDEX}: download the index too")
    refuse_pickles(folder, present)
    raise UserError(f"{folder} has no .safetensors file: {SINGLE}, or shards and {INDEX}, are expected")


def refuse_pickles(folder: epath.Path, present: set[str]) -> None:
    """UserError where a folder's weights are pickled."""
    pickles = sorted(name for name in present if name.endswith(_PICKLES))
    if pickles:
        raise UserError(
            f"{folder} has no .safetensors file, only {listed(pickles)}: pickle files are refused, since reading one "
            "can run code in it; save the model with safe_serialization=True"
        )


def _check_names(
    folder: epath.Path,
    config: ModelConfig,
    expected: set[str],
    found: dict[str, Entry],
    indexed: dict[str, str] | None,
) -> None:
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing:
        raise UserError(f"{folder}: missing tensors: {listed(missing)}; config.json asks for {len(expected)} tensors")
    if extra == ["lm_head.weight"] and config.tie_word_embeddings:
        raise UserError(
            f"{folder}: lm_head.weight is stored though config.json sets tie_word_embeddings: set it to false, "
            "or remove the tensor"
        )
    if extra:
        raise UserError(f"{folder}: tensors that a Qwen2 model of this config.json does not have: {listed(extra)}")
    if indexed is not None:
        wrong = sorted(name for name in expected if indexed.get(name) != found[name].file.name)
        if wrong:
            raise UserError(f"{folder / INDEX} does not say where {listed(wrong)} is: make the index anew")


def one_dtype(folder: epath.Path, dtypes: dict[str, str]) -> np.dtype:
    """The dtype that all tensors have, by name -> code; UserError where it can't be converted or they differ."""
    examples = {dtype: name for name, dtype in dtypes.items()}
    for dtype, name in examples.items():
        if dtype not in DTYPES:
            raise UserError(f"{folder}: {name} is {dtype}: only {', '.join(DTYPES)} can be converted")
    if len(examples) > 1:
        examples_listed = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(examples.items()))
        raise UserError(f"{folder}: tensors of several dtypes ({examples_listed}): save the model in one")
    return DTYPES[next(iter(examples))]


def listed(names: list[str]) -> str:
    """The first few of some names."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest

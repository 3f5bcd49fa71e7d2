"""Reading safetensors files, one or several with an index, in a local folder or under gs://, in parts of tensors.

A file is 8 bytes of header length, a JSON header of names, dtypes, shapes and offsets, and the tensors' bytes.
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from medllm_jax.config.foreign import ForeignSettings, Key, anything
from medllm_jax.config.schema import ModelConfig
from medllm_jax.conversion.hf_config import read_config
from medllm_jax.conversion.names import Tensor, tensors_of
from medllm_jax.errors import UserError, first_line, quoted
from medllm_jax.storage.json_files import parse_json, read_json
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
_COMPARED_BYTES = 16 << 20
_MAX_HEADER = 32 << 20  # bytes: a hundred times what the largest model's takes
_HEADER = ForeignSettings({"dtype": Key(str), "shape": Key(list), "data_offsets": Key(list)}, {})
_INDEX = ForeignSettings({"weight_map": Key(dict)}, {"metadata": anything})


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
        row = dtype.itemsize * math.prod(self.shape[1:])
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
    """Checks a folder by its config and the headers of its files; reads no weights that are part of the model.

    Raises UserError for a folder that is not a whole Qwen2 checkpoint in safetensors.
    """
    folder = epath.Path(folder)
    if not is_folder(folder):
        raise UserError(f"no folder at {folder}: the folder of a Hugging Face checkpoint is expected")
    config = read_config(folder)
    indexed = _indexed_files(folder)
    found = _read_headers(_files(folder, indexed))
    if config.num_hidden_layers > len(found):  # before anything is built for each of them
        raise UserError(
            f"{folder}: config.json asks for {config.num_hidden_layers} blocks, and the files hold {len(found)} tensors"
        )
    tensors = tensors_of(config)
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
        raise ended_early(file)
    return data


def ended_early(file: epath.Path) -> UserError:
    """The error to raise for a file that has fewer bytes than its header says."""
    return UserError(f"{file} ends too early: it has changed meanwhile, or was not copied whole; copy it again")


@functools.cache
def _kvstore(folder: str) -> ts.KvStore:
    return ts.KvStore.open(kvstore_spec(folder)).result()


def read_header(file: epath.Path) -> dict[str, Entry]:
    """Name -> place of every tensor of a file, which must be whole; UserError otherwise."""
    try:
        return _parse_header(file)
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {first_line(error)}; download it again") from None


def _read_headers(files: list[epath.Path]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        entries = read_header(file)
        if twice := sorted(found.keys() & entries.keys()):
            raise UserError(f"{listed(twice)} stands in {found[twice[0]].file.name} and in {file}: remove one of them")
        found |= entries
    return found


def _parse_header(file: epath.Path) -> dict[str, Entry]:
    size = file.stat().length
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    length = int.from_bytes(read_bytes(file, 0, 8).tobytes(), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header should have {length} bytes")
    content = parse_json(read_bytes(file, 8, length).tobytes(), f"the header of {file}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ is {quoted(metadata)}: a mapping of names to texts is expected")
    entries, end = {}, 0
    for name, fields in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        values = _HEADER.read(fields, quoted(name, most=120))
        shape, (begin, after) = tuple(values["shape"]), values["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, after)):
            raise ValueError(f"{quoted(name, most=120)} has another shape, or other offsets, than whole numbers")
        dtype = DTYPES.get(values["dtype"])
        if begin != end or after < begin:
            raise ValueError(f"{quoted(name, most=120)} is not where the tensor before it ends")
        if dtype is not None and after - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(
                f"{quoted(name, most=120)} has {after - begin} bytes, which is not what its shape {quoted(shape)} takes"
            )
        entries[name] = Entry(file, values["dtype"], shape, 8 + length + begin)
        end = after
    if 8 + length + end != size:
        raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    return entries


def _indexed_files(folder: epath.Path) -> dict[str, str] | None:
    """Tensor name -> file name by the index, or None where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return None
    names = _INDEX.read(read_json(path), str(path))["weight_map"]
    if not names:
        raise UserError(f"{path}: weight_map is empty: a mapping of tensor names to file names is expected")
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path}: {quoted(tensor, str, most=120)} is in {quoted(name)}: the name of a .safetensors file "
                "beside it is expected"
            )
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
    missing = sorted(expected - found.keys())
    extra = sorted(name for name in found.keys() - expected if not _says_nothing_new(folder, name, config, found))
    if missing:
        raise UserError(f"{folder}: missing tensors: {listed(missing)}; config.json asks for {len(expected)} tensors")
    if extra:
        raise UserError(f"{folder}: tensors that a Qwen2 model of this config.json does not have: {listed(extra)}")
    if indexed is not None:
        wrong = sorted(name for name in expected if indexed.get(name) != found[name].file.name)
        if wrong:
            raise UserError(f"{folder / INDEX} does not say where {listed(wrong)} is: make the index anew")


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _says_nothing_new(folder: epath.Path, name: str, config: ModelConfig, found: dict[str, Entry]) -> bool:
    """Whether a tensor that the model does not have repeats what it has; UserError where it contradicts that."""
    if name == _HEAD and config.tie_word_embeddings:
        if _same_values(found[_HEAD], found.get(_EMBEDDING)):
            return True
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding though config.json sets tie_word_embeddings: set it "
            "to false, or remove the tensor"
        )
    if _FREQUENCIES.fullmatch(name):
        if _are_frequencies(found[name], config):
            return True
        raise UserError(
            f"{folder}: {name} has other frequencies than rope_theta {config.rope_theta:g} gives: set rope_theta to "
            "what the model was trained with, and remove the tensor"
        )
    return False


def _same_values(first: Entry, second: Entry | None) -> bool:
    """Whether two matrices are equal bit for bit; reads them in ranges."""
    if second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.dtype not in DTYPES or len(first.shape) != 2:
        return False
    rows = max(1, _COMPARED_BYTES // (DTYPES[first.dtype].itemsize * max(1, first.shape[1])))
    ranges = [(begin, min(begin + rows, first.shape[0])) for begin in range(0, first.shape[0], rows)]
    return all(first.read(*each).tobytes() == second.read(*each).tobytes() for each in ranges)


def _are_frequencies(entry: Entry, config: ModelConfig) -> bool:
    """Whether a tensor is rope_theta^(-2i/d), i < d/2, as its dtype has it."""
    half = config.dim_of_head // 2
    if entry.dtype not in DTYPES or entry.shape != (half,):
        return False
    expected = config.rope_theta ** (-np.arange(half) / half)
    limits = ml_dtypes.finfo(DTYPES[entry.dtype])
    tolerance = {"rtol": max(1e-5, 2 * float(limits.eps)), "atol": float(limits.smallest_subnormal)}
    return np.allclose(entry.read().astype(np.float64), expected, **tolerance)


def one_dtype(folder: epath.Path, dtypes: dict[str, str]) -> np.dtype:
    """The dtype that all tensors have, by name -> code; UserError where it can't be converted or they differ."""
    examples = {dtype: name for name, dtype in dtypes.items()}
    for dtype, name in examples.items():
        if dtype not in DTYPES:
            raise UserError(f"{folder}: {name} is {quoted(dtype, str)}: only {', '.join(DTYPES)} can be converted")
    if len(examples) > 1:
        examples_listed = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(examples.items()))
        raise UserError(f"{folder}: tensors of several dtypes ({examples_listed}): save the model in one")
    return DTYPES[next(iter(examples))]


def listed(names: list[str]) -> str:
    """The first few of some names."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(quoted(name, str, most=120) for name in names[:_NAMED]) + rest

"""From a Hugging Face checkpoint to a run folder that training, evaluation and generation start from."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from medllm_jax.checkpoint import orbax as checkpoint
from medllm_jax.checkpoint.arrays import chunk_shape
from medllm_jax.checkpoint.orbax import Base, StoredWeight
from medllm_jax.config.load import to_plain
from medllm_jax.conversion.folders import (
    ResumableFolder,
    ahead,
    check_room,
    full_disk_is_reported,
    holds_something,
    unfinished_folder,
)
from medllm_jax.conversion.hf_config import read_json
from medllm_jax.conversion.hf_weights import HFFolder, open_hf
from medllm_jax.conversion.names import Tensor
from medllm_jax.conversion.peft import factors, is_adapter, open_adapter
from medllm_jax.conversion.run_weights import fingerprint_of, open_run
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.distributed.sharding import parts_of
from medllm_jax.errors import UserError
from medllm_jax.model.quantize import BLOCK, Storage, quantize
from medllm_jax.storage import run_folder
from medllm_jax.storage.remote import remove_folder
from medllm_jax.terminal.progress import Console, size_in_words

_WORKERS = 2
_SLICE_BYTES = 16 << 20  # that a worker takes at least, where a weight has as many


def from_hf(
    source: str,
    target: str,
    *,
    storage: Storage | None = None,
    mesh: Mapping[str, int] | None = None,
    part: tuple[int, int] = (0, 1),
    resume: bool = False,
) -> None:
    """Converts the checkpoint in a folder, local or gs://, slice by slice; the weights keep their dtype.

    storage: how the projections are quantised, for a model that only adapters will be trained on. mesh: sizes of data,
    fsdp and tensor; weights are stored in the parts that devices of such a mesh will read. part: (number, of): which
    share of the work this process does, of a target that all of them see; the last to be ready completes it. resume:
    goes on with what was begun.
    Raises UserError for a source that is not a whole Qwen2 checkpoint, and for a target that holds something.
    """
    start = time.monotonic()
    number, parts = part
    if holds_something(target):
        raise UserError(f"{target} exists and is not empty: choose another folder, or remove it first")
    if is_adapter(source):
        raise UserError(f"{source} is an adapter of PEFT's: give --base too, the run folder of the model it belongs to")
    model = open_hf(source)
    has_tokenizer = _check_tokenizer(model)
    weights, slices = plan_of(model, storage, mesh)
    size = sum(each.bytes for each in slices)
    stored = sum(int(np.prod(weight.shape)) * weight.dtype.itemsize for weight in weights.values())
    check_room(target, stored)

    what = {"source": model.identity(), "storage": storage and to_plain(storage), "mesh": mesh and dict(mesh)}
    filling = ResumableFolder(target, what, part=number, parts=parts)
    filling.open(resume=resume)
    memory = size_in_words(memory_needed(slices))
    print(f"{source}: {size_in_words(size)} in {model.dtype.name}; it takes at most {memory} of memory", flush=True)
    try:
        with full_disk_is_reported(target):
            arrays = checkpoint.new_arrays(filling.folder, weights)
            todo = [each for each in slices[number::parts] if each.unit not in filling.done]
            _convert(model, arrays, storage, todo, filling)
            if not filling.finish():
                print(f"{target}: part {number + 1} of {parts} is done; the last part to be ready completes it")
                return
            if has_tokenizer:
                run_folder.copy_tokenizer(model.path, filling.folder)
            meta = {"model": to_plain(model.config), "source": {"name": _name(model)}}
            if storage is not None:
                meta["storage"] = to_plain(storage)
            checkpoint.finish_model(filling.folder, weights, meta)
            filling.settle()
    except FileNotFoundError:
        if parts == 1 or not checkpoint.steps(target):
            raise
        # Another part was ready at the same moment, and has put the folder in its place.
    except BaseException:
        if filling.keep():
            print(f"what is done is kept in {filling.folder}; --resume goes on with it", flush=True)
        raise
    parameters = sum(int(np.prod(tensor.shape)) for tensor in model.tensors)
    print(
        f"{target}: {parameters:,} parameters in {storage.format if storage else model.dtype.name}, "
        f"{'with' if has_tokenizer else 'WITHOUT'} tokenizer, {time.monotonic() - start:.1f} s"
    )


def from_peft(
    source: str, target: str, *, base: str, storage: str | None = None, double_quantization: bool = False
) -> None:
    """Makes a run folder of an adapter that PEFT saved, to go on training, to evaluate or to export.

    base: run folder of the model it belongs to. storage: how that is stored in training (default: as it is quantised,
    or else bfloat16).
    Raises UserError for an adapter that is not of this model, or that adapters here can't be.
    """
    if holds_something(target):
        raise UserError(f"{target} exists and is not empty: choose another folder, or remove it first")
    if not is_adapter(source):
        raise UserError(f"{source} has no adapter_config.json: with --base, the folder of an adapter is expected")
    run = open_run(base)
    if run.adapted is not None:
        raise UserError(f"{base} holds adapters: the whole model that they stand on is expected")
    if run.storage is not None:
        if storage not in (None, run.storage.format):
            raise UserError(f"--base-storage {storage}: {base} is stored in {run.storage.format}")
        storage, double_quantization = run.storage.format, run.storage.double
    adapter = open_adapter(
        source, run.config, {"base": storage or "bfloat16", "double_quantization": double_quantization}
    )
    fingerprint = fingerprint_of(run.arrays, "reading the base")
    place = str(checkpoint.checkpoints_of(base).parent)
    meta = {
        "base": Base(place, run.step, fingerprint)._asdict(),
        "config": {"adapter": to_plain(adapter.settings)},
    }
    remove_folder(unfinished_folder(target))  # of an adapter nothing is worth going on with
    filling = ResumableFolder(target, {"adapter": str(source)})
    filling.open(resume=False)
    weights = unflatten_dict(factors(adapter, run.config), sep="/")
    tokenizer = run_folder.find_tokenizer(base)
    if tokenizer is not None:
        run_folder.copy_tokenizer(tokenizer, filling.folder)
    checkpoint.write_model(filling.folder, jax.tree.map(jnp.asarray, weights), to_plain(run.config), **meta)
    filling.settle()
    size = sum(value.size for value in jax.tree.leaves(weights))
    print(
        f"{target}: {size:,} parameters of adapters in {adapter.dtype.name}, of the model in {place}, step {run.step}"
    )


# --- what goes where ---------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor goes: the weights that it is a block of, or all of, in chunks of so many of its rows."""

    tensor: Tensor
    weights: dict[str, StoredWeight]
    rows: int
    row_bytes: int
    quantised: bool


class Slice(NamedTuple):
    """Some rows of a tensor, which are converted together."""

    place: _Place
    first: int
    last: int

    @property
    def unit(self) -> str:
        return f"{self.place.tensor.name}:{self.first}"

    @property
    def bytes(self) -> int:
        return (self.last - self.first) * self.place.row_bytes


def plan_of(
    model: HFFolder, storage: Storage | None, mesh: Mapping[str, int] | None
) -> tuple[dict[str, StoredWeight], list[Slice]]:
    """Path -> how a weight will be stored, and the slices to convert in order; reads nothing."""
    places = [_placed(model, tensor, storage, mesh) for tensor in model.tensors]
    weights = {path: weight for place in places for path, weight in place.weights.items()}
    return weights, [each for place in places for each in _slices(place)]


def _placed(model: HFFolder, tensor: Tensor, storage: Storage | None, mesh: Mapping[str, int] | None) -> _Place:
    stacked = tensor.layer is not None
    blocks = (model.config.num_hidden_layers,) if stacked else ()
    row_bytes = model.dtype.itemsize * int(np.prod(tensor.shape[1:]))
    quantised = storage is not None and tensor.path.endswith("_proj/weight")
    if not quantised:
        shape = (*blocks, *tensor.shape)
        parts = None if mesh is None else parts_of(tensor.path, shape, mesh)
        chunk = chunk_shape(shape, model.dtype.itemsize, parts, stacked=stacked)
        rows = chunk[1] if stacked else chunk[0]
        return _Place(tensor, {tensor.path: StoredWeight(shape, model.dtype, chunk)}, rows, row_bytes, False)
    if tensor.shape[1] % BLOCK:
        raise UserError(
            f"{tensor.name} {list(tensor.shape)} can't be quantised: blocks of {BLOCK} don't divide its rows"
        )
    folder = tensor.path.rpartition("/")[0]
    arrays = jax.eval_shape(
        functools.partial(quantize, storage=storage), jax.ShapeDtypeStruct(tensor.shape, model.dtype)
    )
    shapes = {f"{folder}/{name}": ((*blocks, *array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
    # All arrays are written in the same rows, so that no two slices share a chunk.
    shape, dtype = shapes[f"{folder}/codes"]
    parts = None if mesh is None else parts_of(f"{folder}/codes", shape, mesh)
    rows = chunk_shape(shape, dtype.itemsize, parts, stacked=True)[1]
    weights = {}
    for path, (shape, dtype) in shapes.items():
        parts = (1,) * len(shape) if mesh is None else parts_of(path, shape, mesh)
        columns = (size // part for size, part in zip(shape[2:], parts[2:], strict=True))
        weights[path] = StoredWeight(shape, dtype, (1, rows, *columns))
    return _Place(tensor, weights, rows, row_bytes, True)


def _slices(place: _Place) -> list[Slice]:
    size = place.tensor.shape[0]
    rows = place.rows * max(1, _SLICE_BYTES // (place.rows * place.row_bytes))
    return [Slice(place, first, min(first + rows, size)) for first in range(0, size, rows)]


def memory_needed(slices: list[Slice]) -> int:
    """Bytes of host memory that the slices at work take at most: as read, in chunks, and as written."""
    largest = max(each.bytes * (6 if each.place.quantised else 3) for each in slices)
    return _WORKERS * largest


# --- the work ----------------------------------------------------------------------------------------------------


def _convert(
    model: HFFolder, arrays: dict[str, Any], storage: Storage | None, todo: list[Slice], filling: ResumableFolder
) -> None:
    def convert(each: Slice) -> Slice:
        place = each.place
        rows = model.read(place.tensor, each.first, each.last)
        values = {place.tensor.path: rows}
        if place.quantised:
            folder = place.tensor.path.rpartition("/")[0]
            values = {f"{folder}/{name}": np.asarray(array) for name, array in _quantizer(storage)(rows).items()}
        for path, value in values.items():
            block = arrays[path] if place.tensor.layer is None else arrays[path][place.tensor.layer]
            block[each.first : each.last].write(value, can_reference_source_data_indefinitely=True).result()
        return each

    total = sum(each.bytes for each in todo)
    done = 0
    with Console("converting", total, unit="bytes") as console:
        for each in ahead(convert, todo, workers=_WORKERS):
            filling.note(each.unit)
            done += each.bytes
            console.update(done, each.place.tensor.name, every_seconds=10)


@functools.cache
def _quantizer(storage: Storage) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    return jax.jit(functools.partial(quantize, storage=storage))


# --- what comes with the weights -----------------------------------------------------------------------------------


def _name(model: HFFolder) -> str:
    """What the model is called: by its config, if that is no path, or as its folder."""
    name = read_json(model.path / "config.json").get("_name_or_path") or ""
    return name if name and not name.startswith(("/", ".", "~")) else model.path.name


def _check_tokenizer(model: HFFolder) -> bool:
    """Is there a tokenizer, and does it fit? UserError if it can't be loaded, or has more tokens than the embedding."""
    if not any((model.path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        print(f"{model.path} has no tokenizer: the run folder will carry none, which is enough for training only")
        return False
    tokens = len(load_tokenizer(model.path))
    if tokens > model.config.vocab_size:
        raise UserError(
            f"{model.path}: the tokenizer has {tokens} tokens, the embedding {model.config.vocab_size}: "
            "they belong to different models"
        )
    return True

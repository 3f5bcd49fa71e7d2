"""From a Hugging Face checkpoint to a run folder that training, evaluation and generation start from."""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from medllm_jax.checkpoint.arrays import chunk_shape
from medllm_jax.checkpoint.chunk_files import chunk_files
from medllm_jax.checkpoint.handle import Base, open_checkpoint
from medllm_jax.checkpoint.write_model import StoredWeight, finish_model, new_arrays, write_model
from medllm_jax.config.load import to_plain
from medllm_jax.conversion.card import made_before
from medllm_jax.conversion.companions import check_companions, check_sums
from medllm_jax.conversion.finite import NonFinite
from medllm_jax.conversion.folders import (
    ResumableFolder,
    ahead,
    check_room,
    full_disk_is_reported,
    holds_something,
    unfinished_folder,
)
from medllm_jax.conversion.hf_weights import HFFolder, ended_early, open_hf
from medllm_jax.conversion.names import RowRange, Tensor, in_words, row_ranges
from medllm_jax.conversion.peft import factors, is_adapter, open_adapter
from medllm_jax.conversion.run_weights import RunWeights
from medllm_jax.distributed.sharding import parts_of, reading_parts
from medllm_jax.errors import UserError
from medllm_jax.model.quantize import BLOCK, Storage, quantize
from medllm_jax.storage import hub, run_folder
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import is_remote, remove_folder
from medllm_jax.terminal.progress import Console, size_in_words

_log = logging.getLogger(__name__)

_WORKERS = 2
_COPIERS = min(4, os.cpu_count() or 1)  # workers where no weight passes through memory
_RANGE_BYTES = 16 << 20  # a worker takes at least so many, where a weight has them


@sole_writer("target", beside=True, unit=lambda part, **_: f"part-{part[0] + 1}" if part[1] > 1 else "")
def from_hf(
    source: str,
    target: str,
    *,
    storage: Storage | None = None,
    mesh: Mapping[str, int] | None = None,
    part: tuple[int, int] = (0, 1),
    resume: bool = False,
    allow_non_finite: bool = False,
) -> None:
    """Converts the checkpoint in a folder, local or gs://, or on the hub, range by range; the weights keep their dtype.

    storage: how the projections are quantised, for a model that only adapters will be trained on. mesh: sizes of data,
    fsdp and tensor; weights are stored in the parts that devices of such a mesh will read. part: (number, of): which
    share of the work this process does, of a target that all of them see; the last to be ready completes it. resume:
    goes on with what was begun. allow_non_finite: NaN and infinite weights are taken as they are.
    Raises UserError for a source that is not a whole Qwen2 checkpoint, or not what its SHA256SUMS says, and for a
    target that holds something.
    """
    start = time.monotonic()
    number, parts = part
    if holds_something(target):
        raise UserError(f"{target} exists and is not empty: choose another folder, or remove it first")
    found = hub.find_folder(source, hub.MODEL, option="SRC")
    if is_adapter(found.folder):
        raise UserError(f"{source} is an adapter of PEFT's: give --base too, the run folder of the model it belongs to")
    model = open_hf(found.folder)
    has_tokenizer = check_companions(model.path, model.config.vocab_size)
    weights, tasks = plan_of(model, storage, mesh)
    size = sum(task.bytes for task in tasks)
    stored = sum(int(np.prod(weight.shape)) * weight.dtype.itemsize for weight in weights.values())
    check_room(target, stored)
    check_sums(model.path, part, whole=found.name is None)

    what = {"source": model.identity(), "storage": storage and to_plain(storage), "mesh": mesh and dict(mesh)}
    filling = ResumableFolder(target, what, part=number, parts=parts)
    filling.open(resume=resume)
    is_copied = storage is None and not is_remote(model.path) and not is_remote(target)
    memory = size_in_words(memory_needed(tasks, is_copied=is_copied))
    _log.info(f"{source}: {size_in_words(size)} in {model.dtype.name}; it takes at most {memory} of memory")
    try:
        with full_disk_is_reported(target):
            arrays = new_arrays(filling.folder, weights)
            todo = [task for task in tasks[number::parts] if task.name not in filling.done]
            odd = NonFinite()
            convert = functools.partial(_copy if is_copied else _rewrite, model, arrays, storage, odd)
            _work_off(convert, todo, model, filling, workers=_COPIERS if is_copied else _WORKERS)
            if not allow_non_finite:
                odd.check(source, model.dtype, stored=model.dtype)
            with filling.completion() as is_due:
                if not is_due:
                    _log.info(f"{target}: part {number + 1} of {parts} is done; the last part to be ready completes it")
                    return
                if has_tokenizer:
                    run_folder.copy_tokenizer(model.path, filling.folder)
                meta = {
                    "model": to_plain(model.config),
                    "source": _origin(found, _name(model)) | made_before(model.path),
                }
                if storage is not None:
                    meta["storage"] = to_plain(storage)
                finish_model(filling.folder, weights, meta)
                filling.settle()
    except BaseException:
        if filling.keep():
            _log.info(f"what is done is kept in {filling.folder}; --resume goes on with it")
        raise
    parameters = sum(int(np.prod(tensor.shape)) for tensor in model.tensors)
    _log.info(
        f"{target}: {parameters:,} parameters in {storage.format if storage else model.dtype.name}, "
        f"{'with' if has_tokenizer else 'WITHOUT'} tokenizer, {time.monotonic() - start:.1f} s"
    )


@sole_writer("target", beside=True)
def from_peft(
    source: str,
    target: str,
    *,
    base: str,
    storage: str | None = None,
    double_quantization: bool = False,
    allow_non_finite: bool = False,
) -> None:
    """Makes a run folder of an adapter that PEFT saved, to go on training, to evaluate or to export.

    base: run folder of the model it belongs to. storage: how that is stored in training (default: as it is quantised,
    or else in its own dtype, of float16 in float32: what PEFT merges the adapter into).
    allow_non_finite: NaN and infinite numbers in it are taken as they are.
    Raises UserError for an adapter that is not of this model, or that adapters here can't be.
    """
    if holds_something(target):
        raise UserError(f"{target} exists and is not empty: choose another folder, or remove it first")
    found = hub.find_folder(source, hub.MODEL, option="SRC")
    if not is_adapter(found.folder):
        raise UserError(
            f"{source} has no adapter_config.json: with --base, the folder of an adapter is expected; leave --base out "
            "to convert a whole model"
        )
    try:
        checkpoint = open_checkpoint(base)
    except UserError as error:
        raise UserError(f"--base {error}") from None
    if checkpoint.adapter is not None:
        raise UserError(f"--base {base} holds adapters: the whole model that they stand on is expected")
    stored = checkpoint.storage
    if stored is not None:
        if storage not in (None, stored.format):
            raise UserError(f"--base-storage {storage}: {base} is stored in {stored.format}")
        storage, double_quantization = stored.format, stored.double
    elif storage is None:
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(checkpoint.stored_params())}
        storage = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    how = {"base": storage, "double_quantization": double_quantization}
    adapter = open_adapter(found.folder, checkpoint.model, how)
    check_sums(adapter.path, whole=found.name is None)
    matrices, odd = factors(adapter, checkpoint.model), NonFinite()
    for path, value in matrices.items():
        odd.count(path, value)
    if not allow_non_finite:
        odd.check(source, adapter.dtype, stored=adapter.dtype)
    fingerprint = RunWeights(checkpoint).fingerprint("reading the base")
    meta = {
        "base": Base(checkpoint.run_folder, checkpoint.step, fingerprint)._asdict(),
        "config": {"adapter": to_plain(adapter.settings)},
        "source": _origin(found, adapter.path.name),
    }
    remove_folder(unfinished_folder(target))  # of an adapter nothing is worth going on with
    filling = ResumableFolder(target, {"adapter": str(source)})
    filling.open(resume=False)
    weights = unflatten_dict(matrices, sep="/")
    tokenizer = run_folder.find_tokenizer(base)
    if tokenizer is not None:
        run_folder.copy_tokenizer(tokenizer, filling.folder)
    write_model(filling.folder, jax.tree.map(jnp.asarray, weights), to_plain(checkpoint.model), **meta)
    filling.settle()
    size = sum(value.size for value in jax.tree.leaves(weights))
    _log.info(
        f"{target}: {size:,} parameters of adapters in {adapter.dtype.name}, "
        f"of the model in {checkpoint.run_folder}, step {checkpoint.step}"
    )


# --- what goes where ---------------------------------------------------------------------------------------------


class _Target(NamedTuple):
    """Where a tensor goes: the weights that it is a block of, or all of, in chunks of so many of its rows."""

    tensor: Tensor
    weights: dict[str, StoredWeight]
    rows: int
    row_bytes: int
    quantised: bool


class ConversionTask(NamedTuple):
    """Rows of a tensor that are converted together, and where they go."""

    target: _Target
    rows: RowRange

    @property
    def name(self) -> str:
        return f"{self.rows.tensor.name}:{self.rows.first}"

    @property
    def bytes(self) -> int:
        return (self.rows.last - self.rows.first) * self.target.row_bytes


def plan_of(
    model: HFFolder, storage: Storage | None, mesh: Mapping[str, int] | None
) -> tuple[dict[str, StoredWeight], list[ConversionTask]]:
    """Path -> how a weight will be stored, and the tasks in order; reads nothing."""
    targets = [_target_of(model, tensor, storage, mesh) for tensor in model.tensors]
    weights = {path: weight for target in targets for path, weight in target.weights.items()}
    return weights, [task for target in targets for task in _tasks(target)]


def _target_of(model: HFFolder, tensor: Tensor, storage: Storage | None, mesh: Mapping[str, int] | None) -> _Target:
    stacked = tensor.layer is not None
    blocks = (model.config.num_hidden_layers,) if stacked else ()
    row_bytes = model.dtype.itemsize * int(np.prod(tensor.shape[1:]))
    if storage is None or not tensor.path.endswith("_proj/weight"):
        shape = (*blocks, *tensor.shape)
        parts = (1, 1) if mesh is None else reading_parts(tensor.path, shape, mesh)
        chunk = chunk_shape(shape, model.dtype.itemsize, parts[stacked], stacked=stacked)
        rows = chunk[1] if stacked else chunk[0]
        return _Target(tensor, {tensor.path: StoredWeight(shape, model.dtype, chunk)}, rows, row_bytes, False)
    if tensor.shape[1] % BLOCK:
        raise UserError(
            f"{tensor.name} {list(tensor.shape)} can't be quantised: blocks of {BLOCK} don't divide its rows"
        )
    folder = tensor.path.rpartition("/")[0]
    arrays = jax.eval_shape(
        functools.partial(quantize, storage=storage), jax.ShapeDtypeStruct(tensor.shape, model.dtype)
    )
    shapes = {f"{folder}/{name}": ((*blocks, *array.shape), np.dtype(array.dtype)) for name, array in arrays.items()}
    # All arrays are written in the same rows, so that no two tasks share a chunk.
    shape, dtype = shapes[f"{folder}/codes"]
    parts = (1, 1) if mesh is None else parts_of(f"{folder}/codes", shape, mesh)
    rows = chunk_shape(shape, dtype.itemsize, parts[1], stacked=True)[1]
    weights = {}
    for path, (shape, dtype) in shapes.items():
        parts = (1,) * len(shape) if mesh is None else parts_of(path, shape, mesh)
        columns = (size // part for size, part in zip(shape[2:], parts[2:], strict=True))
        weights[path] = StoredWeight(shape, dtype, (1, rows, *columns))
    return _Target(tensor, weights, rows, row_bytes, True)


def _tasks(target: _Target) -> list[ConversionTask]:
    rows = target.rows * max(1, _RANGE_BYTES // (target.rows * target.row_bytes))
    return [ConversionTask(target, each) for each in row_ranges(target.tensor, rows)]


def memory_needed(tasks: list[ConversionTask], *, is_copied: bool = False) -> int:
    """Bytes of host memory that the tasks at work take at most: as read, in chunks, and as written.

    is_copied: files are copied, and memory takes what doesn't fill a chunk.
    """
    if is_copied:
        return 3 * _COPIERS * max(task.target.rows * task.target.row_bytes for task in tasks)
    largest = max(task.bytes * (6 if task.target.quantised else 3) for task in tasks)
    return _WORKERS * largest


# --- the work ----------------------------------------------------------------------------------------------------


def _work_off(
    convert: Callable[[ConversionTask], bool],
    todo: list[ConversionTask],
    model: HFFolder,
    filling: ResumableFolder,
    *,
    workers: int,
) -> None:
    total = sum(task.bytes for task in todo)
    done = 0
    with Console("converting weights", total, unit="bytes") as console:
        for task, is_odd in ahead(lambda task: (task, convert(task)), todo, workers=workers):
            if not is_odd:  # else it is counted again when the conversion is resumed
                filling.note(task.name)
            done += task.bytes
            console.update(done, in_words(task.rows.tensor, model.config), every_seconds=10)


def _rewrite(
    model: HFFolder, arrays: dict[str, ts.TensorStore], storage: Storage | None, odd: NonFinite, task: ConversionTask
) -> bool:
    """Writes a task's rows as they are to be stored; has it any that are no numbers?"""
    tensor, first, last = task.rows
    rows = model.read(tensor, first, last)
    is_odd = odd.count(tensor.name, rows)
    values = {tensor.path: rows}
    if storage is not None and task.target.quantised:
        folder = tensor.path.rpartition("/")[0]
        values = {f"{folder}/{name}": np.asarray(array) for name, array in _quantizer(storage)(rows).items()}
    for path, value in values.items():
        block = arrays[path] if tensor.layer is None else arrays[path][tensor.layer]
        block[first:last].write(value, can_reference_source_data_indefinitely=True).result()
    return is_odd


def _copy(
    model: HFFolder, arrays: dict[str, ts.TensorStore], storage: Storage | None, odd: NonFinite, task: ConversionTask
) -> bool:
    """`_rewrite` of local files: chunks of whole rows are copied from file to file."""
    tensor, first, last = task.rows
    chunks = chunk_files(arrays[tensor.path], tensor.layer)
    if chunks is None:
        return _rewrite(model, arrays, storage, odd, task)
    copied = last - last % chunks.rows  # a chunk that is not full is filled up otherwise
    is_odd = False

    def look(block: np.ndarray) -> None:
        nonlocal is_odd
        is_odd |= odd.count(tensor.name, block.view(model.dtype))

    entry = model.entries[tensor.name]
    with Path(entry.file).open("rb", buffering=0) as source:
        for begin in range(first, copied, chunks.rows):
            if not chunks.fill(begin, source.fileno(), entry.offset + begin * chunks.row_bytes, look):
                raise ended_early(entry.file)
    if copied < last:
        is_odd |= _rewrite(model, arrays, storage, odd, task._replace(rows=RowRange(tensor, copied, last)))
    return is_odd


@functools.cache
def _quantizer(storage: Storage) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    return jax.jit(functools.partial(quantize, storage=storage))


def _origin(found: hub.Found, name: str) -> dict[str, str]:
    """What is noted of the source. A model of the hub's is called as it is there, whatever its files call it."""
    return {"name": name} if found.name is None else {"name": found.name, "commit": found.commit or ""}


def _name(model: HFFolder) -> str:
    """What the model is called: by its config, if that is no path, or as its folder."""
    name = read_json(model.path / "config.json").get("_name_or_path")
    return name if isinstance(name, str) and name and not name.startswith(("/", ".", "~")) else model.path.name

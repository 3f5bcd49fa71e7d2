"""Orbax: the only file that knows it.

A folder of checkpoints holds one folder a step, each with up to three items: ``params`` (the weights that are
trained), ``training`` (optimizer state and random key) and ``meta`` (plain values: the model's shape, the data
position, the run's config, and what `handle.Checkpoint` reads of them).
A converted Hugging Face model is a step 0 without ``training``.
"""

import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint import v1 as ocp

from medllm_jax.checkpoint import arrays
from medllm_jax.checkpoint.arrays import UnreadableError
from medllm_jax.checkpoint.digests import seal
from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.distributed.sharding import path_of
from medllm_jax.errors import first_line
from medllm_jax.storage.faults import passes
from medllm_jax.storage.remote import is_remote

COMMITTED = "commit_success.txt"  # marks a checkpoint as whole where nothing can be renamed, as in a bucket
PLACEHOLDER = ocp.PLACEHOLDER  # stands for an array that is not read
_SAVE = "_CHECKPOINT_METADATA"


def _hush() -> None:
    """Keeps from the terminal what Orbax says beside its results and errors.

    It warns of checkpoints without its key-value store: models are written range by range. Where one array can't be
    read, it leaves the readings of others to Python, which tells of each, with a traceback, when it removes them.
    """
    logging.getLogger("absl").addFilter(_not_of_key_value_store)
    logging.getLogger("asyncio").addFilter(_not_of_readings)
    warnings.filterwarnings("ignore", r"coroutine '\w+\._background_load' was never awaited", RuntimeWarning)
    _leave_out_readings()


def _not_of_key_value_store(record: logging.LogRecord) -> bool:
    return "TensorStore data files not found" not in str(record.msg)


def _not_of_readings(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in str(record.msg) or "orbax" not in str(record.msg)


@functools.cache
def _leave_out_readings() -> None:
    others = sys.unraisablehook

    def hook(left: Any) -> None:
        codes = [frame.f_code for frame, _ in traceback.walk_tb(left.exc_traceback)]
        codes += [left.object.cr_code] if inspect.iscoroutine(left.object) else []
        of_orbax = any("orbax" in Path(code.co_filename).parts for code in codes)
        if not of_orbax and str(left.exc_value) != "Event loop is closed":  # which is what a reading ends in
            others(left)

    sys.unraisablehook = hook


# --- the folder ----------------------------------------------------------------------------------------------------


def checkpoints_of(run: str | os.PathLike) -> epath.Path:
    """The checkpoint folder of a run folder, absolute: Orbax takes no other."""
    folder = epath.Path(run)
    return (folder if is_remote(folder) else folder.resolve()) / "checkpoints"


def steps(run: str | os.PathLike) -> list[int]:
    """Steps of the whole checkpoints of a run folder, in order. Lists the folder."""
    return whole_and_other_steps(run)[0]


def whole_and_other_steps(run: str | os.PathLike) -> tuple[list[int], list[int]]:
    """Steps of the whole checkpoints of a run folder, and of those that lack the marker, in order. Lists the folder."""
    folder = checkpoints_of(run)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    whole, other = [], []
    for step in sorted(int(name) for name in names if name.isascii() and name.isdigit()):
        (whole if is_whole(folder / str(step)) else other).append(step)
    return whole, other


def is_whole(folder: epath.Path) -> bool:
    """Whether a step's folder is there and was written to its end."""
    return (folder / COMMITTED).exists()


def identity_of(folder: epath.Path) -> str:
    """A hash that tells one save of a step from another: Orbax notes when it was made."""
    return hashlib.sha256((folder / _SAVE).read_bytes()).hexdigest()


def check_listing(folder: epath.Path) -> None:
    """UnreadableError where Orbax can't list a step: it does so for all of them before it writes another.

    It reads what each notes of itself; a note that is lost or no JSON it does without.
    """
    try:
        _ = orbax_path.step.Metadata(int(folder.name), folder).commit_timestamp
    except Exception as error:  # of many types
        if passes(error):
            raise
        raise UnreadableError(first_cause(error)) from error


def set_aside(run: str | os.PathLike, step: int) -> str:
    """Moves a damaged checkpoint away, so that its step can be saved again; returns words for what became of it.

    In a bucket, where moving is copying, it loses the marker that makes it whole; the next writer removes the rest.
    """
    folder = checkpoints_of(run) / str(step)
    if is_remote(folder):
        (folder / COMMITTED).unlink()
        return "it is removed"
    place = folder.parent.parent / "damaged"
    place.mkdir(exist_ok=True)
    target = next(path for n in itertools.count() if not (path := place / (f"{step}-{n}" if n else f"{step}")).exists())
    folder.rename(target)
    return f"it is kept in {target}"


# --- writing -------------------------------------------------------------------------------------------------------


def _storage_context() -> ocp.Context:
    """Blocks are stored apart, in chunks, so that one of them, or a device's part, is read without all around it."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = arrays.CHUNK_BYTES
    options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=arrays.CHUNK_BYTES, shard_axes=(0,))

    def options_of(key: tuple, value: Any) -> Any:
        return options if "layers/" in path_of(key) and np.ndim(value) > 1 else None

    context.array.saving.scoped_storage_options_creator = options_of
    return context


class CheckpointWriter:
    """Writes the checkpoints of one run; a context, at whose end everything is written.

    A save is asynchronous and atomic: a step is there whole or not at all. The writer removes what an interrupted save
    left when it opens the folder.
    """

    def __init__(self, run: str | os.PathLike, *, every: int, keep: int):
        # Orbax's own annotations of a policy and of what takes it name different types.
        self._checkpointer = ocp.training.Checkpointer(
            checkpoints_of(run),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),  # pyrefly: ignore
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyrefly: ignore
            cleanup_tmp_directories=True,
            context=_storage_context(),
        )

    def due(self, step: int) -> bool:
        """Would `save` write this step without being forced?"""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, meta: dict[str, Any], *, force: bool = False) -> None:
        """Starts writing a step; the next save, or the end of the context, waits for it."""
        items = {"params": state.params, "training": training_item(state)}
        self._checkpointer.save_checkpointables_async(step, items | {"meta": seal(meta, items)}, force=force)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()  # waits for what is being written


def training_item(state: TrainState) -> dict[str, Any]:
    """The content of the item ``training``."""
    return {"opt_state": state.opt_state, "key": state.key, "step": state.step}


def save_items(folder: epath.Path, items: dict[str, Any]) -> None:
    """Writes a step's folder and waits for it."""
    with _storage_context():
        ocp.save_checkpointables(folder, items)


def describe_weights(
    target: epath.Path, shapes: Mapping[str, tuple[int, np.dtype]], meta: dict[str, Any], scratch: Path
) -> None:
    """Makes a step's folder of arrays that `arrays.create` wrote; until then it is no checkpoint.

    Orbax describes a model of the same structure, with a single number in each weight, and its description is copied.
    shapes: path -> number of dimensions and dtype of each weight. scratch: an empty local folder.
    """
    tiny = epath.Path(scratch) / "0"
    leaves = {path: jnp.zeros((1,) * dimensions, dtype) for path, (dimensions, dtype) in shapes.items()}
    ocp.save_checkpointables(tiny, {"params": unflatten_dict(leaves, sep="/"), "meta": meta})
    tree = json.loads((tiny / "params" / arrays.TREE).read_text())
    (target / "params" / arrays.TREE).write_text(arrays.describe(tree))
    for file in sorted(path for path in Path(scratch, "0").rglob("*") if path.is_file()):
        name = file.relative_to(tiny)
        if name.parts[0] != "params" and name.name != COMMITTED:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(file.read_bytes())
    (target / COMMITTED).write_text("whole")  # Orbax writes a path here, and asks only whether the file is there


# --- reading: changes nothing in the folder, so it is safe beside a run that writes ---------------------------------


def read_items(folder: epath.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The items of a step's folder; wanted: item name -> tree of ShapeDtypeStructs, or None for plain values.

    UnreadableError where Orbax fails; errors of the machine, which don't speak of what is stored, pass.
    """
    for name in (name for name, tree in wanted.items() if tree is None):
        arrays.check_texts(folder / name)
    try:
        _hush()
        return ocp.load_checkpointables(folder, wanted)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax has no error of its own, and raises the cause inside another one
        if passes(error):
            raise
        raise UnreadableError(first_cause(error)) from error


def first_cause(error: BaseException) -> str:
    """Type and first line of the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"


def stored_shapes(folder: epath.Path) -> Any:
    """A tree of ShapeDtypeStructs: the weights in a step's folder as stored; UnreadableError where Orbax fails."""
    try:
        _hush()
        metadata = ocp.metadata(folder, "params").metadata
    except MemoryError:
        raise
    except Exception as error:
        if passes(error):
            raise
        raise UnreadableError(first_cause(error)) from error
    if not metadata:  # of a list of weights that it does not understand, Orbax says nothing
        raise UnreadableError(f"params/{arrays.TREE} does not list weights")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)

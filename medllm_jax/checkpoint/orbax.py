"""Orbax checkpoints: the only file that knows Orbax.

A folder of checkpoints holds one folder a step, each with up to three items: ``params`` (the weights that are
trained), ``training`` (optimizer state and random key) and ``meta`` (plain values: the model's shape, the data
position, the run's config, and of adapters their settings and what base they belong to, which is not copied).
A converted Hugging Face model is a step 0 that has no ``training``.

Orbax reads a byte that has flipped in an array without noticing. So what is saved carries its own digests, in ``meta``,
and what is read is compared with them.
"""

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import v1 as ocp

from medllm_jax.checkpoint import arrays
from medllm_jax.checkpoint.fingerprint import line_of_each
from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.config.load import build
from medllm_jax.config.schema import AdapterConfig, ModelConfig
from medllm_jax.distributed.sharding import path_of
from medllm_jax.errors import UserError
from medllm_jax.model.quantize import Storage
from medllm_jax.storage.remote import is_remote

_policies = ocp.training.save_decision_policies

_COMMITTED = "commit_success.txt"  # what makes a checkpoint whole where nothing can be renamed, as in a bucket
_SAVE = "_CHECKPOINT_METADATA"

# Orbax warns of checkpoints without its own key-value store, which is how models are written slice by slice.
logging.getLogger("absl").addFilter(lambda record: "TensorStore data files not found" not in str(record.msg))


class DamagedError(UserError):
    """A checkpoint that can't be read, or does not hold what was written."""


class StoredWeight(NamedTuple):
    """How a weight is stored, of a model that is written slice by slice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def _storage_context() -> ocp.Context:
    """Blocks are stored apart, in chunks, so that one of them, or a device's part, is read without all around it."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = arrays.CHUNK_BYTES
    options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=arrays.CHUNK_BYTES, shard_axes=(0,))

    def options_of(key_path: tuple, value: Any) -> Any:
        return options if "layers/" in path_of(key_path) and np.ndim(value) > 1 else None

    context.array.saving.scoped_storage_options_creator = options_of
    return context


class CheckpointWriter:
    """Writes the checkpoints of one run; a context, at whose end everything is written.

    A save is asynchronous and atomic: a step is there whole or not at all. What an interrupted save left is removed
    when the writer opens the folder.
    """

    def __init__(self, run: str | epath.Path, *, every: int, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            checkpoints_of(run),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
            context=_storage_context(),
        )

    def due(self, step: int) -> bool:
        """Would `save` write this step without being forced?"""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, meta: dict[str, Any], *, force: bool = False) -> None:
        """Starts writing a step; the next save, or the end of the context, waits for it."""
        items = {"params": state.params, "training": _training_items(state)}
        self._checkpointer.save_checkpointables_async(step, items | {"meta": _sealed(meta, items)}, force=force)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()  # waits for what is being written


def _sealed(meta: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, with digests of its arrays and of all it says."""
    meta = meta | {"digests": line_of_each(items)}
    return meta | {"digest": _digest(meta)}


def _digest(meta: dict[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _training_items(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "key": state.key, "step": state.step}


# --- reading; none of it changes the folder, so it is safe beside a run that writes ---------------------------------


def checkpoints_of(run: str | epath.Path) -> epath.Path:
    """The checkpoint folder of a run folder, absolute: Orbax takes no other."""
    folder = epath.Path(run)
    return (folder if is_remote(folder) else folder.resolve()) / "checkpoints"


def steps(run: str | epath.Path) -> list[int]:
    """Steps of the whole checkpoints of a run folder, in order."""
    folder = checkpoints_of(run)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit() and (folder / name / _COMMITTED).exists())


def newest_step(run: str | epath.Path) -> int | None:
    """Step of the newest whole checkpoint of a run folder, or None."""
    return max(steps(run), default=None)


def latest_step(run: str | epath.Path) -> int:
    """Step of the newest whole checkpoint of a run folder; UserError if there is none."""
    step = newest_step(run)
    if step is None:
        raise UserError(
            f"{run} holds no checkpoint: a run folder, or what `python -m tools.convert_hf from-hf` wrote, is expected"
        )
    return step


def _items(run: str | epath.Path, step: int | None, wanted: dict[str, Any]) -> dict[str, Any]:
    step = latest_step(run) if step is None else step
    try:
        return ocp.load_checkpointables(checkpoints_of(run) / str(step), wanted)
    except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # these don't speak of what is stored
    except Exception as error:  # Orbax has no error of its own, and says the cause in another one
        raise _damaged(run, step, f"can't be read ({_first_cause(error)})") from error


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"


def _damaged(run: str | epath.Path, step: int, what: str) -> DamagedError:
    return DamagedError(f"checkpoint {step} of {os.fspath(run)} {what}: it is damaged; use another, or copy it again")


def _check(run: str | epath.Path, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
    """DamagedError unless arrays that were read are those that were written, where that is known.

    An array that is read in another dtype can't be told; nor can a model that was written without digests.
    """
    written = meta.get("digests", {})
    known = {path: leaf for path, leaf in _leaves(items) if _same_dtype(written.get(path), leaf)}
    _compare(run, step, line_of_each(known) if known else {}, written)


def _compare(run: str | epath.Path, step: int, found: Mapping[str, str], written: Mapping[str, str]) -> None:
    wrong = [path for path in found if found[path] != written.get(path)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise _damaged(run, step, f"holds other bytes in {wrong[0]}{more} than were written")


def _leaves(items: dict[str, Any]) -> list[tuple[str, jax.Array]]:
    return [(path_of(key_path), leaf) for key_path, leaf in jax.tree_util.tree_leaves_with_path(items)]


def _same_dtype(line: str | None, leaf: jax.Array) -> bool:
    return line is not None and line.split()[1] == leaf.dtype.name


def load_state(run: str | epath.Path, step: int, abstract: TrainState) -> TrainState:
    """The train state of a step, each array straight into the sharding of its ShapeDtypeStruct; not checked yet."""
    items = _items(run, step, {"params": abstract.params, "training": _training_items(abstract)})
    return TrainState(params=items["params"], **items["training"])


def check_state(run: str | epath.Path, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """DamagedError unless a state that was read is the one that was written. Every process must ask, or none."""
    _check(run, step, {"params": state.params, "training": _training_items(state)}, meta)


def has_digests(run: str | epath.Path, step: int) -> bool:
    """Whether a checkpoint says what its arrays are; one that was converted does not."""
    return "digests" in load_meta(run, step)


def check_lines(run: str | epath.Path, step: int, found: Mapping[str, str]) -> None:
    """DamagedError unless arrays, read by other ways and summed up in lines, are those that were written."""
    _compare(run, step, found, load_meta(run, step)["digests"])


def load_meta(run: str | epath.Path, step: int | None = None) -> dict[str, Any]:
    """The plain values saved with a checkpoint; DamagedError where they are not those that were written."""
    step = latest_step(run) if step is None else step
    meta = _items(run, step, {"meta": None})["meta"]
    if "digest" in meta and meta["digest"] != _digest(meta):
        raise _damaged(run, step, "says other things of itself than were written")
    return meta


def load_model_config(run: str | epath.Path, step: int | None = None) -> ModelConfig:
    """Shape of the model in a checkpoint."""
    return build(ModelConfig, load_meta(run, step)["model"], where=f"checkpoint of {run}")


class Base(NamedTuple):
    """The model that adapters belong to: run folder and step of its checkpoint, fingerprint of its stored weights."""

    checkpoint: str
    step: int
    fingerprint: str


class Adapted(NamedTuple):
    """What a checkpoint of adapters says of them."""

    settings: AdapterConfig
    base: Base


def load_adapted(run: str | epath.Path, step: int | None = None) -> Adapted | None:
    """Settings and base of a checkpoint of adapters; None for one of a whole model. UserError if the base is gone."""
    meta = load_meta(run, step)
    if meta.get("base") is None:
        return None
    base = Base(**meta["base"])
    if base.step not in steps(base.checkpoint):
        raise UserError(
            f"{run} holds adapters of the model in {base.checkpoint}, step {base.step}, and it is not there: "
            "put it back, or leave a link there"
        )
    return Adapted(build(AdapterConfig, meta["config"]["adapter"], where=f"checkpoint of {run}"), base)


def load_storage(run: str | epath.Path, step: int | None = None) -> Storage | None:
    """How the projections of a whole model are quantised in a checkpoint; None where they aren't."""
    storage = load_meta(run, step).get("storage")
    return None if storage is None else Storage(**storage)


def check_base(base: Base, fingerprint: str) -> None:
    """UserError unless the fingerprint of what was read is the base's."""
    if fingerprint != base.fingerprint:
        raise UserError(
            f"{base.checkpoint} is not the model that the adapters were trained on: its step {base.step} has other "
            f"weights (fingerprint {fingerprint[:12]}, then {base.fingerprint[:12]}); put the former back"
        )


def load_params(run: str | epath.Path, abstract: Any, step: int | None = None) -> Any:
    """The weights of a checkpoint, in the dtype and sharding of a tree of ShapeDtypeStructs.

    DamagedError where they are not those that were written.
    """
    step = latest_step(run) if step is None else step
    items = _items(run, step, {"params": abstract})
    _check(run, step, items, load_meta(run, step))
    return items["params"]


def abstract_params(run: str | epath.Path, step: int | None = None) -> Any:
    """Shapes and dtypes of a checkpoint's weights as stored."""
    step = latest_step(run) if step is None else step
    metadata = ocp.metadata(checkpoints_of(run) / str(step), "params").metadata
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def stream_params(
    run: str | epath.Path, step: int | None = None, abstract: Any = None
) -> Iterator[tuple[str, np.ndarray | jax.Array]]:
    """Path and value of each weight, one at a time: as stored, in host memory, or as a tree of ShapeDtypeStructs says.

    The caller lets go of a value before it asks for the next, if two at a time would be too much.
    """
    step = latest_step(run) if step is None else step
    if abstract is None:
        abstract = jax.tree.map(lambda _: np.ndarray, abstract_params(run, step))
    meta = load_meta(run, step)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    for place, (key_path, leaf) in enumerate(leaves):
        one = [leaf if i == place else ocp.PLACEHOLDER for i in range(len(leaves))]
        items = {"params": jax.tree.unflatten(structure, one)}
        path, value = path_of(key_path), jax.tree.leaves(_items(run, step, items)["params"])[place]
        _check(run, step, {"params": {path: value}}, meta)
        yield path, value


def open_arrays(run: str | epath.Path, step: int | None = None) -> dict[str, ts.TensorStore]:
    """Path -> array of each weight of a checkpoint as stored, to be read slice by slice."""
    step = latest_step(run) if step is None else step
    return arrays.open_arrays(checkpoints_of(run) / str(step) / "params")


def identity(run: str | epath.Path, step: int) -> str:
    """What tells one save of a step from another: Orbax notes when it was made."""
    return hashlib.sha256((checkpoints_of(run) / str(step) / _SAVE).read_bytes()).hexdigest()


def set_aside(run: str | epath.Path, step: int) -> str:
    """Takes a damaged checkpoint out of the way, so that its step can be saved again; says what became of it.

    In a bucket, where moving is copying, it loses the marker that makes it whole; the next writer removes the rest.
    """
    folder = checkpoints_of(run) / str(step)
    if is_remote(folder):
        (folder / _COMMITTED).unlink()
        return "it is removed"
    place = folder.parent.parent / "damaged"
    place.mkdir(exist_ok=True)
    target = next(path for n in itertools.count() if not (path := place / (f"{step}-{n}" if n else f"{step}")).exists())
    folder.rename(target)
    return f"it is kept in {target}"


# --- models that don't come from training ------------------------------------------------------------------------


def write_model(run: str | epath.Path, params: Any, model: dict[str, Any], **meta: Any) -> None:
    """Writes weights as step 0 of a new run folder: what training, evaluation and export start from.

    model: its shape, as plain values. meta: what else the checkpoint shall say of itself.
    """
    with _storage_context():
        items = {"params": params}
        ocp.save_checkpointables(checkpoints_of(run) / "0", items | {"meta": _sealed({"model": model, **meta}, items)})


def new_arrays(run: str | epath.Path, weights: Mapping[str, StoredWeight]) -> dict[str, ts.TensorStore]:
    """Path -> array of each weight of a step 0 that is written slice by slice; `finish_model` makes a checkpoint of it.

    Several processes may open the same. ValueError where other arrays are there already.
    """
    item = checkpoints_of(run) / "0" / "params"
    item.mkdir(parents=True, exist_ok=True)
    return {path: arrays.create(item, path, w.shape, w.dtype.name, w.chunk) for path, w in weights.items()}


def finish_model(run: str | epath.Path, weights: Mapping[str, StoredWeight], meta: dict[str, Any]) -> None:
    """Makes a checkpoint of arrays that are written: until then there is none.

    Orbax describes a model of the same structure, with a single number in each weight, and what it says is copied.
    """
    target = checkpoints_of(run) / "0"
    with tempfile.TemporaryDirectory() as folder:
        tiny = epath.Path(folder) / "0"
        leaves = {path: jnp.zeros((1,) * len(w.shape), w.dtype) for path, w in weights.items()}
        ocp.save_checkpointables(tiny, {"params": unflatten_dict(leaves, sep="/"), "meta": meta})
        tree = json.loads((tiny / "params" / arrays.TREE).read_text())
        (target / "params" / arrays.TREE).write_text(arrays.describe(tree))
        for file in sorted(path for path in Path(folder, "0").rglob("*") if path.is_file()):
            name = file.relative_to(tiny)
            if name.parts[0] != "params" and name.name != _COMMITTED:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(file.read_bytes())
        (target / _COMMITTED).write_text("whole")  # Orbax names a place here, and asks only whether it is there

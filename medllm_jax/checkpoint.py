"""Orbax checkpoints: the only file that knows Orbax.

A folder of checkpoints holds one folder a step, each with up to three items: ``params`` (the weights that are
trained), ``training`` (optimizer state and random key) and ``meta`` (plain values: the model's shape, the data
position, the run's config, and of adapters their settings and what base they belong to, which is not copied).
A converted Hugging Face model is a step 0 that has no ``training``.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from medllm_jax.config import AdapterConfig, ModelConfig
from medllm_jax.errors import UserError
from medllm_jax.remote import is_remote
from medllm_jax.settings import build
from medllm_jax.sharding import path_of
from medllm_jax.step import TrainState

_policies = ocp.training.save_decision_policies

# Weights that come from one host are stored in chunks of at most this many bytes, so that a device reads its shard
# without reading everything around it.
_CHUNK_BYTES = 8 << 20


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
        )

    def due(self, step: int) -> bool:
        """Would `save` write this step without being forced?"""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, meta: dict[str, Any], *, force: bool = False) -> None:
        """Starts writing a step; the next save, or the end of the context, waits for it."""
        items = {"params": state.params, "training": _training_items(state), "meta": meta}
        self._checkpointer.save_checkpointables_async(step, items, force=force)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()  # waits for what is being written


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
    # The marker is what makes a checkpoint whole where nothing can be renamed, as in a bucket.
    return sorted(int(name) for name in names if name.isdigit() and (folder / name / "commit_success.txt").exists())


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
    return ocp.load_checkpointables(checkpoints_of(run) / str(step), wanted)


def load_state(run: str | epath.Path, step: int, abstract: TrainState) -> TrainState:
    """The train state of a step, each array straight into the sharding of its ShapeDtypeStruct."""
    items = _items(run, step, {"params": abstract.params, "training": _training_items(abstract)})
    return TrainState(params=items["params"], **items["training"])


def load_meta(run: str | epath.Path, step: int | None = None) -> dict[str, Any]:
    """The plain values saved with a checkpoint."""
    return _items(run, step, {"meta": None})["meta"]


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


def check_base(base: Base, fingerprint: str) -> None:
    """UserError unless the fingerprint of what was read is the base's."""
    if fingerprint != base.fingerprint:
        raise UserError(
            f"{base.checkpoint} is not the model that the adapters were trained on: its step {base.step} has other "
            f"weights (fingerprint {fingerprint[:12]}, then {base.fingerprint[:12]}); put the former back"
        )


def load_params(run: str | epath.Path, abstract: Any, step: int | None = None) -> Any:
    """The weights of a checkpoint, in the dtype and sharding of a tree of ShapeDtypeStructs."""
    return _items(run, step, {"params": abstract})["params"]


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
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    for place, (key_path, leaf) in enumerate(leaves):
        one = [leaf if i == place else ocp.PLACEHOLDER for i in range(len(leaves))]
        items = {"params": jax.tree.unflatten(structure, one)}
        yield path_of(key_path), jax.tree.leaves(_items(run, step, items)["params"])[place]


def write_model(run: str | epath.Path, params: Any, model: dict[str, Any]) -> None:
    """Writes weights as step 0 of a new run folder: what training, evaluation and export start from.

    Weights may be memory-mapped files: the largest weight and little more is held in memory.
    """
    # The same memory as arrays of the CPU, since Orbax bounds what it holds of jax.Arrays only.
    cpu = jax.local_devices(backend="cpu")[0]
    params = jax.tree.map(lambda x: jax.device_put(x, cpu, may_alias=True) if isinstance(x, np.ndarray) else x, params)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = 1 + max(x.nbytes for x in jax.tree.leaves(params))
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    with context:
        ocp.save_checkpointables(checkpoints_of(run) / "0", {"params": params, "meta": {"model": model}})

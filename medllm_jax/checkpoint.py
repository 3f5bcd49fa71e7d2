"""Orbax checkpoints: the only file that knows Orbax.

A folder of checkpoints holds one folder a step, each with up to three items: ``params`` (the weights), ``training``
(optimizer state and random key) and ``meta`` (plain values: the model's shape, the data position, the run's config).
A converted Hugging Face model is a step 0 that has no ``training``.
"""

from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from medllm_jax.config import ModelConfig
from medllm_jax.errors import UserError
from medllm_jax.settings import build
from medllm_jax.step import TrainState

_policies = ocp.training.save_decision_policies


class Checkpoints:
    """The checkpoints of one run, for its only writer.

    A save is asynchronous and atomic: a step is there whole or not at all. What an interrupted save left is removed
    when the writer opens the folder.
    """

    def __init__(self, run: str | epath.Path, *, every: int, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            checkpoints_of(run),
            save_decision_policy=_policies.FixedIntervalPolicy(every),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def due(self, step: int) -> bool:
        """Would `save` write this step without being forced?"""
        return self._checkpointer.should_save(step)

    def save(self, step: int, state: TrainState, meta: dict[str, Any], *, force: bool = False) -> None:
        """Starts writing a step; the next save, or `close`, waits for it."""
        training = {"opt_state": state.opt_state, "key": state.key, "step": state.step}
        items = {"params": state.params, "training": training, "meta": meta}
        self._checkpointer.save_checkpointables_async(step, items, force=force)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, each array straight into the sharding of its ShapeDtypeStruct."""
        training = {"opt_state": abstract.opt_state, "key": abstract.key, "step": abstract.step}
        items = self._checkpointer.load_checkpointables(step, {"params": abstract.params, "training": training})
        return TrainState(params=items["params"], **items["training"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def checkpoints_of(run: str | epath.Path) -> epath.Path:
    """The checkpoint folder of a run folder, absolute: Orbax takes no other."""
    return epath.Path(run).resolve() / "checkpoints"


def latest_step(run: str | epath.Path) -> int:
    """Step of the newest whole checkpoint of a run folder; UserError if there is none. Only reads."""
    folder = checkpoints_of(run)
    steps = [step for step in _step_folders(folder) if ocp.is_orbax_checkpoint(folder / str(step))]
    if not steps:
        raise UserError(
            f"{run} holds no checkpoint: a run folder, or what `python -m tools.convert_hf from-hf` wrote, is expected"
        )
    return max(steps)


def _step_folders(folder: epath.Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


def load_meta(run: str | epath.Path, step: int | None = None) -> dict[str, Any]:
    """The plain values saved with a checkpoint."""
    step = latest_step(run) if step is None else step
    return ocp.load_checkpointables(checkpoints_of(run) / str(step), {"meta": None})["meta"]


def load_model_config(run: str | epath.Path, step: int | None = None) -> ModelConfig:
    """Shape of the model in a checkpoint."""
    return build(ModelConfig, load_meta(run, step)["model"], where=f"checkpoint of {run}")


def load_params(run: str | epath.Path, abstract: Any, step: int | None = None) -> Any:
    """The weights of a checkpoint, in the dtype and sharding of a tree of ShapeDtypeStructs."""
    step = latest_step(run) if step is None else step
    return ocp.load_checkpointables(checkpoints_of(run) / str(step), {"params": abstract})["params"]


def abstract_params(run: str | epath.Path, step: int | None = None) -> Any:
    """Shapes and dtypes of a checkpoint's weights as stored."""
    step = latest_step(run) if step is None else step
    metadata = ocp.checkpointables_metadata(checkpoints_of(run) / str(step)).metadata["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def write_model(run: str | epath.Path, params: Any, model: dict[str, Any]) -> None:
    """Writes weights as step 0 of a new run folder: what training, evaluation and export start from."""
    items = {"params": params, "meta": {"model": model}}
    ocp.save_checkpointables(checkpoints_of(run) / "0", items)

"""What a model went through: the runs from the first to this one, and what they began with, as checkpoints tell it."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from medllm_jax.checkpoint.handle import Checkpoint, DamagedError, RemovedError
from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.load import build
from medllm_jax.config.schema import AdapterConfig, RunConfig

RANDOM = "random weights"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Stage(NamedTuple):
    """A run that a model went through, and the step that was taken of it."""

    config: RunConfig
    step: int


class Imported(NamedTuple):
    """Adapters that PEFT trained, before they came here."""

    name: str
    settings: AdapterConfig | None


class History(NamedTuple):
    """stages: the runs from the first to this one. source: what the model before them is called, None where that is not
    known; commit: of the repository on the hub that it was converted from. imported: the adapters of PEFT's that they
    go on from. made: how the model before them was made here, as its card told. dtype: that the model before them was
    converted in; None where that is not known, or where all began with random weights.
    """

    stages: list[Stage]
    source: str | None
    commit: str | None = None
    imported: Imported | None = None
    made: str | None = None
    dtype: np.dtype | None = None


def history_of(checkpoint: Checkpoint) -> History:
    """Follows a checkpoint back, from run to run, as far as their folders are at hand."""
    stages: list[Stage] = []
    seen, imported = {checkpoint.run_folder}, None
    while True:
        settings, source = checkpoint.meta.get("config") or {}, checkpoint.meta.get("source") or {}
        if "run" in settings:
            config = build(RunConfig, settings, where=f"checkpoint of {checkpoint.run}")
            stages.append(Stage(config, checkpoint.step))
            if config.init.checkpoint is None:
                return History(stages[::-1], RANDOM, imported=imported)
            before = _open(config.init.checkpoint)
        elif checkpoint.base is not None:  # adapters of PEFT's
            imported = Imported(_named(source) or "an adapter of unknown name", checkpoint.adapter)
            before = _open(checkpoint.base.checkpoint, checkpoint.base.step)
        else:  # converted, not trained
            commit, made = (source.get(key) for key in ("commit", "made"))
            return History(
                stages[::-1],
                _named(source),
                commit if isinstance(commit, str) and commit.isalnum() else None,
                imported,
                made if isinstance(made, str) else None,
                _dtype(checkpoint),
            )
        if before is None or before.run_folder in seen:
            return History(stages[::-1], None, imported=imported)
        seen.add(before.run_folder)
        checkpoint = before


def exported_dtype(stored: np.dtype, history: History) -> np.dtype:
    """The dtype that a whole model is exported in if none is asked for: as stored, but that in which it came where it
    was only widened to be trained.
    """
    was_widened = history.dtype == _BFLOAT16 and stored == np.dtype(np.float32)
    return _BFLOAT16 if was_widened else stored


def _dtype(checkpoint: Checkpoint) -> np.dtype | None:
    """Of what is not quantised in a whole model."""
    try:
        return checkpoint.open_arrays()["norm/weight"].dtype.numpy_dtype
    except (DamagedError, RemovedError, KeyError):
        return None


def _open(run: str, step: int | None = None) -> Checkpoint | None:
    """A checkpoint of a run, the newest by default; None where it is not there, or can't be read."""
    there = steps(run)
    wanted = there[-1] if step is None and there else step
    try:
        return Checkpoint(run, wanted) if wanted in there else None
    except DamagedError:
        return None


def _named(source: dict[str, Any]) -> str | None:
    return plain_name(source.get("name"))


def plain_name(name: Any) -> str | None:
    """What a model is called, where that is a name: it stands in YAML, in Markdown and in Python."""
    is_one = isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 200
    return name.strip() if is_one and not set(name) & set('"\\`|<>') else None

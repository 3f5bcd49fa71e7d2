"""Models that don't come from training, written as step 0 of a new run folder: whole, or range by range."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from medllm_jax.checkpoint import arrays
from medllm_jax.checkpoint.digests import seal, seal_meta
from medllm_jax.checkpoint.orbax import checkpoints_of, describe_weights, save_items


class StoredWeight(NamedTuple):
    """How a weight is stored, of a model that is written range by range."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def write_model(run: str | os.PathLike, params: Any, model: dict[str, Any], **meta: Any) -> None:
    """Writes weights as step 0 of a new run folder: what training, evaluation and export start from.

    model: its shape, as plain values. meta: further entries of the checkpoint's meta.
    """
    items = {"params": params}
    save_items(checkpoints_of(run) / "0", items | {"meta": seal({"model": model, **meta}, items)})


def new_arrays(run: str | os.PathLike, weights: Mapping[str, StoredWeight]) -> dict[str, ts.TensorStore]:
    """Path -> array of each weight of a step 0 that is written range by range; `finish_model` makes a checkpoint of it.

    Several processes may open the same. UserError where other arrays are there already.
    """
    item = checkpoints_of(run) / "0" / "params"
    item.mkdir(parents=True, exist_ok=True)
    return {path: arrays.create(item, path, w.shape, w.dtype.name, w.chunk) for path, w in weights.items()}


def finish_model(run: str | os.PathLike, weights: Mapping[str, StoredWeight], meta: dict[str, Any]) -> None:
    """Makes a checkpoint of arrays that are written; until then there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        shapes = {path: (len(weight.shape), weight.dtype) for path, weight in weights.items()}
        describe_weights(checkpoints_of(run) / "0", shapes, seal_meta(meta), Path(scratch))

"""Reference log-probabilities, kept beside the pairs that they are of; those of several stores as one array."""

import hashlib
import io
import json
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.data.rows import Rows
from medllm_jax.data.store import RowStore, array_of
from medllm_jax.errors import UserError
from medllm_jax.storage.json_files import read_json


def read_references(rows: Rows, model_fingerprint: str) -> np.ndarray:
    """``read_reference`` of all stores of pairs as one float32 [N, P, 2]; 0 where a row has no pair k.

    P is the most pairs, or conversations, of any row.
    """
    values = no_references(rows)
    for store, part in rows.split(values):
        if store.metadata.kind == "pairs":
            part[:, : store.metadata.pairs_per_row] = read_reference(store, model_fingerprint)
    return values


def no_references(rows: Rows) -> np.ndarray:
    """float32 [N, P, 2] of zeros."""
    return np.zeros((len(rows), rows.pairs_per_row, 2), np.float32)


def write_references(rows: Rows, model_fingerprint: str, values: np.ndarray) -> None:
    """``write_reference`` of each store's part of float32 [N, P, 2]."""
    for store, part in rows.split(values):
        if store.metadata.kind == "pairs":
            write_reference(store, model_fingerprint, part[:, : store.metadata.pairs_per_row])


def write_reference(store: RowStore, model_fingerprint: str, values: np.ndarray) -> None:
    """Keeps the reference model's log-probabilities beside the pairs, replacing earlier ones of the same model.

    model_fingerprint: any string that is equal iff the model is. values: float32 [N, P, 2], sums over the tokens of the
    chosen and the rejected response of pair k of a row; 0 where the row has no pair k. ValueError for any other shape
    or type, and for values that are not finite.
    """
    expected = _reference_shape(store)
    if values.shape != expected or values.dtype != np.float32:
        raise ValueError(f"reference is {values.dtype} {values.shape}, {store!r} needs float32 {expected}")
    if not np.isfinite(values).all():
        raise ValueError("reference log-probabilities are not finite")
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, "<f4"))
    data = buffer.getvalue()
    folder = reference_folder(store, model_fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    description = _reference_description(store, model_fingerprint) | {"sha256": hashlib.sha256(data).hexdigest()}
    # The description comes last, and its digest binds the values: a half-written pair of files is refused.
    (folder / "reference.json").unlink(missing_ok=True)
    (folder / "values.npy").write_bytes(data)
    (folder / "reference.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def read_reference(store: RowStore, model_fingerprint: str) -> np.ndarray:
    """The log-probabilities that ``write_reference`` kept for this model and these very pairs: float32 [N, P, 2].

    Raises UserError, saying what to run, where there are none or they are damaged.
    """
    folder = reference_folder(store, model_fingerprint)
    remedy = "run `medllm reference` with the model that training starts from"
    if not (folder / "reference.json").exists():
        raise UserError(
            f"store {store.path} has no reference log-probabilities of this model and these pairs: {remedy}"
        )
    damaged = UserError(f"the reference log-probabilities in {folder} are damaged: {remedy}")
    try:
        description = read_json(folder / "reference.json")
        data = (folder / "values.npy").read_bytes()
    except (UserError, FileNotFoundError) as error:
        raise damaged from error
    digest = description.pop("sha256", None)
    if description != _reference_description(store, model_fingerprint) or digest != hashlib.sha256(data).hexdigest():
        raise damaged
    values = array_of(data, _reference_shape(store), np.float32)
    if values is None or not np.isfinite(values).all():
        raise damaged
    return values


def _reference_shape(store: RowStore) -> tuple[int, int, int]:
    if store.metadata.kind != "pairs":
        raise ValueError(f"{store!r} holds no pairs")
    return (len(store), store.metadata.pairs_per_row, 2)


def _reference_description(store: RowStore, model_fingerprint: str) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model_fingerprint": model_fingerprint,
        "store_digest": store.metadata.digest,
        "shape": list(_reference_shape(store)),
    }


def reference_folder(store: RowStore, model_fingerprint: str) -> epath.Path:
    """Where the reference log-probabilities of a model are kept; it need not be there."""
    # Both hashes are in the name: references of several models, and of pairs since replaced, never meet.
    key = hashlib.sha256(json.dumps([model_fingerprint, store.metadata.digest]).encode()).hexdigest()[:16]
    return store.path / "reference" / key

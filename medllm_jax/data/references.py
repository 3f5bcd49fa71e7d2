"""Reference log-probabilities of the pairs of several stores as one array; each store keeps its own."""

import numpy as np

from medllm_jax.data.preferences import read_reference, write_reference
from medllm_jax.data.sources import Rows


def read_references(rows: Rows, model_fingerprint: str) -> np.ndarray:
    """``read_reference`` of all stores as one float32 [N, P, 2], P the most pairs of any row; 0 where there is none."""
    references = [read_reference(store, model_fingerprint) for store in rows.stores]
    padded = [np.pad(values, ((0, 0), (0, rows.pairs_per_row - values.shape[1]), (0, 0))) for values in references]
    return np.concatenate(padded)


def write_references(rows: Rows, model_fingerprint: str, values: np.ndarray) -> None:
    """``write_reference`` of each store's part of float32 [N, P, 2]."""
    for store, part in rows.split(values):
        write_reference(store, model_fingerprint, part[:, : store.metadata.pairs_per_row])

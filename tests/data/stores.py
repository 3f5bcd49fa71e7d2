"""Stores whose rows say which row they are, for tests of reading."""

import numpy as np

from medllm_jax.data.store import RowStore, RowStoreWriter

ABOUT = {"packing": "split", "vocab_size": 1000, "tokenizer_fingerprint": "f" * 64, "eos_token_id": 0}


def numbered_rows(count, sequence_length=12, kind="cpt"):
    """Rows int32 [count, 3, S] whose first token is the row's number, of one pair or document and some padding."""
    rows = np.zeros((count, 3, sequence_length), np.int32)
    rows[:, 0, :9] = np.random.default_rng(0).integers(0, 500, (count, 9))
    rows[:, 0, 0] = np.arange(count)
    rows[:, 1, :9] = 1
    if kind == "pairs":
        rows[:, 2, 3:6], rows[:, 2, 6:9] = 1, 2
    return rows


def write_rows(path, rows, kind="cpt", **options):
    with RowStoreWriter(path, kind, rows.shape[-1], **options) as writer:
        for start in range(0, len(rows), 7):
            writer.append(rows[start : start + 7])
        writer.finish(examples=len(rows), **ABOUT)
    return RowStore.open(path)

"""Stores whose rows say which row they are, for tests of reading."""

import numpy as np

from medllm_jax.data.store import RowStore
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter

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


def write_rows(path, rows, kind="cpt", corpora=None, **options):
    """A store of rows; corpora: name -> number of its rows, in order (default: all are of one corpus)."""
    corpora = {"corpus": len(rows)} if corpora is None else corpora
    with RowStoreWriter(path, kind, rows.shape[-1], **options) as writer:
        start = 0
        for name, count in corpora.items():
            for first in range(start, start + count, 7):
                writer.append(rows[first : min(first + 7, start + count)], name)
            start += count
        writer.finish({name: CorpusFacts(examples=count) for name, count in corpora.items()}, **ABOUT)
    return RowStore.open(path)

"""The one row layout: what a row of S tokens carries, and everything that follows from it.

A row holds segments one after the other. In continued pretraining a segment is a document; in preference training it
is a preference pair: the prompt (branch 0), then the chosen response (branch 1), then the rejected one (branch 2).

* ``segment_ids``  0 is padding; segments of a row count from 1.
* ``branch_ids``   0 for text that all branches of the segment see; 1 and 2 for responses that do not see each other.
* ``positions``    rotary positions: 0 at a segment's start; each response continues where the prompt ended.
* ``loss_weights`` weight of the token *as a target*: how much ``log P(token | its own past)`` counts.

A query sees a key iff the key is not later in the row, has the same segment, and has branch 0 or the query's branch.

Shape letters used throughout: B rows, S tokens a row, P pairs a row, D hidden size, V vocabulary.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["cpt", "pairs"]
Array = Any  # numpy on the host, jax on the device


class Batch(NamedTuple):
    """Rows as they travel from storage to the step; a pytree of arrays.

    tokens, positions, segment_ids, branch_ids: int32 [B, S]; loss_weights: float32 [B, S];
    reference_log_probs: float32 [B, P, 2] (chosen, rejected; pair k of a row is segment k + 1), or None for CPT.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    branch_ids: Array
    loss_weights: Array
    reference_log_probs: Array | None = None


def positions_of(segment_ids: np.ndarray, branch_ids: np.ndarray) -> np.ndarray:
    """Rotary positions int32 [..., S] that follow from segments and branches; 0 on padding.

    A segment starts at 0, its branches each start where its branch 0 ended.
    """
    index = np.arange(segment_ids.shape[-1], dtype=np.int32)
    new_segment = segment_ids[..., 1:] != segment_ids[..., :-1]
    positions = index - _last_true(index, new_segment)
    if branch_ids.any():  # documents have none, and this is most of the work
        new_branch = new_segment | (branch_ids[..., 1:] != branch_ids[..., :-1])
        prompt_end = _last_true(index, branch_ids[..., 1:] == 0)  # last branch-0 index so far
        positions += (branch_ids > 0) * (prompt_end + 1 - _last_true(index, new_branch))
    positions *= segment_ids != 0
    return positions


def _last_true(index: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """For each place the largest index at or before it whose flag is set, else 0; ``flags`` starts at index 1."""
    marked = np.zeros((*flags.shape[:-1], len(index)), np.int32)
    np.multiply(flags, index[1:], out=marked[..., 1:])
    return np.maximum.accumulate(marked, axis=-1, out=marked)


def loss_weights_of(segment_ids: np.ndarray, branch_ids: np.ndarray, kind: Kind) -> np.ndarray:
    """Target weights float32 [..., S]: every token with a past (cpt), or every response token (pairs)."""
    if kind == "pairs":
        return (branch_ids > 0).astype(np.float32)
    has_past = np.zeros(segment_ids.shape, bool)
    has_past[..., 1:] = (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] != 0)
    return has_past.astype(np.float32)


def batch_of(rows: np.ndarray, kind: Kind, reference_log_probs: np.ndarray | None = None) -> Batch:
    """Stored rows int32 [B, 3, S] (channels tokens, segment_ids, branch_ids) as a Batch of numpy arrays."""
    tokens, segment_ids, branch_ids = (np.ascontiguousarray(rows[:, channel]) for channel in range(3))
    return Batch(
        tokens=tokens,
        positions=positions_of(segment_ids, branch_ids),
        segment_ids=segment_ids,
        branch_ids=branch_ids,
        loss_weights=loss_weights_of(segment_ids, branch_ids, kind),
        reference_log_probs=reference_log_probs,
    )

"""The one row layout: what a row of S tokens carries, and everything that follows from it.

A row holds examples one after the other: documents (cpt), instructions with their responses (sft), or preference pairs
(pairs): the prompt (branch 0), then the chosen response (branch 1), then the rejected one (branch 2).

* ``segment_ids``  0 is padding; the k-th example of a row, from 1, is segment 2k - 1. A pair whose prompt is repeated
                   for the rejected response goes on as segment 2k.
* ``branch_ids``   0 for text that all branches of the segment see; 1 and 2 for responses that do not see each other.
                   In storage also 3: tokens to learn in an ordinary sequence, branch 0 otherwise (sft).
* ``positions``    rotary positions: 0 at a segment's start; each response continues where the prompt ended.
* ``loss_weights`` weight of the token *as a target*: how much ``log P(token | its own past)`` counts.

A query sees a key iff the key is not later in the row, has the same segment, and has branch 0 or the query's branch.

Shape letters used throughout: B rows, S tokens a row, P pairs a row, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

Kind = Literal["cpt", "sft", "pairs"]
TARGET = 3  # stored in place of a branch
Array = Any  # numpy on the host, jax on the device


class Batch(NamedTuple):
    """Rows as they travel from storage to the step; a pytree of arrays.

    tokens, positions, segment_ids, branch_ids: int32 [B, S]; loss_weights: float32 [B, S];
    reference_log_probs: float32 [B, P, 2] (chosen, rejected; of the examples of a row), or None where none is compared.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    branch_ids: Array
    loss_weights: Array
    reference_log_probs: Array | None = None


def batch_of(
    rows: Int32[np.ndarray, "B 3 S"], kind: Kind, reference_log_probs: Float32[np.ndarray, "B P 2"] | None = None
) -> Batch:
    """Stored rows int32 [B, 3, S] (channels tokens, segment_ids, branch_ids) as a Batch of numpy arrays."""
    tokens, segment_ids, parts = (np.ascontiguousarray(rows[:, channel]) for channel in range(3))
    branch_ids = np.where(parts == TARGET, 0, parts) if kind != "cpt" else parts
    runs = _runs_of(segment_ids, branch_ids)
    return Batch(
        tokens=tokens,
        positions=_positions(runs).reshape(tokens.shape),
        segment_ids=segment_ids,
        branch_ids=branch_ids,
        loss_weights=_loss_weights(runs, parts, kind).reshape(tokens.shape),
        reference_log_probs=reference_log_probs,
    )


class _Runs(NamedTuple):
    """Stretches of one segment and branch, of all rows one after the other; all int32 [R].

    A few numbers for thousands of tokens: what follows from them is written in stretches, not token by token.
    """

    starts: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray
    branches: np.ndarray


def _runs_of(segment_ids: Int32[np.ndarray, "B S"], branch_ids: Int32[np.ndarray, "B S"]) -> _Runs:
    segments, branches = segment_ids.reshape(-1), branch_ids.reshape(-1)
    new = np.empty(segments.shape, bool)
    np.not_equal(segments[1:], segments[:-1], out=new[1:])
    if branches.any():
        new[1:] |= branches[1:] != branches[:-1]
    new[:: segment_ids.shape[-1]] = True
    starts = np.flatnonzero(new).astype(np.int32)
    lengths = np.diff(starts, append=np.int32(len(new)))
    return _Runs(starts, lengths, segments[starts], branches[starts])


def _positions(runs: _Runs) -> Int32[np.ndarray, " tokens"]:
    """Rotary positions int32 [B * S] that follow from segments and branches; 0 on padding.

    A segment starts at 0, its branches each start where its branch 0 ended.
    """
    prompt = np.maximum.accumulate(np.where(runs.branches == 0, np.arange(len(runs.starts)), 0))  # the last one so far
    after_prompt = (runs.branches > 0) & (runs.segments == runs.segments[prompt])
    first = np.where(after_prompt, runs.lengths[prompt], 0).astype(np.int32)
    positions = np.repeat(runs.starts - first, runs.lengths)
    np.subtract(_numbers(len(positions)), positions, out=positions)
    for start, length in _padding(runs):
        positions[start : start + length] = 0
    return positions


@functools.lru_cache(maxsize=4)
def _numbers(size: int) -> Int32[np.ndarray, " size"]:
    return np.arange(size, dtype=np.int32)


def _loss_weights(runs: _Runs, parts: Int32[np.ndarray, "B S"], kind: Kind) -> Float32[np.ndarray, "*shape"]:
    """Target weights of B * S tokens: every token with a past (cpt), or every token of a response (sft, pairs)."""
    if kind != "cpt":
        return (parts > 0).astype(np.float32)
    weights = np.ones(parts.size, np.float32)
    weights[runs.starts] = 0
    for start, length in _padding(runs):
        weights[start : start + length] = 0
    return weights


def _padding(runs: _Runs) -> Iterator[tuple[int, int]]:
    here = runs.segments == 0
    return zip(runs.starts[here], runs.lengths[here], strict=True)

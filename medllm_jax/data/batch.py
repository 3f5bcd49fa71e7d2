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

from medllm_jax.data.runs import Runs, mark, unmark

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
    """`batch_of_marked` of rows int32 [B, 3, S] (channels tokens, segment_ids, branch_ids)."""
    return batch_of_marked(mark(rows), kind, reference_log_probs)


def batch_of_marked(
    marked: Int32[np.ndarray, "B S"], kind: Kind, reference_log_probs: Float32[np.ndarray, "B P 2"] | None = None
) -> Batch:
    """Marked rows int32 [B, S] (see ``runs.py``), which become its tokens, as a Batch of numpy arrays.

    A few numbers for thousands of tokens: what follows from runs is written in stretches, not token by token.
    """
    tokens, runs = unmark(marked)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, runs.lengths).reshape(tokens.shape)

    learnt = runs.branches == TARGET
    branches = np.where(learnt, 0, runs.branches) if kind != "cpt" else runs.branches
    return Batch(
        tokens=tokens,
        positions=_positions(runs, branches, tokens.shape[-1]).reshape(tokens.shape),
        segment_ids=spread(runs.segments),
        branch_ids=spread(branches) if branches.any() else _zeros(tokens.shape),
        loss_weights=_loss_weights(runs, tokens.size).reshape(tokens.shape)
        if kind == "cpt"
        else spread((runs.branches > 0).astype(np.float32)),
        reference_log_probs=reference_log_probs,
    )


def _positions(runs: Runs, branches: Int32[np.ndarray, " R"], length: int) -> Int32[np.ndarray, " tokens"]:
    """Rotary positions int32 [B * S] that follow from segments and branches; 0 on padding.

    A segment starts at 0, its branches each start where its branch 0 ended. (Runs of one branch may follow each other,
    where some are learnt and some are not: they are one stretch here.)
    """
    first = runs.starts % length == 0
    first[1:] |= (runs.segments[1:] != runs.segments[:-1]) | (branches[1:] != branches[:-1])
    places = np.arange(len(first))
    first = np.maximum.accumulate(np.where(first, places, 0))  # the run that begins each one's stretch
    starts = runs.starts[first]
    prompt = np.maximum.accumulate(np.where(branches == 0, places, 0))  # the last run of a branch 0 so far
    after_prompt = (branches > 0) & (runs.segments == runs.segments[prompt])
    prompt_tokens = runs.starts[prompt] + runs.lengths[prompt] - starts[prompt]
    positions = np.repeat(starts - np.where(after_prompt, prompt_tokens, 0).astype(np.int32), runs.lengths)
    np.subtract(_numbers(len(positions)), positions, out=positions)
    for start, end in _padding(runs):
        positions[start:end] = 0
    return positions


@functools.lru_cache(maxsize=4)
def _numbers(size: int) -> Int32[np.ndarray, " size"]:
    return np.arange(size, dtype=np.int32)


@functools.lru_cache(maxsize=4)
def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """int32 zeros that all batches without branches share: fresh memory costs more than what is written to it."""
    zeros = np.zeros(shape, np.int32)
    zeros.flags.writeable = False
    return zeros


def _loss_weights(runs: Runs, size: int) -> Float32[np.ndarray, " tokens"]:
    """Target weights float32 [B * S] of documents: every token with a past."""
    weights = np.ones(size, np.float32)
    weights[runs.starts] = 0
    for start, end in _padding(runs):
        weights[start:end] = 0
    return weights


def _padding(runs: Runs) -> Iterator[tuple[int, int]]:
    here = runs.segments == 0
    return zip(runs.starts[here], (runs.starts + runs.lengths)[here], strict=True)

"""Runs: stretches of one segment and branch, and how a row of tokens says by itself where they begin.

A row has a few runs for thousands of tokens, so two more numbers with each token are not stored. A *marked row* is
int32 [S]: its tokens, with what a run is in the upper bits of the run's first token, which is then negative.

    bit   31     30       29            28                         27, 26       25 ... 0
          1      padding  a new example the prompt again (2k)      the branch   the token id

Whatever follows in the row, up to the next negative number, is of the same run. What checks a row's bytes checks its
runs, and a row stays one request.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

MAX_TOKEN_ID = 2**26 - 1
_PADDING, _NEW, _AGAIN, _BRANCH = 1 << 30, 1 << 29, 1 << 28, 26
PADDING_MARK = -(2**31) | _PADDING  # the first token of a row that is all padding


class Runs(NamedTuple):
    """Stretches of one segment and branch, of all rows one after the other; all int32 [R].

    starts: among the tokens of all rows; branches: with ``batch.TARGET``, as they are stored.
    """

    starts: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray
    branches: np.ndarray


def runs_of(segments: Int32[np.ndarray, "B S"], branches: Int32[np.ndarray, "B S"]) -> Runs:
    """The runs of rows whose every token says its segment and branch."""
    length, segments, branches = segments.shape[-1], segments.reshape(-1), branches.reshape(-1)
    new = np.empty(segments.shape, bool)
    np.not_equal(segments[1:], segments[:-1], out=new[1:])
    if branches.any():
        new[1:] |= branches[1:] != branches[:-1]
    new[::length] = True
    starts = np.flatnonzero(new).astype(np.int32)
    return Runs(starts, _lengths(starts, len(new)), segments[starts], branches[starts])


def mark(rows: Int32[np.ndarray, "B 3 S"]) -> Int32[np.ndarray, "B S"]:
    """Rows int32 [B, 3, S] (channels tokens, segment_ids, branch_ids) as marked rows int32 [B, S].

    ValueError for rows that no packing makes: a token id or a branch out of range, or examples that are not 1, 2, ...
    in order, each in one stretch.
    """
    length, tokens, runs = rows.shape[-1], rows[:, 0].copy(), runs_of(rows[:, 1], rows[:, 2])
    starts, segments = runs.starts, runs.segments
    examples = (segments + 1) // 2
    new = examples > np.where(starts % length == 0, 0, np.roll(examples, 1))
    again = (segments > 0) & (segments % 2 == 0)
    if tokens.min(initial=0) < 0 or tokens.max(initial=0) > MAX_TOKEN_ID:
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()}, not from 0 to {MAX_TOKEN_ID}")
    if not (runs.branches.min(initial=0) >= 0 and runs.branches.max(initial=0) <= 3):
        raise ValueError(f"branches from {runs.branches.min()} to {runs.branches.max()}, not from 0 to 3")
    decoded = _segments(starts, length, segments == 0, new, again)
    if segments.min(initial=0) < 0 or not np.array_equal(decoded, segments):
        raise ValueError("the segments of a row are not those of examples one after the other")
    marks = np.where(segments == 0, _PADDING, 0) | np.where(new, _NEW, 0) | np.where(again, _AGAIN, 0)
    tokens.reshape(-1)[starts] |= (marks | runs.branches << _BRANCH).astype(np.int32) | np.int32(-(2**31))
    return tokens


def unmark(marked: Int32[np.ndarray, "B S"]) -> tuple[Int32[np.ndarray, "B S"], Runs]:
    """The tokens and the runs of marked rows; the tokens take the place of the marks in the same memory."""
    length, flat = marked.shape[-1], marked.reshape(-1)
    starts = np.flatnonzero(flat < 0).astype(np.int32)
    marks = flat[starts]
    flat[starts] = marks & MAX_TOKEN_ID
    padding, new, again = (marks & bit != 0 for bit in (_PADDING, _NEW, _AGAIN))
    segments = _segments(starts, length, padding, new, again)
    return marked, Runs(starts, _lengths(starts, len(flat)), segments, marks >> _BRANCH & 3)


def channels(marked: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "B 3 S"]:
    """Marked rows as rows int32 [B, 3, S], the inverse of ``mark``; the marked rows are overwritten."""
    tokens, runs = unmark(marked)
    of_all = [np.repeat(values, runs.lengths).reshape(tokens.shape) for values in (runs.segments, runs.branches)]
    return np.stack([tokens, *of_all], axis=1)


def _lengths(starts: np.ndarray, end: int) -> np.ndarray:
    return np.diff(starts, append=np.int32(end))


def _segments(starts: np.ndarray, length: int, padding: np.ndarray, new: np.ndarray, again: np.ndarray) -> np.ndarray:
    """Segment ids of runs: the k-th example of a row is segment 2k - 1, and 2k where its prompt comes again."""
    examples = np.cumsum(new, dtype=np.int32)
    first = np.maximum.accumulate(
        np.where(starts % length == 0, np.arange(len(starts)), 0)
    )  # the run that begins the row
    examples -= (examples - new)[first]
    return np.where(padding, 0, 2 * examples - 1 + again).astype(np.int32)

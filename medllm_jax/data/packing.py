"""Packing: token sequences of any length become rows of S tokens; no token is lost or repeated.

The functions are pure, from iterables to iterables, so memory holds only the rows that are open. A row is int32 [3, S]
(tokens, segment_ids, branch_ids; see ``batch.py``); padding is 0 in all channels.
"""

import bisect
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from medllm_jax.data.batch import TARGET
from medllm_jax.errors import UserError


def check_sequence_length(sequence_length: int) -> None:
    """UserError where a row would be too short to learn from."""
    if sequence_length < 2:
        raise UserError(f"the sequence length is {sequence_length}: a row needs at least 2 tokens to predict one")


class Segment(NamedTuple):
    """An example, which stays together in one row: tokens int32 [n] and branch_ids int32 [n], with n from 1 to S.

    Where the branch falls back, as at a repeated prompt, a second segment begins.
    """

    tokens: np.ndarray
    branch_ids: np.ndarray


def document_segment(tokens: np.ndarray) -> Segment:
    """A document, or a piece of one, integers [n]: everything is branch 0.

    The tokens are copied: a view would keep all that was read with it in memory for as long as its row is open.
    """
    return Segment(np.array(tokens, np.int32), _zeros(len(tokens).bit_length())[: len(tokens)])


@functools.cache
def _zeros(bits: int) -> np.ndarray:
    """int32 [2^bits], shared by all documents: those that wait for a row would otherwise hold twice their memory."""
    zeros = np.zeros(2**bits, np.int32)
    zeros.flags.writeable = False
    return zeros


def pair_segment(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, *, repeat_prompt: bool = False
) -> Segment:
    """A preference pair: the prompt (branch 0), the chosen response (branch 1), the rejected one (branch 2).

    prompt, chosen, rejected: integers [n] each. repeat_prompt: the rejected response has a prompt of its own.
    """
    if repeat_prompt:
        return _joined((prompt, 0), (chosen, 1), (prompt, 0), (rejected, 2))
    return _joined((prompt, 0), (chosen, 1), (rejected, 2))


def instruction_segment(turns: Sequence[tuple[np.ndarray, bool]]) -> Segment:
    """A conversation, of its parts in order: (tokens, integers [n]; whether the model learns to write them)."""
    return _joined(*((tokens, TARGET if learnt else 0) for tokens, learnt in turns))


def _joined(*parts: tuple[np.ndarray, int]) -> Segment:
    return Segment(
        tokens=np.concatenate([tokens for tokens, _ in parts]).astype(np.int32),
        branch_ids=np.repeat([part for _, part in parts], [len(tokens) for tokens, _ in parts]).astype(np.int32),
    )


def pieces(tokens: np.ndarray, sequence_length: int) -> Iterator[np.ndarray]:
    """A document in pieces of at most ``sequence_length`` tokens, all but the last of exactly that many.

    A last piece of one token, such as the end of a document that fills its rows, is left out: nothing comes before it
    that it could be predicted from.
    """
    for start in range(0, len(tokens) - (len(tokens) > 1), sequence_length):
        yield tokens[start : start + sequence_length]


def best_fit(
    segments: Iterable[Segment],
    sequence_length: int,
    *,
    max_segments: int | None = None,
    open_rows: int = 1024,
    window_tokens: int = 2**22,
) -> Iterator[np.ndarray]:
    """Rows int32 [3, S] that hold each segment whole, each put where it leaves the least room.

    In each window of about ``window_tokens`` tokens the longest segments go first (best fit decreasing), so that short
    ones fill what long ones leave. max_segments: the most segments of one row. open_rows: the most rows that wait for
    more segments; beyond that the fullest one leaves. ValueError for an empty segment or one longer than a row.
    """
    # Sorted (room left, serial number): the serial number orders equal rooms, and is the key of `filled`.
    rooms: list[tuple[int, int]] = []
    filled: dict[int, list[Segment]] = {}
    serial = 0
    for segment in _longest_first(segments, window_tokens):
        length = len(segment.tokens)
        if not 0 < length <= sequence_length:
            raise ValueError(f"a segment of {length} tokens does not go into a row of {sequence_length}")
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            if len(rooms) == open_rows:
                yield row_of(filled.pop(rooms.pop(0)[1]), sequence_length)
            room, row = sequence_length, serial
            filled[row] = []
            serial += 1
        filled[row].append(segment)
        if room == length or len(filled[row]) == max_segments:
            yield row_of(filled.pop(row), sequence_length)
        else:
            bisect.insort(rooms, (room - length, row))
    for row in sorted(filled):
        yield row_of(filled[row], sequence_length)


def _longest_first(segments: Iterable[Segment], window_tokens: int) -> Iterator[Segment]:
    """The segments of each window, longest first; equally long ones stay in order."""
    window: list[Segment] = []
    tokens = 0
    for segment in segments:
        window.append(segment)
        tokens += len(segment.tokens)
        if tokens >= window_tokens:
            yield from sorted(window, key=lambda segment: -len(segment.tokens))
            window, tokens = [], 0
    yield from sorted(window, key=lambda segment: -len(segment.tokens))


def concatenate_and_split(documents: Iterable[np.ndarray], sequence_length: int) -> Iterator[np.ndarray]:
    """Rows int32 [3, S] without padding but in the last; documents (int32 [n] each) are cut where a row ends."""
    row: list[Segment] = []
    room = sequence_length
    for tokens in documents:
        start = 0
        while start < len(tokens):
            piece = tokens[start : start + room]
            row.append(document_segment(piece))
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield row_of(row, sequence_length)
                row, room = [], sequence_length
    if row:
        yield row_of(row, sequence_length)


def _falls_back(branch_ids: np.ndarray) -> np.ndarray:
    return (branch_ids[1:] == 0) & ((branch_ids[:-1] == 1) | (branch_ids[:-1] == 2))


def row_of(segments: Iterable[Segment], sequence_length: int) -> np.ndarray:
    """One row int32 [3, S]: the segments one after the other, then padding."""
    row = np.zeros((3, sequence_length), np.int32)
    start = 0
    for number, segment in enumerate(segments, 1):
        end = start + len(segment.tokens)
        row[0, start:end] = segment.tokens
        row[1, start:end] = 2 * number - 1
        row[2, start:end] = segment.branch_ids
        if len(again := np.flatnonzero(_falls_back(segment.branch_ids))):
            row[1, start + again[0] + 1 : end] += 1
        start = end
    return row

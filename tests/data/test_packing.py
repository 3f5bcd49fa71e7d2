from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.batch import batch_of
from medllm_jax.data.packing import (
    best_fit,
    concatenate_and_split,
    document_segment,
    pair_segment,
    pieces,
    row_of,
)

SIZE = st.integers(1, 17)


def numbered(lengths):
    """Token arrays of the given lengths in which no token comes twice, so that a lost or repeated one shows."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) + 1 for end, length in zip(ends, lengths, strict=True)]


def unpack(rows, sequence_length):
    """The (tokens, branch_ids) of all segments, by row; checks that each row is laid out as a row must be."""
    unpacked = []
    for row in rows:
        assert row.shape == (3, sequence_length) and row.dtype == np.int32
        tokens, segments, branches = row
        used = np.count_nonzero(segments)
        assert used > 0, "a row without a token"
        assert not row[:, used:].any(), "padding is zeros at the end"
        assert segments[0] == 1 and set(np.diff(segments[:used])) <= {0, 2}, "odd numbers from 1, each in one place"
        unpacked.append(
            [
                (tuple(tokens[segments == number]), tuple(branches[segments == number]))
                for number in range(1, segments.max() + 1, 2)
            ]
        )
    return unpacked


@given(st.data(), SIZE, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 3)), st.integers(1, 60))
def test_best_fit_keeps_every_segment_whole_and_once(data, size, open_rows, max_segments, window):
    documents = numbered(data.draw(st.lists(st.integers(1, size), max_size=40)))
    segments = [document_segment(document) for document in documents]
    options = {"max_segments": max_segments, "open_rows": open_rows, "window_tokens": window}
    rows = unpack(best_fit(iter(segments), size, **options), size)
    assert Counter(tokens for row in rows for tokens, _ in row) == Counter(map(tuple, documents))
    assert all(len(row) <= (max_segments or size) for row in rows)


@given(st.lists(st.integers(0, 50), max_size=20), SIZE)
def test_long_documents_come_back_from_their_pieces(lengths, size):
    documents = numbered(lengths)
    parts = [part for document in documents for part in pieces(document, size)]
    assert all(0 < len(part) <= size for part in parts)
    assert sum(len(part) < size for part in parts) <= len(documents)
    rows = unpack(best_fit(map(document_segment, parts), size), size)
    assert Counter(tokens for row in rows for tokens, _ in row) == Counter(map(tuple, parts))
    # A token that would stand alone in a last piece is left out.
    whole = [each[: len(each) - (len(each) > 1 and len(each) % size == 1 % size)] for each in documents]
    assert np.array_equal(np.concatenate([*parts, [0]]), np.concatenate([*whole, [0]]))


@given(st.lists(st.integers(0, 50), max_size=20), SIZE)
def test_split_is_the_documents_in_order_cut_at_row_ends(lengths, size):
    documents = numbered(lengths)
    rows = unpack(concatenate_and_split(iter(documents), size), size)
    assert len(rows) == -(-sum(lengths) // size)
    flat = [token for row in rows for tokens, _ in row for token in tokens]
    assert flat == list(range(1, sum(lengths) + 1))
    document_of = {token: number for number, document in enumerate(documents) for token in document}
    for row in rows:
        owners = [{document_of[token] for token in tokens} for tokens, _ in row]
        assert all(len(owner) == 1 for owner in owners), "a segment reaches over two documents"
        assert len(set.union(*owners)) == len(owners), "a document has two segments in one row"


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), max_size=20), st.one_of(st.none(), st.integers(1, 3)))
def test_pairs_stay_whole_with_their_branches(lengths, pairs_per_row):
    parts = iter(numbered([length for triple in lengths for length in triple]))
    pairs = [(next(parts), next(parts), next(parts)) for _ in lengths]
    rows = unpack(best_fit((pair_segment(*pair) for pair in pairs), 20, max_segments=pairs_per_row), 20)
    expected = Counter(
        (tuple(np.concatenate(pair)), (0,) * len(pair[0]) + (1,) * len(pair[1]) + (2,) * len(pair[2])) for pair in pairs
    )
    assert Counter(segment for row in rows for segment in row) == expected
    assert all(len(row) <= (pairs_per_row or 20) for row in rows)


def test_best_fit_takes_the_tightest_row():
    segments = [document_segment(document) for document in numbered([5, 7, 3, 5])]
    rows = unpack(best_fit(segments, 10), 10)
    assert sorted(sorted(len(tokens) for tokens, _ in row) for row in rows) == [[3, 7], [5, 5]]


# Medians and spreads of document lengths in tokens: abstracts, articles, and a mix of notes and textbooks.
MIXES = {"abstracts": ((350, 0.5),), "articles": ((3500, 0.8),), "notes and books": ((120, 0.8), (30_000, 1.0))}


@pytest.mark.parametrize("mix", MIXES)
def test_best_fit_fills_rows_of_4096(mix):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.lognormal(np.log(median), spread, 1500) for median, spread in MIXES[mix]])
    documents = [np.ones(max(1, int(length)), np.int32) for length in rng.permutation(lengths)]
    parts = (part for document in documents for part in pieces(document, 4096))
    rows = sum(1 for _ in best_fit(map(document_segment, parts), 4096))
    fill = sum(map(len, documents)) / (rows * 4096)
    assert fill >= 0.99


@pytest.mark.parametrize("length", [0, 11])
def test_best_fit_refuses_what_does_not_fit(length):
    with pytest.raises(ValueError, match=f"segment of {length} tokens"):
        list(best_fit([document_segment(np.ones(length, np.int32))], 10))


def test_a_repeated_prompt_begins_a_segment():
    pairs = [pair_segment(*numbered([2, 3, 1]), repeat_prompt=repeat) for repeat in (True, False, True)]
    tokens, segments, branches = row_of(pairs, 24)
    assert segments.tolist() == [1] * 5 + [2] * 3 + [3] * 6 + [5] * 5 + [6] * 3 + [0, 0]
    assert branches.tolist() == [0, 0, 1, 1, 1, 0, 0, 2, 0, 0, 1, 1, 1, 2, 0, 0, 1, 1, 1, 0, 0, 2, 0, 0]
    assert tokens[5:7].tolist() == tokens[:2].tolist()
    batch = batch_of(np.stack([tokens, segments, branches])[None], "pairs")
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert batch.loss_weights[0].astype(int).tolist() == (branches > 0).astype(int).tolist()

"""Rows that say their runs by themselves are the rows of three channels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.batch import batch_of, batch_of_marked
from medllm_jax.data.packing import document_segment, instruction_segment, pair_segment, row_of
from medllm_jax.data.runs import MAX_TOKEN_ID, PADDING_MARK, channels, mark

TOKENS = st.lists(st.one_of(st.integers(0, 9), st.just(MAX_TOKEN_ID)), min_size=1, max_size=4).map(np.array)
SEGMENTS = {
    "cpt": TOKENS.map(document_segment),
    "sft": st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=4).map(instruction_segment),
    "pairs": st.tuples(TOKENS, TOKENS, TOKENS, st.booleans()).map(
        lambda parts: pair_segment(*parts[:3], repeat_prompt=parts[3])
    ),
}


@pytest.mark.parametrize("kind", SEGMENTS)
@given(st.data())
def test_marked_rows_are_the_rows(kind, data):
    """Of every kind, with rows that are all padding among them."""
    rows = data.draw(st.lists(st.lists(SEGMENTS[kind], max_size=3), min_size=1, max_size=4))
    stored = np.stack([row_of(segments, 50) for segments in rows])
    marked = mark(stored)
    assert marked.shape == (len(rows), 50) and marked.dtype == np.int32
    assert np.array_equal(channels(marked.copy()), stored)
    for found, expected in zip(batch_of_marked(marked, kind)[:5], batch_of(stored, kind)[:5], strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_a_row_of_padding_has_one_mark():
    assert mark(np.zeros((1, 3, 4), np.int32)).tolist() == [[PADDING_MARK, 0, 0, 0]]


@pytest.mark.parametrize(
    ("channel", "values", "line"),
    [
        (0, [MAX_TOKEN_ID + 1, 0, 0, 0], "token ids from 0 to 67108864, not from 0 to 67108863"),
        (0, [0, -1, 0, 0], "token ids from -1 to 0"),
        (1, [3, 3, 3, 3], "segments of a row"),
        (1, [1, 0, 1, 0], "segments of a row"),
        (1, [1, 5, 5, 0], "segments of a row"),
        (1, [1, 3, 1, 0], "segments of a row"),
        (1, [-1, -1, 0, 0], "segments of a row"),
        (2, [0, 4, 0, 0], "branches from 0 to 4, not from 0 to 3"),
    ],
)
def test_rows_that_no_packing_makes_are_refused(channel, values, line):
    rows = np.zeros((2, 3, 4), np.int32)
    rows[:, 1, :3] = 1
    rows[1, channel] = values
    with pytest.raises(ValueError, match=line):
        mark(rows)

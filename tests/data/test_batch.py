import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.batch import batch_of
from medllm_jax.data.packing import document_segment, pair_segment, row_of

LENGTH = st.integers(1, 5)


def expected_row(parts_of_segments, sequence_length, kind):
    """Positions and loss weights by the words of the definition: token by token, from lengths (prompt, *responses)."""
    positions, weights = [], []
    for prompt, *responses in parts_of_segments:
        for place in range(prompt):
            positions.append(place)
            weights.append(float(kind == "cpt" and place > 0))
        for response in responses:
            for place in range(response):
                positions.append(prompt + place)
                weights.append(1.0)
    padding = [0] * (sequence_length - len(positions))
    return positions + padding, weights + padding


@given(st.lists(st.tuples(LENGTH, LENGTH, LENGTH), max_size=4), st.integers(0, 3))
def test_pairs_follow_the_definition(lengths, padding):
    size = max(1, sum(map(sum, lengths)) + padding)
    row = row_of([pair_segment(*(np.ones(n, np.int32) for n in parts)) for parts in lengths], size)
    batch = batch_of(row[None], "pairs")
    positions, weights = expected_row(lengths, size, "pairs")
    assert batch.positions[0].tolist() == positions
    assert batch.loss_weights[0].tolist() == weights
    assert batch.loss_weights.sum() == sum(chosen + rejected for _, chosen, rejected in lengths)


@given(st.lists(LENGTH, max_size=6), st.integers(0, 3))
def test_documents_follow_the_definition(lengths, padding):
    size = max(1, sum(lengths) + padding)
    row = row_of([document_segment(np.ones(n, np.int32)) for n in lengths], size)
    batch = batch_of(row[None], "cpt")
    positions, weights = expected_row([(n,) for n in lengths], size, "cpt")
    assert batch.positions[0].tolist() == positions
    assert batch.loss_weights[0].tolist() == weights
    assert batch.loss_weights.sum() == sum(n - 1 for n in lengths)


@given(st.lists(st.lists(st.tuples(LENGTH, LENGTH, LENGTH), max_size=2), min_size=2, max_size=4))
def test_rows_of_a_batch_do_not_touch_each_other(rows_of_lengths):
    rows = np.stack(
        [
            row_of([pair_segment(*(np.ones(n, np.int32) for n in parts)) for parts in lengths], 40)
            for lengths in rows_of_lengths
        ]
    )
    together = batch_of(rows, "pairs")
    for number, row in enumerate(rows):
        alone = batch_of(row[None], "pairs")
        assert all(np.array_equal(a[number], b[0]) for a, b in zip(together[:5], alone[:5], strict=True))


def test_types_shapes_and_reference():
    rows = np.stack([row_of([pair_segment([1, 2], [3], [4, 5])], 8)] * 3)
    reference = np.zeros((3, 1, 2), np.float32)
    batch = batch_of(rows, "pairs", reference)
    assert [a.dtype for a in batch] == [np.int32] * 4 + [np.float32] * 2
    assert all(a.shape == (3, 8) and a.flags.c_contiguous for a in batch[:5])
    assert batch.reference_log_probs is reference
    assert batch.tokens[0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 2, 3, 0, 0, 0]

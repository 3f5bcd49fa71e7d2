import itertools
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.loader import BatchStream
from medllm_jax.data.order import RowOrder, Turns, check_mix, shuffled
from medllm_jax.data.rows import Rows
from medllm_jax.errors import UserError
from tests.data.stores import numbered_rows, write_rows

MIX = {"short": 0.3, "long": 0.7, "one": 2, "none": 0}
SIZES = st.one_of(st.integers(1, 200), st.sampled_from([2**16 - 1, 2**16, 2**16 + 1, 2**16 + 2, 2**18 + 1, 10**9]))


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Two stores of four corpora, one of them of a single row; the first token of a row is its id."""
    folder, rows = tmp_path_factory.mktemp("data"), numbered_rows(600)
    first = write_rows(folder / "a", rows[:200], corpora={"short": 130, "none": 70})
    return Rows([first, write_rows(folder / "b", rows[200:], corpora={"one": 1, "long": 399})])


@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 10**10), st.integers(0, 100))
def test_the_order_is_that_of_grains_shuffle(size, seed, start, count):
    theirs = grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    expected = [theirs[place] for place in range(start, start + count)]
    assert shuffled(start, start + count, size, seed).tolist() == expected


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_is_derived_as_grain_does(two_stores, seed):
    theirs = grain.MapDataset.range(600).seed(seed).shuffle().repeat()
    assert RowOrder(two_stores, seed).ids(500, 700).tolist() == [theirs[place] for place in range(500, 700)]


@pytest.mark.parametrize("mix", [None, MIX])
def test_where_a_part_of_the_order_begins_changes_nothing(two_stores, mix):
    order = RowOrder(two_stores, 3, mix)
    whole = order.ids(0, 2000)
    ends = [0, 1, 2, 9, 599, 600, 601, 1300, 2000]
    parts = [order.ids(start, stop) for start, stop in itertools.pairwise(ends)]
    assert np.array_equal(np.concatenate(parts), whole) and order.ids(5, 5).tolist() == []


def mixed(rows, count, batch_size=10, seed=7, mix=MIX):
    """The ids of the first rows of a mix, and the corpora that they are of."""
    order = RowOrder(rows, seed, mix)
    row_ids = np.concatenate([order.ids(start, start + batch_size) for start in range(0, count, batch_size)])
    ranges = {c.name: range(c.first_row, c.first_row + c.rows) for c in rows.corpora}
    return row_ids, np.array([next(name for name, ids in ranges.items() if row in ids) for row in row_ids])


@pytest.mark.parametrize("batch_size", [1, 10, 150])
def test_a_mix_is_exact_in_every_window(two_stores, batch_size):
    """0.3 : 0.7 : 2 is 3 : 7 : 20 in any 30 rows on end, wherever they begin."""
    _, corpora = mixed(two_stores, 300, batch_size)
    for start in range(271):
        assert Counter(corpora[start : start + 30]) == {"short": 3, "long": 7, "one": 20}


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((1,), (1,)),
        ((3, 7), (3, 7)),
        ((0.3, 0.7), (3, 7)),
        ((1e-3, 1.0, 0.5), (2, 2000, 1000)),
        ((5, 1, 1, 1, 1, 1), (5, 1, 1, 1, 1, 1)),
        ((1e-9, 1e9), (1, 10**18)),
    ],
)
def test_turns_are_exact_and_no_element_is_left_out(weights, parts):
    turns, window = Turns(weights), min(sum(parts), 4000)
    for start in (0, 1, 17 * sum(parts) + 3, 10**15):
        found = turns.of(start, start + window)
        assert sorted(np.concatenate([own for own, _ in found])) == list(range(window))
        following = turns.of(start + window, start + window + 1)
        for part, (own, first), (_, after) in zip(parts, found, following, strict=True):
            assert after == first + len(own)
            assert len(own) == part or window < sum(parts)
    assert all(first == 0 for _, first in turns.of(0, window))


def test_each_corpus_of_a_mix_has_its_own_epochs(two_stores):
    row_ids, corpora = mixed(two_stores, 6000)
    for name, size, count in (("short", 130, 4), ("long", 399, 3), ("one", 1, 4000)):
        read = row_ids[corpora == name]
        epochs = read[: len(read) // size * size].reshape(-1, size)
        assert len(epochs) == count
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert size == 1 or len(set(map(tuple, epochs))) == len(epochs)


def test_a_mix_depends_on_its_seed_and_on_no_order_of_its_names(two_stores):
    row_ids, _ = mixed(two_stores, 300)
    assert np.array_equal(row_ids, mixed(two_stores, 300, mix=dict(reversed(MIX.items())))[0])
    assert not np.array_equal(row_ids, mixed(two_stores, 300, seed=8)[0])


def test_corpora_of_one_size_have_orders_of_their_own(tmp_path):
    rows = Rows([write_rows(tmp_path / "store", numbered_rows(400), corpora={"a": 200, "b": 200})])
    row_ids, corpora = mixed(rows, 2000, mix={"a": 1, "b": 1})
    orders = [tuple(epoch) for name in "ab" for epoch in (row_ids[corpora == name] % 200).reshape(5, 200)]
    assert len(set(orders)) == 10


def test_the_order_of_a_mix_is_the_one_of_earlier_versions(two_stores):
    assert mixed(two_stores, 12, 12, seed=0)[0].tolist() == [119, 200, 200, 200, 555, 200, 200, 200, 578, 200, 103, 200]


@pytest.mark.parametrize(
    ("mix", "line"),
    [
        (MIX | {"lnog": 1}, "no corpus lnog; there is short .130 rows., none .70 rows., one .1 rows., long .399 rows."),
        ({"short": 1, "none": 1, "one": 1}, "long has no weight"),
        (MIX | {"one": -1}, "the weight of one is -1, not 0 or more"),
        (MIX | {"one": float("nan")}, "the weight of one is nan"),
        (MIX | {"one": float("inf")}, "the weight of one is inf"),
        (dict.fromkeys(MIX, 0), "every weight is 0"),
        ({}, "short has no weight"),
    ],
)
def test_a_mix_that_does_not_fit_says_what_there_is(two_stores, mix, line):
    with pytest.raises(UserError, match=line):
        check_mix(two_stores, mix)
    with pytest.raises(UserError, match=line):
        BatchStream(two_stores, 4, 0, mix=mix)

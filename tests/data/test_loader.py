from collections import Counter

import numpy as np
import pytest

from medllm_jax.data.batch import batch_of
from medllm_jax.data.loader import BatchStream, in_order
from medllm_jax.data.order import RowOrder
from medllm_jax.data.rows import Rows
from medllm_jax.data.runs import channels
from medllm_jax.errors import UserError
from tests.data.stores import numbered_rows, write_rows

COUNT = 41  # prime: no batch size divides an epoch
MIX = {"short": 0.3, "long": 0.7, "one": 2, "none": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Rows([write_rows(tmp_path_factory.mktemp("data") / "store", numbered_rows(COUNT))])


@pytest.fixture(scope="module")
def pair_store(tmp_path_factory):
    rows = numbered_rows(COUNT, kind="pairs")
    return Rows([write_rows(tmp_path_factory.mktemp("data") / "pairs", rows, kind="pairs")])


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Two stores of four corpora, one of them of a single row; the first token of a row is its id."""
    folder, rows = tmp_path_factory.mktemp("data"), numbered_rows(600)
    first = write_rows(folder / "a", rows[:200], corpora={"short": 130, "none": 70})
    return Rows([first, write_rows(folder / "b", rows[200:], corpora={"one": 1, "long": 399})])


@pytest.fixture(scope="module")
def two_pair_stores(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("data"), numbered_rows(300, kind="pairs")
    first = write_rows(folder / "a", rows[:110], kind="pairs", corpora={"first": 110})
    return Rows([first, write_rows(folder / "b", rows[110:], kind="pairs", corpora={"second": 190})])


def next_of(stream):
    found = next(stream)
    return found.arrays, found.row_ids, found.position


def take(rows, steps, batch_size=4, seed=7, **options):
    """The row ids of ``steps`` batches, [steps, rows]; checks that the batches hold those very rows and references."""
    numbers, reference, everything = [], options.get("reference"), channels(rows.read_marked(range(len(rows))))
    size, index = batch_size // options.get("process_count", 1), options.get("process_index", 0)
    with BatchStream(rows, batch_size, seed, **options) as stream:
        start = stream.position
        for step in range(start, start + steps):
            batch, row_ids, position = next_of(stream)
            assert stream.position == position == step + 1
            numbers.append(batch.tokens[:, 0])
            assert row_ids.dtype == np.int64 and row_ids.shape == (batch_size,)
            assert numbers[-1].tolist() == row_ids[index * size :][:size].tolist()
            expected = batch_of(
                everything[numbers[-1]], rows.kind, None if reference is None else reference[numbers[-1]]
            )
            assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))
    return np.array(numbers)


def test_every_epoch_has_every_row_in_a_new_order(store):
    epochs = take(store, COUNT, batch_size=3).reshape(3, COUNT)
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    orders = [*epochs.tolist(), list(range(COUNT)), take(store, COUNT, batch_size=1, seed=8)[:, 0].tolist()]
    assert len(set(map(tuple, orders))) == 5


def test_the_order_is_the_one_of_earlier_versions(store):
    # A checkpoint keeps a position in this order: an upgrade that changes the order must not pass unnoticed.
    assert take(store, 1, batch_size=12, seed=0)[0].tolist() == [21, 37, 31, 14, 9, 7, 28, 6, 24, 3, 36, 15]


@pytest.mark.parametrize("position", [0, 1, 9, 10, 11, 25, 1000])
def test_resume_continues_exactly(store, position):
    whole = take(store, position + 5) if position < 100 else take(store, 5, position=position, threads=1)
    assert np.array_equal(take(store, 5, position=position), whole[-5:])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [4, 2, 1])
@pytest.mark.parametrize("kind", ["plain", "mix", "pairs", "pairs of two stores"])
def test_a_position_goes_on_on_any_number_of_hosts(request, kind, before, after, threads):
    """A stream stopped on some hosts, continued on others with other threads, is the one that never stopped."""
    name, mix = {
        "plain": ("store", None),
        "mix": ("two_stores", MIX),
        "pairs": ("pair_store", None),
        "pairs of two stores": ("two_pair_stores", {"first": 1, "second": 1}),
    }[kind]
    rows = request.getfixturevalue(name)
    reference = None
    if rows.kind == "pairs":
        reference = np.random.default_rng(1).normal(size=(len(rows), 1, 2)).astype(np.float32)

    def on_hosts(count, steps, **options):
        parts = [
            take(rows, steps, 8, mix=mix, reference=reference, process_index=i, process_count=count, **options)
            for i in range(count)
        ]
        assert all(part.shape == (steps, 8 // count) for part in parts)
        return np.concatenate(parts, axis=1)

    whole = take(rows, 9, 8, mix=mix, reference=reference)
    stopped = on_hosts(before, 4, threads=threads, prefetch=3)
    resumed = on_hosts(after, 5, threads=4 - threads, prefetch=3, position=4)
    assert np.array_equal(np.concatenate([stopped, resumed]), whole)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (2, 5), (16, 32)])
def test_threads_change_nothing(store, threads, prefetch):
    assert np.array_equal(take(store, 15, threads=threads, prefetch=prefetch), take(store, 15))


def test_a_batch_larger_than_the_store(store):
    numbers = take(store, 3, batch_size=2 * COUNT)
    assert sorted(numbers.ravel()) == sorted(list(range(COUNT)) * 6)


def test_reference_follows_its_rows(pair_store):
    reference = np.arange(COUNT * 2, dtype=np.float32).reshape(COUNT, 1, 2)
    stream = BatchStream(pair_store, 4, 1, reference=reference)
    for _ in range(15):
        batch = next(stream).arrays
        assert np.array_equal(batch.reference_log_probs, reference[batch.tokens[:, 0]])
    assert next(BatchStream(pair_store, 4, 1)).arrays.reference_log_probs is None


def test_wrong_settings(store, pair_store):
    with pytest.raises(UserError, match=r"6 rows does not divide between 4 processes"):
        BatchStream(store, 6, 0, process_count=4)
    with pytest.raises(UserError, match=r"does not divide"):
        in_order(store, 6, process_count=4)
    with pytest.raises(UserError, match="batch size is 0"):
        BatchStream(store, 0, 0)
    with pytest.raises(UserError, match="seed is -1"):
        BatchStream(store, 4, -1)
    with pytest.raises(ValueError, match="process 2 of 2"):
        BatchStream(store, 4, 0, process_index=2, process_count=2)
    for wrong in (np.zeros((COUNT, 1, 2)), np.zeros((COUNT, 2, 2), np.float32)):
        with pytest.raises(ValueError, match="needs float32"):
            BatchStream(pair_store, 4, 0, reference=wrong)
    with pytest.raises(ValueError, match="needs float32"):
        BatchStream(store, 4, 0, reference=np.zeros((COUNT, 0, 2), np.float32))


def test_a_mixed_batch_larger_than_a_corpus(two_stores):
    (batch,) = take(two_stores, 1, batch_size=900, mix=MIX)
    assert Counter(batch)[200] == 600 and len(set(batch)) == 1 + 90 + 210


def test_a_corpus_without_rows_can_only_have_no_weight(tmp_path):
    rows = Rows([write_rows(tmp_path / "store", numbered_rows(5), corpora={"some": 5, "empty": 0})])
    with pytest.raises(UserError, match="empty has no rows, so its weight must be 0"):
        BatchStream(rows, 4, 0, mix={"some": 1, "empty": 1})
    assert set(take(rows, 5, mix={"some": 1, "empty": 0}).ravel()) == set(range(5))


def test_a_batch_is_one_request_to_each_store(two_stores, monkeypatch):
    requests = []
    for store in two_stores.stores:
        monkeypatch.setattr(
            store, "read_marked", lambda ids, read=store.read_marked: requests.append(len(ids)) or read(ids)
        )
    with BatchStream(two_stores, 16, 0, threads=0, prefetch=0) as stream:
        for step in range(1, 5):
            next(stream)
            assert len(requests) == 2 * step and sum(requests) == 16 * step


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_damage_comes_out_of_next(tmp_path, threads):
    """A batch with a damaged row is never handed out, nor one after it in its place."""
    write_rows(tmp_path / "store", numbered_rows(COUNT))
    (shard,) = (file for file in (tmp_path / "store" / "rows" / "c").rglob("*") if file.is_file())
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    rows = Rows.open([tmp_path / "store"])
    (bad,) = (row for row in range(COUNT) if list(rows.stores[0].problems([row])))
    with BatchStream(rows, 4, 0, threads=threads, prefetch=threads) as stream:
        expected = RowOrder(rows, 0).ids(0, 400).reshape(-1, 4)
        while bad not in expected[stream.position]:
            batch, row_ids, _ = next_of(stream)
            assert batch.tokens[:, 0].tolist() == row_ids.tolist() == expected[stream.position - 1].tolist()
        position = stream.position
        for _ in range(3):
            with pytest.raises(UserError, match=f"row {bad} of store .* is damaged"):
                next(stream)
            assert stream.position == position


def test_storage_that_is_back_is_read_where_it_was_left(store, monkeypatch):
    expected, gone, read = take(store, 12), {5, 6, 9}, store.stores[0].read_marked

    def read_or_fail(ids):
        asked = ids.reshape(-1, 4).tolist()
        if steps := [step for step in sorted(gone) if expected[step].tolist() in asked]:
            gone.remove(steps[0])
            raise ConnectionError
        return read(ids)

    monkeypatch.setattr(store.stores[0], "read_marked", read_or_fail)
    found = []
    with BatchStream(store, 4, 7) as stream:
        while len(found) < 12:
            try:
                found.append(next(stream).arrays.tokens[:, 0])
            except ConnectionError:
                continue
    assert not gone and np.array_equal(found, expected)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 1), (41, 1), (64, 1), (2, 2), (40, 4), (64, 2)])
def test_in_order_is_one_pass(store, batch_size, processes):
    parts = [list(in_order(store, batch_size, process_index=i, process_count=processes)) for i in range(processes)]
    assert [len(part) for part in parts] == [-(-COUNT // batch_size)] * processes
    numbers = []
    for shares in zip(*parts, strict=True):
        tokens = np.concatenate([batch.tokens for batch, _ in shares])
        segments = np.concatenate([batch.segment_ids for batch, _ in shares])
        weights = np.concatenate([batch.loss_weights for batch, _ in shares])
        (real,) = {real for _, real in shares}
        assert len(tokens) == batch_size
        assert segments[:real].any(axis=1).all() and not segments[real:].any() and not weights[real:].any()
        numbers.extend(tokens[:real, 0])
    assert numbers == list(range(COUNT))


def test_in_order_takes_a_store_or_several(two_stores):
    def numbers_of(rows):
        return [number for batch, real in in_order(rows, 64) for number in batch.tokens[:real, 0].tolist()]

    assert numbers_of(two_stores) == list(range(600))
    assert numbers_of(two_stores.stores[1]) == list(range(200, 600))

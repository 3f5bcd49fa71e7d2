import numpy as np
import pytest

from medllm_jax.data.batch import batch_of
from medllm_jax.data.pipeline import BatchStream, in_order
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from tests.data.stores import numbered_rows, write_rows

COUNT = 41  # prime: no batch size divides an epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "store", numbered_rows(COUNT))


@pytest.fixture(scope="module")
def pair_store(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs", numbered_rows(COUNT, kind="pairs"), kind="pairs")


def take(store, steps, batch_size=4, seed=7, **options):
    """The row numbers of ``steps`` batches, [steps, rows]; checks that the batches hold those very rows."""
    stream = BatchStream(store, batch_size, seed, **options)
    start = stream.position
    numbers = []
    for step in range(steps):
        batch = next(stream)
        assert stream.position == start + step + 1
        numbers.append(batch.tokens[:, 0])
        expected = batch_of(store.read(numbers[-1]), store.metadata.kind)
        assert all(np.array_equal(a, b) for a, b in zip(batch[:5], expected[:5], strict=True))
    stream.close()
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


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 12])
def test_processes_share_one_order(store, processes, position):
    parts = [
        take(store, 15, position=position, process_index=index, process_count=processes) for index in range(processes)
    ]
    assert all(part.shape == (15, 4 // processes) for part in parts)
    assert np.array_equal(np.concatenate(parts, axis=1), take(store, 15 + position)[position:])


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
        batch = next(stream)
        assert np.array_equal(batch.reference_log_probs, reference[batch.tokens[:, 0]])
    assert next(BatchStream(pair_store, 4, 1)).reference_log_probs is None


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


def test_damage_comes_out_of_next(tmp_path):
    write_rows(tmp_path / "store", numbered_rows(COUNT))
    (shard,) = (file for file in (tmp_path / "store" / "rows" / "c").rglob("*") if file.is_file())
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    stream = BatchStream(RowStore.open(tmp_path / "store"), 4, 0)
    with pytest.raises(UserError, match=r"row \d+ of store .* is damaged"):
        for _ in range(COUNT):
            next(stream)


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

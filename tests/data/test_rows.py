import hashlib
import pickle

import numpy as np
import pytest

from medllm_jax.data.reference_log_probs import read_reference, read_references, write_reference, write_references
from medllm_jax.data.rows import Rows, Seen
from medllm_jax.data.runs import channels
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from tests.data import stores
from tests.data.stores import numbered_rows, write_rows


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three stores, the rows of the whole numbered through."""
    folder, rows = tmp_path_factory.mktemp("stores"), numbered_rows(60)
    rows[:, 1, 9:] = np.arange(60)[:, None] % 2  # rows of 9 and of 12 tokens
    write_rows(folder / "a", rows[:20], corpora={"papers": 13, "empty": 0, "notes": 7})
    write_rows(folder / "b", rows[20:21], corpora={"one": 1})
    write_rows(folder / "c", rows[21:], corpora={"books": 39})
    return [folder / name for name in "abc"]


@pytest.mark.parametrize("indices", [[], [0], [59, 0, 20, 20, 7, 21], np.random.default_rng(0).integers(0, 60, 100)])
def test_rows_come_in_the_order_asked_for(paths, indices):
    rows = Rows.open(paths)
    assert len(rows) == 60
    for opened in (rows, pickle.loads(pickle.dumps(rows))):
        found = channels(opened.read_marked(indices))
        assert found.shape == (len(indices), 3, 12) and found.dtype == np.int32
        assert found[:, 0, 0].tolist() == list(indices)


def test_what_is_out_of_range_is_not_a_row_of_another_store(paths):
    for wrong in (-1, 60):
        with pytest.raises(IndexError, match="of 60 in stores"):
            Rows.open(paths).read_marked([0, wrong])


def test_corpora_and_tokens_are_those_of_the_whole(paths):
    rows = Rows.open(paths)
    found = [(corpus.name, corpus.first_row, corpus.rows) for corpus in rows.corpora]
    assert found == [("papers", 0, 13), ("empty", 13, 0), ("notes", 13, 7), ("one", 20, 1), ("books", 21, 39)]
    assert rows.tokens_per_row.tolist() == [9, 12] * 30
    assert (rows.kind, rows.sequence_length, rows.pairs_per_row) == ("cpt", 12, 0)
    assert rows.max_token_id == max(store.metadata.max_token_id for store in rows.stores)
    parts = rows.split(np.arange(60))
    assert [(store.path, part.tolist()) for store, part in parts] == [
        (path, list(range(*ends))) for path, ends in zip(paths, [(0, 20), (20, 21), (21, 60)], strict=True)
    ]


def test_one_store_has_its_own_digest_and_several_one_of_theirs_in_order(paths):
    own = [RowStore.open(path).metadata.digest for path in paths]
    assert Rows.open(paths[:1]).digest == own[0]
    assert Rows.open(paths).digest == hashlib.sha256("".join(own).encode()).hexdigest()
    assert len({Rows.open(order).digest for order in (paths, paths[::-1], paths[:2])}) == 3


def test_stores_that_do_not_go_together(tmp_path, paths, monkeypatch):
    write_rows(tmp_path / "long", numbered_rows(5, 16), corpora={"long": 5})
    write_rows(tmp_path / "pairs", numbered_rows(5, kind="pairs"), kind="pairs", corpora={"pairs": 5})
    write_rows(tmp_path / "same", numbered_rows(5), corpora={"notes": 5})
    monkeypatch.setattr(stores, "ABOUT", stores.ABOUT | {"tokenizer_fingerprint": "e" * 64})
    write_rows(tmp_path / "other", numbered_rows(5), corpora={"other": 5})
    for name, line in {
        "long": r"another length \(16, the first 12\)",
        "pairs": r"another kind \(pairs, the first cpt\)",
        "other": r"another tokenizer \(eeeeeeeeeeee, the first ffffffffffff\)",
    }.items():
        with pytest.raises(UserError, match=rf"{paths[0]} and {tmp_path / name} do not go together: .*{line}"):
            Rows.open([*paths, tmp_path / name])
    with pytest.raises(UserError, match=rf"{paths[0]} and {tmp_path / 'same'} both have a corpus notes"):
        Rows.open([*paths, tmp_path / "same"])
    with pytest.raises(UserError, match="both have a corpus one"):
        Rows.open([paths[1], paths[1]])
    with pytest.raises(UserError, match="no store is given"):
        Rows.open([])


def test_references_of_several_stores_are_one_and_stay_their_own(tmp_path):
    one, two = numbered_rows(4, 24, kind="pairs"), numbered_rows(6, 24, kind="pairs")
    two[3:, 1, 9:18], two[3:, 2, 9:18] = 3, two[3:, 2, :9]
    first = write_rows(tmp_path / "a", one, kind="pairs", corpora={"a": 4})
    second = write_rows(tmp_path / "b", two, kind="pairs", corpora={"b": 6})
    rows = Rows([first, second])
    assert (first.metadata.pairs_per_row, second.metadata.pairs_per_row, rows.pairs_per_row) == (1, 2, 2)
    values = np.random.default_rng(0).normal(size=(10, 2, 2)).astype(np.float32)
    values[:4, 1] = 0  # there is no such pair
    write_references(rows, "model", values)
    assert np.array_equal(read_references(rows, "model"), values)
    assert np.array_equal(read_reference(first, "model"), values[:4, :1])
    assert np.array_equal(read_references(Rows([second, first]), "model"), np.concatenate([values[4:], values[:4]]))
    write_reference(second, "another", values[4:])
    with pytest.raises(UserError, match=f"store {tmp_path / 'a'} has no reference"):
        read_references(rows, "another")


def test_seen_counts_what_was_read(paths):
    rows = Rows.open(paths)
    batches = np.random.default_rng(0).integers(0, 60, (9, 16))
    whole, resumed = Seen(rows), Seen(rows)
    for number, batch in enumerate(batches):
        whole.add(batch)
        resumed.add(batch)
        if number == 4:
            resumed = Seen(rows, resumed.counts)
    assert resumed.counts == whole.counts
    for corpus in rows.corpora:
        of_corpus = [row for row in batches.ravel() if corpus.first_row <= row < corpus.first_row + corpus.rows]
        assert whole.counts[f"rows/{corpus.name}"] == len(of_corpus)
        assert whole.counts[f"tokens/{corpus.name}"] == sum(rows.tokens_per_row[of_corpus])
    assert whole.epochs == 9 * 16 / 60

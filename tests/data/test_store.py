import contextlib
import hashlib
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest

from medllm_jax.data import store_writer as writer_module
from medllm_jax.data.prepare.store_report import report
from medllm_jax.data.store import RowStore, check_compatible, verify
from medllm_jax.data.store_writer import CorpusFacts, RowStoreWriter
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import kvstore_spec
from tests.data.stores import ABOUT, numbered_rows, write_rows


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writer_module, "_MAX_SHARD_ROWS", 8)


def shards(path):
    return sorted(file for file in (path / "rows" / "c").rglob("*") if file.is_file())


@pytest.mark.parametrize("count", [1, 7, 8, 16, 61])
def test_rows_come_back_in_any_order(tmp_path, small_shards, count):
    rows = numbered_rows(count)
    store = write_rows(tmp_path / "store", rows)
    assert len(store) == count and len(shards(tmp_path / "store")) == -(-count // 8)
    assert np.array_equal(store.read(range(count)), rows)
    indices = np.random.default_rng(1).integers(0, count, 50)
    assert np.array_equal(store.read(indices), rows[indices])
    assert store.read([]).shape == (0, 3, 12)
    for beyond in (-1, count):
        with pytest.raises(IndexError):
            store.read([0, beyond])


def test_metadata_describes_the_rows(tmp_path, small_shards):
    rows = numbered_rows(20, kind="pairs")
    rows[3, 0, 1] = 777
    rows[5, 1, 5:9] = 3
    found = write_rows(tmp_path / "store", rows, kind="pairs").metadata
    assert (found.kind, found.rows, found.sequence_length, found.examples) == ("pairs", 20, 12, 20)
    assert (found.tokens, found.fill) == (180, 0.75)
    assert (found.max_token_id, found.pairs_per_row) == (777, 2)
    assert found.digest == hashlib.sha256(rows.tobytes()).hexdigest()
    assert write_rows(tmp_path / "cpt", numbered_rows(2)).metadata.pairs_per_row == 0


def test_shards_do_not_change_the_digest(tmp_path, monkeypatch):
    digests = set()
    for shard_rows in (1, 5, 4096):
        monkeypatch.setattr(writer_module, "_MAX_SHARD_ROWS", shard_rows)
        digests.add(write_rows(tmp_path / str(shard_rows), numbered_rows(23)).metadata.digest)
    assert len(digests) == 1


def test_a_flipped_byte_anywhere_is_reported(tmp_path, small_shards):
    """In rows, shard indices, and every file beside them; and the store is as good as before when it is put back."""
    path = tmp_path / "store"
    write_rows(path, numbered_rows(11), corpora={"a": 4, "b": 7})
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        in_rows = file.parent.name == "0"
        for place in range(0, len(content), 3 if in_rows else 5):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            shard = file.relative_to(path)
            match = rf"row \d+ of store {path} is damaged or missing \(shard {shard}\)" if in_rows else str(path)
            with pytest.raises(UserError, match=match):
                verify(path)
            if in_rows:
                with pytest.raises(UserError, match=match):
                    RowStore.open(path).read(range(11))
        file.write_bytes(content)
    assert np.array_equal(verify(path).read(range(11)), numbered_rows(11))


def test_verify_names_every_damaged_row(tmp_path, small_shards):
    path = tmp_path / "store"
    write_rows(path, numbered_rows(20))
    middle = shards(path)[1]
    seen = []
    verify(path, seen.append)
    assert seen == [8, 16, 20]
    middle.write_bytes(middle.read_bytes()[:-5])
    with pytest.raises(UserError) as caught:
        verify(path)
    told = str(caught.value)
    assert told.startswith(f"row 8 of store {path} is damaged or missing")
    assert told.endswith("so are 7 more rows: 9, 10, 11, 12, 13, 14, 15")


def test_verify_tells_whole_rows_that_are_not_the_ones_described(tmp_path, small_shards):
    path, other = tmp_path / "store", tmp_path / "other"
    write_rows(path, numbered_rows(16))
    write_rows(other, numbered_rows(16) * 2)
    shutil.copy(shards(other)[1], shards(path)[1])
    with pytest.raises(UserError, match=r"not those that store\.json describes"):
        verify(path)


def test_corpora_are_ranges_of_rows(tmp_path, small_shards):
    rows = numbered_rows(20)
    rows[3:, 1, 7:] = 0
    store = write_rows(tmp_path / "store", rows, corpora={"a": 3, "none": 0, "b": 17})
    found = store.metadata.corpora
    assert [(c.name, c.first_row, c.rows, c.examples, c.tokens) for c in found] == [
        ("a", 0, 3, 3, 27), ("none", 3, 0, 0, 0), ("b", 3, 17, 17, 119),
    ]  # fmt: skip
    assert store.metadata.examples == 20
    assert np.array_equal(store.tokens_per_row, np.count_nonzero(rows[:, 1], axis=-1))
    with RowStoreWriter(tmp_path / "mixed", "cpt", 12) as writer:
        writer.append(rows[:2], "a")
        writer.append(rows[:2], "b")
        with pytest.raises(ValueError, match="after those of another"):
            writer.append(rows[:2], "a")
        with pytest.raises(ValueError, match="rows are of"):
            writer.finish({"a": CorpusFacts(examples=2)}, **ABOUT)


def test_storage_that_cannot_be_reached_is_not_damage(tmp_path, monkeypatch):
    store = write_rows(tmp_path / "store", numbered_rows(3))

    class Unreachable:
        def __getitem__(self, index):
            raise ValueError("UNAVAILABLE: the network is down")

    monkeypatch.setattr(store, "_array", Unreachable())
    with pytest.raises(ValueError, match="UNAVAILABLE"):  # storage's own error, which the command line tells
        store.read([1])


def test_damage_names_the_row_and_leaves_the_others_readable(tmp_path, small_shards):
    rows = numbered_rows(8)
    store = write_rows(tmp_path / "store", rows)
    (shard,) = shards(tmp_path / "store")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    store = RowStore.open(tmp_path / "store")
    readable = []
    for row in range(8):
        try:
            assert np.array_equal(store.read([row])[0], rows[row])
            readable.append(row)
        except UserError as error:
            assert f"row {row} of store {tmp_path / 'store'}" in str(error)
    assert len(readable) == 7


def test_a_lost_shard_is_not_padding(tmp_path, small_shards):
    write_rows(tmp_path / "store", numbered_rows(20))
    shards(tmp_path / "store")[1].unlink()
    store = RowStore.open(tmp_path / "store")
    store.read([0, 19])
    with pytest.raises(UserError, match="row 9 of store"):
        store.read([0, 9])


def test_pickled_store_reads(tmp_path):
    rows = numbered_rows(9)
    store = write_rows(tmp_path / "store", rows)
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read([4, 2]), rows[[4, 2]])


def test_a_store_replaced_in_place_reads_anew(tmp_path):
    path = tmp_path / "store"
    write_rows(path, numbered_rows(9)).read(range(9))
    assert np.array_equal(write_rows(path, numbered_rows(9) * 2, overwrite=True).read([3]), numbered_rows(9)[[3]] * 2)


def broken(path, **changes):
    """A store.json that says something else, with a checksum that agrees."""
    content = json.loads((path / "store.json").read_text()) | changes
    del content["checksum"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "store.json").write_text(json.dumps(content | {"checksum": checksum}))


def test_open_refuses_what_is_not_a_complete_store(tmp_path):
    path = tmp_path / "store"
    with pytest.raises(UserError, match="no store at"):
        RowStore.open(path)
    good = tmp_path / "good"
    write_rows(good, numbered_rows(5))

    def damaged(match, damage):
        shutil.copytree(good, path)
        damage()
        with pytest.raises(UserError, match=match):
            RowStore.open(path)
        shutil.rmtree(path)

    damaged("not a complete store", lambda: (path / "store.json").unlink())
    damaged("format version 99", lambda: broken(path, format_version=99))
    damaged("cannot be understood", lambda: (path / "store.json").write_text('{"format_version": 3, "checksum": 1}'))
    damaged("is not JSON", lambda: (path / "store.json").write_text('{"rows": 5'))
    damaged("a JSON object is expected", lambda: (path / "store.json").write_text("[]"))
    damaged("is not JSON", lambda: (path / "store.json").write_text("[" * 100_000))
    damaged("not the sums", lambda: broken(path, rows=6))
    damaged("rows are int32", lambda: broken(path, sequence_length=13))
    damaged("has lost its rows/zarr.json", lambda: shutil.rmtree(path / "rows"))


def test_a_store_json_with_wrong_values_and_the_right_checksum_is_one_line(tmp_path):
    """Each value in turn, in store.json and its corpora, is of another type or beyond all bounds."""
    write_rows(tmp_path / "good", numbered_rows(5))
    original = (tmp_path / "good" / "store.json").read_text()
    content = json.loads(original)
    names = [name for name in content if name != "checksum"]
    wrong = (None, "x" * 100_000, -1, 2**63, 1.5, [], [{}], {"a": None}, True)
    loose = {"packing", "recipe", "dropped", "digest", "tokenizer_fingerprint", "fill", "eos_token_id", "shard_rows"}
    refused = 0
    for name, value in itertools.product(names, wrong):
        broken(tmp_path / "good", **{name: value})
        try:
            store = RowStore.open(tmp_path / "good")
            store.tokens_per_row  # noqa: B018 (read)
            report(store.metadata)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error), (name, value)
        else:
            assert name in loose or value == content[name] or name in ("vocab_size", "max_token_id", "pairs_per_row")
        (tmp_path / "good" / "store.json").write_text(original)
    for name, value in itertools.product(content["corpora"][0], wrong):
        broken(tmp_path / "good", corpora=[content["corpora"][0] | {name: value}])
        with contextlib.suppress(UserError):
            report(RowStore.open(tmp_path / "good").metadata)
        (tmp_path / "good" / "store.json").write_text(original)
    assert refused > 100
    broken(tmp_path / "good", newer=1)
    with pytest.raises(UserError, match="unknown key newer"):
        RowStore.open(tmp_path / "good")


@pytest.fixture(params=["local", "in place"])
def both_kinds_of_storage(request, monkeypatch):
    """The writer's two ways to commit: by renaming, and, as on gs://, by writing store.json last."""
    if request.param == "in place":
        monkeypatch.setattr(writer_module, "is_remote", lambda path: True)
        monkeypatch.setattr(writer_module, "kvstore_spec", lambda path: {"driver": "file", "path": f"{path}/"})
    return request.param


def test_failure_leaves_nothing(tmp_path, small_shards, both_kinds_of_storage):
    def fail():
        with RowStoreWriter(tmp_path / "store", "cpt", 12) as writer:
            writer.append(numbered_rows(30), "corpus")
            assert list(tmp_path.rglob("zarr.json")), "the failure must come after something was written"
            raise KeyError("on purpose")

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least one row"), RowStoreWriter(tmp_path / "store", "cpt", 12) as writer:
        writer.finish({}, **ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_store_and_can_be_repeated(tmp_path, small_shards, both_kinds_of_storage):
    writer = RowStoreWriter(tmp_path / "store", "cpt", 12)
    writer.append(numbered_rows(30), "corpus")
    writer._pending.result()
    with pytest.raises(UserError, match=r"no store at|not a complete store"):
        RowStore.open(tmp_path / "store")
    rows = numbered_rows(3)
    assert np.array_equal(write_rows(tmp_path / "store", rows).read(range(3)), rows)


def test_existing_output(tmp_path, small_shards, both_kinds_of_storage):
    path = tmp_path / "store"
    first = write_rows(path, numbered_rows(30))
    with pytest.raises(UserError, match="exists"):
        RowStoreWriter(path, "cpt", 12)
    assert np.array_equal(first.read(range(30)), numbered_rows(30))
    second = write_rows(path, numbered_rows(5, 16), overwrite=True)
    assert (len(second), second.metadata.sequence_length) == (5, 16)
    assert len(shards(path)) == 1 and [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_failed_overwrite_keeps_the_old_store(tmp_path, small_shards):
    rows = numbered_rows(30)
    write_rows(tmp_path / "store", rows)
    with (
        pytest.raises(KeyError),
        RowStoreWriter(tmp_path / "store", "cpt", 12, overwrite=True) as writer,
    ):
        writer.append(rows * 2, "corpus")
        raise KeyError("on purpose")
    assert np.array_equal(RowStore.open(tmp_path / "store").read(range(30)), rows)


def test_only_stores_are_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a store"):
        RowStoreWriter(tmp_path / "thesis", "cpt", 12, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        RowStoreWriter(tmp_path / "thesis" / "chapter1.txt", "cpt", 12, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert len(write_rows(tmp_path / "empty", numbered_rows(3))) == 3


def test_two_writers_of_one_output(tmp_path):
    with RowStoreWriter(tmp_path / "store", "cpt", 12) as late:
        late.append(numbered_rows(4) * 2, "corpus")
        write_rows(tmp_path / "store", numbered_rows(4))
        with pytest.raises(UserError, match="exists"):
            late.finish({"corpus": CorpusFacts(examples=4)}, **ABOUT)
    assert np.array_equal(RowStore.open(tmp_path / "store").read(range(4)), numbered_rows(4))
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_writer_refuses_rows_of_another_shape(tmp_path):
    writer = RowStoreWriter(tmp_path / "store", "cpt", 12)
    for rows in (numbered_rows(2, 13), numbered_rows(2).astype(np.int64), numbered_rows(2)[0]):
        with pytest.raises(ValueError, match="expected int32"):
            writer.append(rows, "corpus")


def test_check_compatible(tmp_path):
    rows = numbered_rows(3)
    rows[1, 0, 2] = 900
    store = write_rows(tmp_path / "store", rows)
    check_compatible(store, kinds=["cpt"], vocab_size=901, sequence_length=12, tokenizer_fingerprint="f" * 64)
    with pytest.raises(UserError, match=r"token id 900 is beyond the model's vocabulary of 900 in store"):
        check_compatible(store, kinds=["cpt"], vocab_size=900)
    with pytest.raises(UserError) as caught:
        check_compatible(
            store, kinds=["pairs", "sft"], vocab_size=9, sequence_length=99, tokenizer_fingerprint="0" * 64
        )
    lines = str(caught.value).split("; ")
    assert len(lines) == 4 and all(str(store.path) in line for line in lines)


def test_kvstore_specs(tmp_path):
    from etils import epath

    assert kvstore_spec(tmp_path / "a") == {"driver": "file", "path": f"{tmp_path}/a/"}
    assert kvstore_spec(epath.Path("gs://bucket/x/rows")) == {"driver": "gcs", "bucket": "bucket", "path": "x/rows/"}
    with pytest.raises(UserError, match="local folder, or one under gs://"):
        kvstore_spec("s3://bucket/rows")

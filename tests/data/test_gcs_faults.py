"""Data in a bucket that answers badly: prepared, verified, streamed and resumed as if it answered well."""

import gzip
import json
import re
import signal
import time

import numpy as np
import pytest
from etils import epath

from medllm_jax.data import store_writer as store_writer_module
from medllm_jax.data.prepare import corpus as corpus_module
from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.storage.remote import move_folder, names_in, remove_folder, write_whole
from tests.data.stores import numbered_rows, write_rows
from tests.gcs import Faults, Gcs, be_impatient
from tests.gcs_programs import Python, faults_crash_python, run
from tests.tiny import make_tokenizer, write_json_lines

FAULTS = Faults(unavailable=0.10, reset=0.04, slow=0.05, delay_seconds=0.02)
ROWS = 300


@pytest.fixture
def gcs():
    with Gcs("bucket") as server:
        yield server


def of_this_file(function, *arguments):
    """What Python is to be started with, so that it calls a function of this file."""
    name = function.__name__
    return "-c", f"import sys; from tests.data.test_gcs_faults import {name}; {name}(*sys.argv[1:])", *arguments


def assert_all_kinds_went_wrong(gcs):
    assert {entry.fault for entry in gcs.log} == {None, "unavailable", "lost", "reset", "cut", "slow"}


# --- in processes of their own ---------------------------------------------------------------------------------------


def medllm(*arguments):
    from medllm_jax.cli import main

    be_impatient()
    corpus_module._TASK_BYTES = 1000
    print("exit", main(arguments))


def verify_each(*stores):
    for store in stores:
        medllm("data", "verify", store)


def print_row_ids(store, start, stop, hosts):
    be_impatient()
    print(json.dumps(row_ids(store, int(start), int(stop), int(hosts))))


def row_ids(store, start, stop, hosts):
    """First tokens of the rows of some global batches, which are the ids that `numbered_rows` gave them."""
    from medllm_jax.data.loader import BatchStream
    from medllm_jax.data.store import RowStore

    rows = RowStore.open(store)
    streams = [BatchStream(rows, 8, 0, position=start, process_index=i, process_count=hosts) for i in range(hosts)]
    seen = [int(row) for _ in range(start, stop) for stream in streams for row in next(stream).arrays.tokens[:, 0]]
    for stream in streams:
        assert stream.position == stop
        stream.close()
    return seen


class LostWrites:
    """Every object's first write, and its removal, are carried out and answered 503: they are asked for again."""

    def __init__(self):
        self.seen = set()

    def of(self, number, request):
        key = request.method, re.sub(r"ifGenerationMatch=\d+", "", request.path)
        lost = request.method != "GET" and key not in self.seen
        self.seen.add(key)
        return "lost" if lost else None


def write_move_remove():
    from medllm_jax.data.store import verify

    be_impatient()
    store_writer_module._MAX_SHARD_ROWS = 64
    for _ in range(2):
        write_rows("gs://bucket/store", numbered_rows(ROWS), overwrite=True)
        verify("gs://bucket/store")
    bucket = epath.Path("gs://bucket")
    write_whole(bucket / "a" / "1.txt", "one")
    write_whole(bucket / "a" / "2.txt", "two")
    move_folder(bucket / "a", bucket / "b")
    assert names_in(bucket) == {"store", "b"} and names_in(bucket / "b") == {"1.txt", "2.txt"}
    for name in ("store", "b", "none"):
        remove_folder(bucket / name)
        assert names_in(bucket / name) == set()


@faults_crash_python
def test_a_write_that_is_done_twice_is_done(gcs):
    gcs.faults = LostWrites()
    run(gcs, *of_this_file(write_move_remove))
    assert gcs.names("gs://bucket/") == []


# --- preparing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path):
    """A folder of input in three formats, and a tokenizer."""
    import pyarrow as pa
    import pyarrow.parquet

    make_tokenizer(tmp_path / "tok")
    texts = [f"Patient {number} has a fever. " * (1 + number % 7) for number in range(210)]
    folder = tmp_path / "in"
    folder.mkdir()
    write_json_lines(folder / "a.jsonl", [{"text": text} for text in texts[:100]])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[100:150] + texts[:5])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pa.table({"text": texts[150:]}), folder / "c.parquet", row_group_size=20)
    return tmp_path


@faults_crash_python
def test_killed_and_resumed_preparation_gives_the_same_store(gcs, documents):
    expected = prepare_corpus(
        [Corpus("corpus", str(documents / "in"))], documents / "tok", documents / "out", Recipe(sequence_length=64)
    )
    for name in ("in", "tok"):
        gcs.upload(documents / name, f"gs://bucket/{name}")
    gcs.faults = FAULTS
    arguments = ["data", "cpt", "--input", "gs://bucket/in", "--tokenizer", "gs://bucket/tok"]
    arguments += ["--output", "gs://bucket/out", "--sequence-length", "64", "--workers", "1"]
    first = Python(gcs, *of_this_file(medllm, *arguments))
    while len(done := results(gcs, "tokens")) < 3:
        assert first.poll() is None, first.output()
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done, tasks = results(gcs, "tokens"), len(results(gcs, "survey"))
    assert first.returncode == -signal.SIGKILL and 3 <= len(done) < tasks
    output = run(gcs, *of_this_file(medllm, *arguments))
    assert re.search(r"looking at files: .*\nreading documents: (.+) of \1\n", output), "all had been read"
    first_told = re.search(r"tokenising: ([\d,]+) of ([\d,]+) documents", output)
    there, of = (int(number.replace(",", "")) for number in first_told.groups())
    assert 0 < there < of, "what was there is not made again"
    assert output.splitlines()[-1] == "exit 0"
    found = json.loads(gcs.get("gs://bucket/out/store.json"))
    assert found["digest"] == expected.digest and found["corpora"][0]["examples"] == expected.examples == 210
    assert gcs.names("gs://bucket/.out.preparing") == []
    assert_all_kinds_went_wrong(gcs)


def results(gcs, job):
    return [name for name in gcs.names(f"gs://bucket/.out.preparing/{job}/") if name.endswith(".json")]


@faults_crash_python
@pytest.mark.slow  # workers are patient
def test_workers_prepare_documents_and_one_process_pairs(gcs, documents):
    """What is read and written by processes that are forked is the same too, and so is a store of pairs."""
    pairs = [{"prompt": f"Question {n}?", "chosen": f" Yes, {n}." * (1 + n % 5), "rejected": " No."} for n in range(90)]
    file = write_json_lines(documents / "pairs.jsonl", pairs)
    expected = [
        prepare_corpus(
            [Corpus("corpus", str(documents / "in"))], documents / "tok", documents / "out", Recipe(sequence_length=64)
        ),
        prepare_pairs(file, documents / "tok", documents / "pairs", 64),
    ]
    for name in ("in", "tok", "pairs.jsonl"):
        gcs.upload(documents / name, f"gs://bucket/{name}")
    gcs.faults = FAULTS
    common = ["--tokenizer", "gs://bucket/tok", "--sequence-length", "64"]
    for kind, source, more in (("cpt", "in", ["--workers", "2"]), ("pairs", "pairs.jsonl", [])):
        arguments = ["--input", f"gs://bucket/{source}", "--output", f"gs://bucket/{kind}", *common, *more]
        assert run(gcs, *of_this_file(medllm, "data", kind, *arguments)).splitlines()[-1] == "exit 0"
    found = [json.loads(gcs.get(f"gs://bucket/{kind}/store.json"))["digest"] for kind in ("cpt", "pairs")]
    assert found == [metadata.digest for metadata in expected]
    assert_all_kinds_went_wrong(gcs)


# --- verifying -------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A local store of some shards, whose rows begin with their ids."""
    monkeypatch.setattr(store_writer_module, "_MAX_SHARD_ROWS", 64)
    write_rows(tmp_path / "store", numbered_rows(ROWS))
    return tmp_path / "store"


def test_verify_finds_damage_and_nothing_else(gcs, store):
    damages = {"whole": lambda data: data, "flipped": flip, "cut": lambda data: data[:-20], "gone": None}
    for name, damage in damages.items():
        gcs.upload(store, f"gs://bucket/{name}")
        shard = gcs.buckets["bucket"].pop(f"{name}/rows/c/1/0").data
        if damage is not None:
            gcs.put(f"gs://bucket/{name}/rows/c/1/0", damage(shard))
    gcs.faults = FAULTS
    output = run(gcs, *of_this_file(verify_each, *(f"gs://bucket/{name}" for name in damages)))
    whole, flipped, cut, gone = output.split("exit ")[:4]
    assert f"{ROWS} rows are as they were written" in whole
    assert [part[0] for part in output.split("exit ")[1:]] == ["0", "2", "2", "2"]
    assert "row 64 of store gs://bucket/flipped is damaged or missing (shard rows/c/1/0)" in flipped
    assert flipped.count("is damaged") == 1
    for name, part in (("cut", cut), ("gone", gone)):
        assert f"row 64 of store gs://bucket/{name} is damaged or missing (shard rows/c/1/0)" in part
        assert "; so are 63 more rows: 65, 66, " in part
    assert_all_kinds_went_wrong(gcs)


def flip(data):
    return data[:10] + bytes([data[10] ^ 1]) + data[11:]


# --- streaming -------------------------------------------------------------------------------------------------------


def test_rows_come_once_an_epoch_and_in_the_same_order(gcs, store):
    """One and a half epochs, the first part read by one host, the rest by four that go on from the number."""
    gcs.upload(store, "gs://bucket/store")
    gcs.faults = FAULTS
    steps, stop = ROWS * 3 // 2 // 8, 21
    parts = [(0, stop, 1), (stop, steps, 4)]
    found = [run(gcs, *of_this_file(print_row_ids, "gs://bucket/store", *part)) for part in parts]
    seen = [row for output in found for row in json.loads(output.splitlines()[-1])]
    assert sorted(seen[:ROWS]) == list(range(ROWS))
    assert seen == row_ids(store, 0, steps, 1)
    assert_all_kinds_went_wrong(gcs)


def test_a_row_is_about_one_request(gcs, tmp_path):
    rows = numbered_rows(ROWS, sequence_length=2048)
    rows[:, 0, 1:] = np.random.default_rng(0).integers(0, 1000, rows[:, 0, 1:].shape)  # rows that are worth a request
    write_rows(tmp_path / "store", rows)
    gcs.upload(tmp_path / "store", "gs://bucket/store")
    run(gcs, *of_this_file(print_row_ids, "gs://bucket/store", 0, ROWS // 8, 1))
    reads = [entry for entry in gcs.log if "rows%2Fc%2F" in entry.path]
    assert 0.5 * ROWS < len(reads) <= 1.1 * ROWS

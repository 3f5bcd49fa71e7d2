"""gs:// from end to end, on an emulator that is itself tested with the clients that everything here uses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from medllm_jax.config.load import to_yaml
from medllm_jax.storage.run_folder import carry_tokenizer, copy_tokenizer, find_tokenizer
from medllm_jax.training.loop import train
from tests.gcs import Faults, Gcs
from tests.gcs_programs import Python, faults_crash_python, run
from tests.tiny import write_json_lines
from tests.training.test_train import config_of
from tests.world import SEQUENCE_LENGTH

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gcs():
    with Gcs("bucket") as server:
        yield server


def medllm(gcs, *arguments):
    return run(gcs, "-m", "medllm_jax.cli", *arguments)


# --- the emulator ----------------------------------------------------------------------------------------------------

GOOGLE_CLIENT = """
import os
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage

client = storage.Client()
bucket = client.get_bucket("bucket")

def refused(error, call, *arguments, **more):
    try:
        call(*arguments, **more)
    except error:
        return True
    return False

# Whole, in part, in chunks; names that need quoting; content that ends like a line.
name = "a b/c+d%2Fe?é#"
bucket.blob(name).upload_from_string(b"0123456789\\r", if_generation_match=0)
assert bucket.blob(name).download_as_bytes() == b"0123456789\\r"
assert bucket.blob(name).download_as_bytes(start=2, end=4) == b"234"
large = os.urandom(700_000)
blob = bucket.blob("large", chunk_size=1 << 18)
blob.upload_from_string(large)
assert blob.download_as_bytes() == large and blob.size == len(large)
assert refused(NotFound, client.get_bucket, "none")

# Preconditions.
blob = bucket.get_blob(name)
before = blob.generation
assert refused(PreconditionFailed, blob.upload_from_string, b"x", if_generation_match=0)
assert refused(PreconditionFailed, blob.upload_from_string, b"x", if_generation_not_match=before)
assert refused(PreconditionFailed, blob.download_as_bytes, if_generation_match=before + 1)
blob.upload_from_string(b"new", if_generation_match=before)
assert refused(NotFound, bucket.blob(name, generation=before).download_as_bytes)
assert refused(PreconditionFailed, blob.delete, if_generation_match=before)
blob.metadata = {"key": "value"}
blob.patch(if_metageneration_match=1)
assert bucket.get_blob(name).metageneration == 2 and bucket.get_blob(name).metadata == {"key": "value"}
assert refused(PreconditionFailed, blob.patch, if_metageneration_match=1)

# Lists, in pages.
for number in range(7):
    bucket.blob(f"list/{number}/x").upload_from_string(b"")
pages = list(bucket.list_blobs(prefix="list/", max_results=None, page_size=3).pages)
assert [len(list(page)) for page in pages] == [3, 3, 1]
folders = bucket.list_blobs(prefix="list/", delimiter="/", page_size=2)
assert list(folders) == [] and len(folders.prefixes) == 7
assert [b.name for b in bucket.list_blobs(prefix="list/", start_offset="list/2", end_offset="list/4")] == [
    "list/2/x", "list/3/x"
]

# Compose, copy, rename, delete, many at once.
for part in "abc":
    bucket.blob(part).upload_from_string(part.encode())
bucket.blob("abc").compose([bucket.blob(part) for part in "abc"], if_generation_match=0)
assert bucket.get_blob("abc").md5_hash is None and bucket.blob("abc").download_as_bytes() == b"abc"
bucket.copy_blob(bucket.blob("abc"), bucket, "copy")
assert bucket.blob("rewritten").rewrite(bucket.blob("copy"))[0] is None
bucket.rename_blob(bucket.blob("copy"), "renamed")
assert bucket.get_blob("copy") is None and bucket.blob("renamed").download_as_bytes() == b"abc"
with client.batch():
    for part in "abc":
        bucket.blob(part).delete()
assert not any(bucket.blob(part).exists() for part in "abc")
assert refused(NotFound, bucket.blob("a").delete)
"""

TENSORSTORE = """
import concurrent.futures
import tensorstore as ts

kv = ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "root/"}).result()
first = kv.write("k/1", b"0123456789").result()
assert first.generation
absent = kv.read("none").result()
assert absent.state == "missing"
assert not kv.write("k/1", b"x", if_equal=absent.stamp.generation).result().generation, "it is there"
assert kv.read("k/1").result().value == b"0123456789"
assert kv.read("k/1", byte_range=slice(3, 5)).result().value == b"34"
assert kv.read("k/1", byte_range=slice(-4, None)).result().value == b"6789"
assert kv.read("k/1", if_not_equal=first.generation).result().state == "unspecified"
second = kv.write("k/1", b"new", if_equal=first.generation).result()
assert second.generation not in (first.generation, b"")
assert not kv.write("k/1", b"x", if_equal=first.generation).result().generation, "it is another one now"
kv.write("k/2/x", b"").result()
assert sorted(kv.list().result()) == [b"k/1", b"k/2/x"]
assert not kv.delete_range(ts.KvStore.KeyRange("k/2", "k/3")).result() and kv.list().result() == [b"k/1"]
kv.write("k/1", None).result()
assert kv.list().result() == []

# Many writers of one OCDBT manifest lose nothing only if preconditions hold.
def write(number):
    one = ts.KvStore.open({"driver": "ocdbt", "base": "gs://bucket/ocdbt/"}, context=ts.Context()).result()
    one.write(f"key{number}", b"value").result()

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(write, range(24)))
assert len(ts.KvStore.open({"driver": "ocdbt", "base": "gs://bucket/ocdbt/"}).result().list().result()) == 24
"""

FOLDERS = """
from medllm_jax import __version__
from etils import epath

root = epath.Path("gs://bucket/folder")
assert not root.exists()
(root / "a" / "b").mkdir(parents=True, exist_ok=True)
for name, text in (("a/1.txt", "one\\n"), ("a/b/2.txt", "two"), ("a/b/empty", "")):
    (root / name).write_text(text)
assert sorted(path.name for path in (root / "a").iterdir()) == ["1.txt", "b"]
assert (root / "a").is_dir() and (root / "a" / "b" / "2.txt").read_text() == "two"
assert [str(path) for path in (root / "a").glob("*.txt")] == ["gs://bucket/folder/a/1.txt"]
(root / "a").rename(root / "c")
assert not (root / "a").exists() and (root / "c" / "b" / "2.txt").exists()
(root / "c" / "1.txt").copy(root / "3.txt")
(root / "3.txt").replace(root / "c" / "1.txt")
(root / "c").rmtree()
assert not root.exists()
large = bytes(range(256)) * 4096 * 12
(root / "large").write_bytes(large)
assert (root / "large").read_bytes() == large and (root / "large").stat().length == len(large)

# What another process does is seen, though the folder was listed before.
from google.cloud import storage
bucket = storage.Client().bucket("bucket")
assert [path.name for path in root.iterdir()] == ["large"] and not (root / "other").exists()
bucket.blob("folder/other").upload_from_string(b"")
assert (root / "other").exists() and len(list(root.iterdir())) == 2
bucket.blob("folder/other").delete()
assert not (root / "other").exists()
"""


@pytest.mark.parametrize("code", [GOOGLE_CLIENT, TENSORSTORE, FOLDERS], ids=["google", "tensorstore", "folders"])
def test_clients_get_what_they_ask_for(gcs, code):
    run(gcs, "-c", code)
    assert gcs.log and not [entry for entry in gcs.log if entry.status in (400, 500)]


def test_a_precondition_that_is_not_known_is_refused(gcs):
    code = (
        "import os, urllib.request, urllib.error\n"
        "url = os.environ['STORAGE_EMULATOR_HOST'] + '/upload/storage/v1/b/bucket/o?uploadType=media&name=x&ifNew=1'\n"
        "try: urllib.request.urlopen(url, data=b'x')\n"
        "except urllib.error.HTTPError as error: assert error.code == 400\n"
        "else: raise AssertionError\n"
    )
    run(gcs, "-c", code)
    assert gcs.names("gs://bucket/") == []


# --- what is different in a bucket -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"use_listings_cache": False}),
        ('{"token": "anon"}', {"use_listings_cache": False, "token": "anon"}),
        ('{"use_listings_cache": true}', {"use_listings_cache": True}),
    ],
)
@pytest.mark.parametrize("first", ["medllm_jax", "fsspec.config"])
def test_the_listing_cache_is_off_unless_asked_for(before, after, first):
    env = {name: value for name, value in os.environ.items() if name != "FSSPEC_GCS"} | {"PYTHONPATH": str(ROOT)}
    env |= {"FSSPEC_GCS": before} if before else {}
    code = f"import {first}, sys\nimport medllm_jax\nassert 'gcsfs' not in sys.modules\n"
    code += "import json, fsspec.config\nprint(json.dumps(fsspec.config.conf['gcs']))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], env=env)) == after


def test_a_tokenizer_that_came_in_part_is_carried_again(world, tmp_path):
    """A bucket moves a folder file by file, so a run can die in between."""
    run = epath.Path(tmp_path)
    copy_tokenizer(epath.Path(world.tokenizer), run)
    assert find_tokenizer(run) == run / "tokenizer"
    (run / ".tokenizer.tmp").mkdir()
    (run / "tokenizer" / "tokenizer.json").rename(run / ".tokenizer.tmp" / "tokenizer.json")
    assert find_tokenizer(run, world.model) == epath.Path(world.model) / "tokenizer"
    carry_tokenizer(str(world.model), run)
    assert find_tokenizer(run) == run / "tokenizer" and (run / "tokenizer" / "tokenizer.json").exists()


# --- the verbs -------------------------------------------------------------------------------------------------------


def test_the_recipe_in_a_bucket(world, gcs, tmp_path, metrics_of):
    """Data, training that is killed and goes on, and the exam: nothing but the config file is local."""
    for folder in (world.corpus, world.tokenizer, world.model):
        gcs.upload(folder, f"gs://bucket/in/{folder.name}")
    arguments = ["data", "cpt", "--input", "gs://bucket/in/corpus.jsonl", "--tokenizer", "gs://bucket/in/tok"]
    arguments += ["--output", "gs://bucket/cpt", "--sequence-length", SEQUENCE_LENGTH]
    assert "60 documents in" in medllm(gcs, *arguments)
    local_store = json.loads((world.token_store / "store.json").read_text())
    assert json.loads(gcs.get("gs://bucket/cpt/store.json"))["digest"] == local_store["digest"]

    train_interrupted(world, gcs, tmp_path, "-m", "medllm_jax.cli")
    assert metrics_of(tmp_path / "fetched") == metrics_of(tmp_path / "local")
    assert whole_checkpoints(gcs) == [4, 6]
    assert {"tokenizer/tokenizer.json", "config.yaml"} <= set(gcs.names("gs://bucket/run/"))
    assert any("tfevents" in name for name in gcs.names("gs://bucket/run/tensorboard/"))

    rows = [{"id": f"q{n}", "question": f"{n}?", "choices": ["one", "two"], "answer": "ab"[n % 2]} for n in range(3)]
    gcs.upload(write_json_lines(tmp_path / "exam.jsonl", rows), "gs://bucket/in/exam.jsonl")
    arguments = ["evaluate", "--run", "gs://bucket/run", "--exam", "gs://bucket/in/exam.jsonl", "--template", "plain"]
    medllm(gcs, *arguments, "--output", "gs://bucket/exam", "--conditions", "answer_only")
    assert json.loads(gcs.get("gs://bucket/exam/scores.json"))["conditions"]["answer_only"]["n"] == 3


@faults_crash_python
@pytest.mark.slow
def test_training_in_a_bucket_that_answers_badly(world, gcs, tmp_path, metrics_of):
    for folder, name in ((world.token_store, "cpt"), (world.model, "in/model")):
        gcs.upload(folder, f"gs://bucket/{name}")
    # No lost writes: Orbax can't survive them. TensorStore writes OCDBT's manifest again, finds it there, and the save
    # ends with ALREADY_EXISTS (started again, the run goes on from the checkpoint before).
    gcs.faults = Faults(unavailable=0.10, reset=0.02, slow=0.05, lost_writes=False)
    code = "import sys; from medllm_jax.cli import main; from tests.gcs import be_impatient; be_impatient(); "
    train_interrupted(world, gcs, tmp_path, "-c", f"{code} sys.exit(main())")
    assert metrics_of(tmp_path / "fetched") == metrics_of(tmp_path / "local")
    assert whole_checkpoints(gcs) == [4, 6]
    assert {"unavailable", "lost", "reset", "cut", "slow"} <= {entry.fault for entry in gcs.log}


def train_interrupted(world, gcs, tmp_path, *program):
    """Trains locally, and on gs:// where it is killed after a checkpoint and goes on; fetches the metrics of that."""
    train(config_of(world, tmp_path / "local"))
    config = config_of(world, "gs://bucket/run", store="gs://bucket/cpt")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config).replace(str(world.model), "gs://bucket/in/model"))
    process = Python(gcs, *program, "train", "--config", file)
    deadline = time.monotonic() + 300
    while not whole_checkpoints(gcs):
        assert process.poll() is None and time.monotonic() < deadline, process.output()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and 6 not in whole_checkpoints(gcs)
    run(gcs, *program, "train", "--config", file)
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "metrics.jsonl").write_bytes(gcs.get("gs://bucket/run/metrics.jsonl"))


def whole_checkpoints(gcs):
    names = (name.split("/") for name in gcs.names("gs://bucket/run/checkpoints/"))
    return sorted(int(step) for step, *rest in names if rest == ["commit_success.txt"])

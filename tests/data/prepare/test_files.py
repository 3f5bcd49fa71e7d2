import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medllm_jax.data.prepare.files import DOCUMENT_FILES, find_files
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from tests.data.prepare.documents import PACK, TEXTS, documents_of, lines_of
from tests.gcs import Gcs, environment

ROOT = Path(__file__).parents[3]


def test_inputs_are_files_folders_and_globs_each_file_once(tmp_path):
    for name in ("b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "a/notes.md", "a/.hidden.jsonl", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()

    def names(*inputs):
        files = find_files([tmp_path / i for i in inputs], DOCUMENT_FILES, RejectionCounts())
        return [str(file.relative_to(tmp_path)) for file in files]

    assert names("") == ["[x].jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("b", "a") == ["b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz"]
    assert names("?/*") == ["a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("a/*/*.gz", "a") == ["a/deep/3.jsonl.gz", "a/2.txt"]
    assert names("[x].jsonl", "[ab]/*.jsonl") == ["[x].jsonl", "b/1.jsonl"]
    assert [file.name for file in find_files(str(tmp_path / "b"), DOCUMENT_FILES, RejectionCounts())] == ["1.jsonl"]
    for wrong, message in (
        ("c", "does not exist"),
        ("a/notes.md", "not a file of a kind"),
        ("*.md", "no file"),
        ("empty", "no file"),
        ("**/*", "searched"),
    ):
        with pytest.raises(UserError, match=message):
            names(wrong)


def test_what_is_not_read_is_counted_and_a_file_is_read_once(tmp_path):
    for name in ("a.JSONL", "b.ndjson", "c.jsonl.xz", "d.json", "e.md", "plain", ".hidden.jsonl", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.JSONL")
    (tmp_path / "z.jsonl").hardlink_to(tmp_path / "b.ndjson")
    os.mkfifo(tmp_path / "pipe.jsonl")
    passed_over = RejectionCounts()
    files = find_files([tmp_path, f"{tmp_path}/../{tmp_path.name}/b.ndjson"], DOCUMENT_FILES, passed_over)
    assert [file.name for file in files] == ["a.JSONL", "b.ndjson", "c.jsonl.xz"]
    assert passed_over.counts == {
        "hidden": 2,
        "of a kind that is not read (.json)": 1,
        "of a kind that is not read (.md)": 1,
        "of a kind that is not read (no suffix)": 1,
        "another path to a file that is read": 3,
        "a folder that was searched before": 1,
        "neither a file nor a folder": 1,
    }


def test_an_input_without_a_file_is_told_what_would_be_one(tmp_path):
    for name in ("rows.json", "a/notes.md", "a/.x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    messages = {
        "rows.json": r"one object a line; `jq -c '\.\[\]' rows\.json > rows\.jsonl` makes such a file",
        "no*.jsonl": r"no file matches .*/no\*\.jsonl: give files, folders or patterns",
        "a": r"\(\.jsonl, \.ndjson, \.txt, \.parquet; all but \.parquet also with \.gz.* at .*/a; there are 1 hidden, "
        r"1 of a kind that is not read \(\.md\)",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            find_files(tmp_path / name, DOCUMENT_FILES, RejectionCounts())


@pytest.mark.parametrize("target", ["nowhere.jsonl", "link.jsonl"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, target):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / target)
    for given in (tmp_path, tmp_path / "link.jsonl", f"{tmp_path}/*"):
        with pytest.raises(UserError, match=r"link\.jsonl is a link that leads nowhere"):
            find_files(given, DOCUMENT_FILES, RejectionCounts())


IN_STORAGE = """
import json, os, sys
from medllm_jax.data.prepare.files import DOCUMENT_FILES, find_files
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from tests.data.prepare.documents import documents_of

found = {}
for path in sys.argv[1:]:
    try:
        files = find_files(path, DOCUMENT_FILES, RejectionCounts())
    except UserError as error:
        found[path] = str(error)
        continue
    if "FIND_ONLY" in os.environ:
        continue
    found[path] = [document for file in files for document in documents_of(file, 100)[0]]
print(json.dumps(found))
"""


def in_storage(server, *arguments, **more):
    command = [sys.executable, "-c", IN_STORAGE, *arguments]
    env = os.environ | environment(server.url) | {"PYTHONPATH": str(ROOT)} | more
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, timeout=60).stdout)


def test_object_storage_is_read_as_folders_are_with_few_requests(tmp_path):
    for number in range(30):
        folder = tmp_path / "in" / "ab"[number % 2] / "deep.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jsonl").write_bytes(lines_of(TEXTS))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in" / "rows.parquet")
    (tmp_path / "in" / "z.txt.zst").write_bytes(PACK[".zst"](b"text"))
    for name in ("notes.md", ".hidden.jsonl", "a/.hidden/x.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("no rows")
    inputs = ["in", "in/", "in/a", "in/rows.parquet", "in/*", "in/?/deep.jsonl/1*.jsonl"]
    wrong = {"in/c": "does not exist", "in/notes.md": "not a file of a kind", "in/*.md": "no file", "in/**": "searched"}
    with Gcs("bucket") as server:
        server.upload(tmp_path, "gs://bucket")
        found = in_storage(server, *(f"gs://bucket/{path}" for path in [*inputs, *wrong]))
        for path in inputs:
            files = find_files(f"{tmp_path}/{path}", DOCUMENT_FILES, RejectionCounts())
            local = [[d.text, d.where.replace(str(tmp_path), "gs://bucket")] for f in files for d in documents_of(f)[0]]
            assert found[f"gs://bucket/{path}"] == local and local
        for path, message in wrong.items():
            assert message in found[f"gs://bucket/{path}"]

        server.put("gs://bucket/folder/", b"")  # as consoles mark folders
        server.put("gs://bucket/folder/a.jsonl", b"")
        server.put("gs://bucket/twice//x.jsonl", b"")
        server.put("gs://bucket/z/x.jsonl", gzip.compress(lines_of(TEXTS)), content_encoding="gzip")
        strange = {"twice": "can't be read under this name", "z": "Content-Encoding: gzip, so that its"}
        found = in_storage(server, *(f"gs://bucket/{path}" for path in strange), "gs://")
        for path, message in strange.items():
            assert message in found[f"gs://bucket/{path}"]
        assert "names no bucket" in found["gs://"]

        server.log.clear()
        paths = ("in", "in/?/deep.jsonl/*.jsonl", "in/*/deep.jsonl")
        in_storage(server, *(f"gs://bucket/{path}" for path in paths), FIND_ONLY="1")
        assert 0 < len(server.log) <= 15, server.log

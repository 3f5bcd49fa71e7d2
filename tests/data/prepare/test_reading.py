import gzip
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_jax.data.prepare import reading
from medllm_jax.data.prepare.reading import (
    DOCUMENT_FILES,
    Dropped,
    ReadOptions,
    Slice,
    find_files,
    read_documents,
    read_files,
    take_inventory,
)
from medllm_jax.errors import UserError
from tests.gcs import Gcs, environment

ROOT = Path(__file__).parents[3]
TEXTS = ["The patient has a fever.", "患者は発熱を訴えている。\n\n正解は三番。", "a", "long " * 120]


def documents_of(file, slice_bytes=10**9, **options):
    """The documents of all slices, and what was left out."""
    dropped = Dropped()
    slices = take_inventory(file, slice_bytes).slices
    return [d for part in slices for d in read_documents(part, ReadOptions(**options), dropped)], dropped


def texts_of(file, slice_bytes=10**9, **options):
    return [document.text for document in documents_of(file, slice_bytes, **options)[0]]


def lines_of(texts):
    return "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts).encode()


PACK = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


def test_formats_give_the_same_documents(tmp_path):
    lines = lines_of(TEXTS)
    files = {
        "plain.jsonl": lines,
        "windows.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "blank.jsonl": b"\n" + lines.replace(b"\n", b"\n\n  \n").rstrip(),
    }
    for suffix, pack in PACK.items():
        files[f"packed.jsonl{suffix}"] = pack(lines)
        files[f"joined.jsonl{suffix}"] = pack(lines[:50]) + pack(b"") + pack(lines[50:])
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name) == TEXTS, name
    for column in (pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode()):
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": column}), tmp_path / "rows.parquet", row_group_size=3)
        assert texts_of(tmp_path / "rows.parquet") == texts_of(tmp_path / "rows.parquet", slice_bytes=1) == TEXTS
    for text, (suffix, pack) in itertools.product(TEXTS, [("", bytes), *PACK.items()]):
        file = tmp_path / f"one.txt{suffix}"
        file.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
        assert documents_of(file)[0] == [(text, str(file))]


# --- slices ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["a", "b" * 9, "", " ", "c" * 40]), max_size=30), st.booleans(), st.data())
def test_slices_are_the_file_cut_at_line_ends(tmp_path, monkeypatch, parts, ended, data):
    slice_bytes, block = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 70))
    monkeypatch.setattr(reading, "_BLOCK", block)
    content = "\n".join(json.dumps({"text": part}) if part.strip() else part for part in parts).encode()
    content += b"\n" * ended
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    found = take_inventory(file, slice_bytes)
    assert found[:3] == (str(file), len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(content[part.start : part.end] for part in found.slices) == content
    for part in found.slices:
        body = content[part.start : part.end]
        assert part.bytes == len(body) > 0 and part.file == str(file)
        assert part.first_line == content[: part.start].count(b"\n") + 1
        assert part.end == len(content) or body.endswith(b"\n")
        assert b"\n" not in body[slice_bytes - 1 : -1], "it ends with the first line that is long enough"
        assert part.end == len(content) or len(body) >= slice_bytes
    whole = [(part, f"{file}:{number}") for number, part in enumerate(parts, 1) if part.strip()]
    assert documents_of(file, slice_bytes)[0] == documents_of(file)[0] == whole
    some, dropped = documents_of(file, slice_bytes, max_bytes=30, on_bad="skip")
    assert some == [document for document in whole if len(document[0]) < 10]
    assert dropped.total == len(whole) - len(some)


def test_slices_of_parquet_are_row_groups(tmp_path):
    file = tmp_path / "rows.parquet"
    texts = [random.Random(n).randbytes(300).hex() for n in range(100)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=10, compression="none", use_dictionary=False)
    found = take_inventory(file, 15_000)
    assert [part[1:4] for part in found.slices] == [(n, n + 3, 10 * n + 1) for n in (0, 3, 6)] + [(9, 10, 91)]
    assert 0.8 * found.bytes < sum(part.bytes for part in found.slices) < found.bytes == file.stat().st_size
    expected = [(text, f"{file}:{number}") for number, text in enumerate(texts, 1)]
    assert documents_of(file, 15_000)[0] == documents_of(file)[0] == expected
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert texts_of(file) == []
    for content in (b"PAR1", b"x" * 100, b"PAR1" + b"x" * 100 + b"PAR1"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"rows.parquet cannot be opened"):
            take_inventory(file, 100)


def test_other_files_are_one_slice_and_empty_files_none(tmp_path):
    for suffix in DOCUMENT_FILES:
        file = tmp_path / f"file{suffix}"
        file.write_bytes(b"")
        assert take_inventory(file, 1) == (str(file), 0, hashlib.sha256().hexdigest(), ())
        if suffix not in (".jsonl", ".parquet"):
            file.write_bytes(b"1\n2\n3\n")
            assert take_inventory(file, 2).slices == (Slice(str(file), 0, 6, 1, 6),)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "secret': "not valid JSON",
    b'["secret"]': "not a JSON object",
    b'{"txet": "secret"}': "no field `text`",
    b'{"text": ["secret"]}': "text is not a string",
    b'{"text": " \\n"}': "text is empty",
    b'{"text": "secret \xff"}': "not UTF-8",
    b'{"text": "secret \\ud800"}': "text is not valid Unicode (a lone surrogate)",
    b"[" * 90_000: "not valid JSON",
    b'{"text": ' + b"1" * 5000 + b"}": "not valid JSON",
    b'{"text": "' + b"secret " * 15_000 + b'"}': "longer than 100000 bytes",
    b"x" * 300_000: "longer than 100000 bytes",
}


def assert_rejected(file, reason, where, good):
    """The one bad row of a file is an error with its place, or counted."""
    with pytest.raises(UserError) as caught:
        texts_of(file, max_bytes=100_000)
    assert str(caught.value).startswith(f"{where}: {reason}; ")
    assert "secret" not in str(caught.value)
    found, dropped = documents_of(file, max_bytes=100_000, on_bad="skip")
    assert [document.text for document in found] == good
    assert dropped.as_dict() == {reason: {"count": 1, "first": [where]}}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode(errors="replace"))
def test_a_bad_line_is_an_error_with_its_place_or_is_counted(tmp_path, line, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK", 4096)
    good = b'{"text": "good"}\n'
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    (tmp_path / "last.jsonl").write_bytes(good + b"\n" + good + line)
    (tmp_path / "rows.jsonl.zst").write_bytes(PACK[".zst"](good + b"\n" + line + b"\n" + good))
    assert_rejected(tmp_path / "rows.jsonl", BAD_LINES[line], f"{tmp_path}/rows.jsonl:3", ["good", "good"])
    assert_rejected(tmp_path / "last.jsonl", BAD_LINES[line], f"{tmp_path}/last.jsonl:4", ["good", "good"])
    assert_rejected(tmp_path / "rows.jsonl.zst", BAD_LINES[line], f"{tmp_path}/rows.jsonl.zst:3", ["good", "good"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b" \n", "text is empty"),
        (b"secret " * 15_000, "longer than 100000 bytes"),
    ],
)
def test_a_bad_text_file(tmp_path, content, reason):
    for suffix, pack in [("", bytes), *PACK.items()]:
        file = tmp_path / f"one.txt{suffix}"
        file.write_bytes(pack(content))
        assert_rejected(file, reason, str(file), [])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "text is not a string"),
        (b"", "text is empty"),
        (b"secret \xff", "not UTF-8"),
        ("秘".encode() * 33_334, "longer than 100000 bytes"),
    ],
    ids=["null", "empty", "bytes", "long"],
)
def test_a_bad_parquet_row(tmp_path, cell, reason):
    file = tmp_path / "rows.parquet"
    column = pa.array([b"good", cell, b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), file, row_group_size=2)
    assert_rejected(file, reason, f"{file}:2", ["good", "good"])


def test_a_parquet_file_without_the_column_is_an_error_always(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["text"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet has no column `text`; it has id, body"):
        documents_of(tmp_path / "rows.parquet", on_bad="skip")
    assert texts_of(tmp_path / "rows.parquet", text_field="body") == ["text"]


def test_length_is_counted_in_bytes_with_the_line_end(tmp_path):
    file = tmp_path / "rows.jsonl"
    for end in (b"\n", b"\r\n", b""):
        line = '{"text": "あ"}'.encode() + end
        file.write_bytes(line)
        assert texts_of(file, max_bytes=len(line)) == ["あ"]
        with pytest.raises(UserError, match=f":1: longer than {len(line) - 1} bytes"):
            texts_of(file, max_bytes=len(line) - 1)


@pytest.mark.parametrize("suffix", PACK)
def test_a_stream_cut_short_anywhere_is_told(tmp_path, suffix):
    texts = [f"{n} {random.Random(n).random()}" for n in range(8)]
    first, second = (PACK[suffix](lines_of(part)) for part in (texts[:4], texts[4:]))
    file = tmp_path / f"rows.jsonl{suffix}"
    reason = f"the {'gzip' if suffix == '.gz' else 'zstd'} stream is damaged or cut short"
    for length in range(1, len(first + second)):
        file.write_bytes((first + second)[:length])
        if length == len(first):
            continue  # a whole file
        found, dropped = documents_of(file, on_bad="skip")
        found = [document.text for document in found]
        assert found == texts[: len(found)] and (len(found) >= 4 or length < len(first) or suffix == ".zst")
        assert dropped.as_dict() == {reason: {"count": 1, "first": [f"{file}:{len(found)}"]}}
        if length % 20 == 1:
            with pytest.raises(UserError, match=f"rows.jsonl{suffix}: {reason} after line {len(found)}; "):
                texts_of(file)
    (tmp_path / f"one.txt{suffix}").write_bytes(first[:-1])
    assert_rejected_file(tmp_path / f"one.txt{suffix}", reason)


def assert_rejected_file(file, reason):
    with pytest.raises(UserError, match=f"{file.name}: {reason}"):
        texts_of(file)
    found, dropped = documents_of(file, on_bad="skip")
    assert not found and dropped.counts == {reason: 1}


@pytest.mark.parametrize("suffix", PACK)
def test_damage_far_into_a_stream_keeps_what_stands_before(tmp_path, suffix):
    texts = [random.Random(n).randbytes(40).hex() for n in range(20_000)]
    packed = PACK[suffix](lines_of(texts))
    file = tmp_path / f"rows.jsonl{suffix}"
    for damaged in (packed[: len(packed) // 2], packed[: len(packed) // 2] + b"\0" * 999, lines_of(texts)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="stream is damaged or cut short after line"):
            texts_of(file)
        found, dropped = documents_of(file, on_bad="skip")
        assert dropped.total == 1 and (8_500 < len(found) < 10_500 or damaged == lines_of(texts))
        # Damage is noticed some bytes later than it stands.
        assert [document.text for document in found[:8_500]] == texts[: min(len(found), 8_500)]


def test_a_damaged_parquet_file(tmp_path):
    file = tmp_path / "rows.parquet"
    texts = [random.Random(n).randbytes(40).hex() for n in range(100)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=50, write_page_checksum=True, compression="none")
    content = bytearray(file.read_bytes())
    content[content.index(texts[70].encode())] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the parquet file is damaged or cut short after line 50"):
        texts_of(file)
    found, dropped = documents_of(file, on_bad="skip")
    assert [document.text for document in found] == texts[:50]
    assert dropped.first == {"the parquet file is damaged or cut short": [f"{file}:50"]}


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        file.write_bytes(PACK[".zst"](lines_of(TEXTS)))
    parts = take_inventory(file, 10**9).slices
    calls = failures = 0

    class Failing(io.FileIO):
        def called(self, read, *arguments):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise OSError("the network is gone")
            return read(*arguments)

        def read(self, size=-1):
            return self.called(super().read, size)

        def readinto(self, buffer):
            return self.called(super().readinto, buffer)

    monkeypatch.setattr(type(epath.Path(file)), "open", lambda self, mode: Failing(str(self)))
    for some in range(6):
        calls = some
        try:
            assert len(list(read_documents(parts[0], ReadOptions(on_bad="skip"), Dropped()))) == len(TEXTS)
        except OSError as error:
            assert "network" in str(error)
            failures += 1
    assert 0 < failures < 6


def test_dropped_adds_up_and_travels():
    one, two = Dropped(), Dropped()
    for number in range(8):
        one.add("bad", f"one:{number}")
        two.add("bad", f"two:{number}")
    two.add("worse", "two:9")
    one.merge(Dropped.from_dict(json.loads(json.dumps(two.as_dict()))))
    assert one.counts == {"bad": 16, "worse": 1} and one.total == 17
    assert one.first["bad"] == [f"one:{number}" for number in range(8)] + ["two:0", "two:1"]
    assert len(two.first["bad"]) == 8 and two.total == 9
    for number in range(25):
        two.add("bad", f"two:{number + 8}")
    assert two.first["bad"] == [f"two:{number}" for number in range(10)] and two.counts["bad"] == 33


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_memory_holds_a_line(tmp_path, suffix):
    """A line that is too long is passed over, and many lines are as one."""
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(PACK.get(suffix.removeprefix(".jsonl"), bytes)(b"y" * 30_000_000 + b"\n" + row * 10_000))
    tracemalloc.start()
    dropped = Dropped()
    count = sum(
        1
        for part in take_inventory(file, 10**9).slices
        for _ in read_documents(part, ReadOptions(max_bytes=10_000, on_bad="skip"), dropped)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and dropped.total == 1 and peak < 5e6


# --- finding ---------------------------------------------------------------------------------------------------------


def test_inputs_are_files_folders_and_globs_each_file_once(tmp_path):
    for name in ("b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "a/notes.md", "a/.hidden.jsonl", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()

    def names(*inputs):
        files = find_files([tmp_path / i for i in inputs], DOCUMENT_FILES)
        return [str(file.relative_to(tmp_path)) for file in files]

    assert names("") == ["[x].jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("b", "a") == ["b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz"]
    assert names("?/*") == ["a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("a/*/*.gz", "a") == ["a/deep/3.jsonl.gz", "a/2.txt"]
    assert names("[x].jsonl", "[ab]/*.jsonl") == ["[x].jsonl", "b/1.jsonl"]
    assert [file.name for file in find_files(str(tmp_path / "b"), DOCUMENT_FILES)] == ["1.jsonl"]
    for wrong, message in (
        ("c", "does not exist"),
        ("a/notes.md", "not a file of a kind"),
        ("*.md", "no file"),
        ("empty", "no file"),
        ("**/*", "searched"),
    ):
        with pytest.raises(UserError, match=message):
            names(wrong)


def test_rows_of_all_files_in_order(tmp_path):
    pq.write_table(pa.table({"prompt": ["p1", "p2"], "more": [[{"role": "a"}], []]}), tmp_path / "2.parquet")
    (tmp_path / "1.jsonl").write_bytes(b'{"prompt": 1, "other": 2}\nno\n')
    (tmp_path / "3.txt").write_text("not rows")
    dropped = Dropped()
    rows = list(read_files(tmp_path, ReadOptions(on_bad="skip"), dropped, ["prompt", "more"]))
    assert rows == [
        ({"prompt": 1, "other": 2}, f"{tmp_path}/1.jsonl:1"),
        ({"prompt": "p1", "more": [{"role": "a"}]}, f"{tmp_path}/2.parquet:1"),
        ({"prompt": "p2", "more": []}, f"{tmp_path}/2.parquet:2"),
    ]
    assert dropped.counts == {"not valid JSON": 1}


IN_STORAGE = """
import json, os, sys
from medllm_jax import __version__
from medllm_jax.data.prepare.reading import *
from medllm_jax.errors import UserError

found = {}
for path in sys.argv[1:]:
    try:
        files = find_files(path, DOCUMENT_FILES)
    except UserError as error:
        found[path] = str(error)
        continue
    if "FIND_ONLY" in os.environ:
        continue
    slices = [part for file in files for part in take_inventory(file, 100).slices]
    found[path] = [document for part in slices for document in read_documents(part, ReadOptions(), Dropped())]
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
            files = find_files(f"{tmp_path}/{path}", DOCUMENT_FILES)
            local = [[d.text, d.where.replace(str(tmp_path), "gs://bucket")] for f in files for d in documents_of(f)[0]]
            assert found[f"gs://bucket/{path}"] == local and local
        for path, message in wrong.items():
            assert message in found[f"gs://bucket/{path}"]

        server.log.clear()
        paths = ("in", "in/?/deep.jsonl/*.jsonl", "in/*/deep.jsonl")
        in_storage(server, *(f"gs://bucket/{path}" for path in paths), FIND_ONLY="1")
        assert 0 < len(server.log) <= 15, server.log

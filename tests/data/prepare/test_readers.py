import io
import itertools
import json
import random
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from medllm_jax.data.prepare.inventory import take_inventory, whole_file
from medllm_jax.data.prepare.readers import ReadOptions, read_all_records, read_documents
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.storage import json_lines
from tests.data.prepare.documents import PACK, TEXTS, documents_of, lines_of, texts_of


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
        assert texts_of(tmp_path / "rows.parquet") == texts_of(tmp_path / "rows.parquet", range_bytes=1) == TEXTS
    for text, (suffix, pack) in itertools.product(TEXTS, [("", bytes), *PACK.items()]):
        file = tmp_path / f"one.txt{suffix}"
        file.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
        assert documents_of(file)[0] == [(text, str(file))]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "secret': "not valid JSON",
    b'["secret"]': "not a JSON object",
    b'{"txet": "secret"}': "no field `text`",
    b'{"text": ["secret"]}': "text is not a string",
    b'{"text": " \\n"}': "text is empty",
    b'{"text": "secret \xff"}': "not UTF-8",
    b'{"text": "secret \\ud800"}': "not valid JSON",
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
    found, rejections = documents_of(file, max_bytes=100_000, on_bad="skip")
    assert [document.text for document in found] == good
    assert rejections.as_dict() == {reason: {"count": 1, "first": [where]}}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode(errors="replace"))
def test_a_bad_line_is_an_error_with_its_place_or_is_counted(tmp_path, line, monkeypatch):
    monkeypatch.setattr(json_lines, "_BLOCK", 4096)
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
    name = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}[suffix]
    reason = f"the {name} stream (?:is damaged or cut short|has something else after its end)"
    for length in range(1, len(first + second)):
        file.write_bytes((first + second)[:length])
        if length == len(first):
            continue  # a whole file
        found, rejections = documents_of(file, on_bad="skip")
        found = [document.text for document in found]
        assert found == texts[: len(found)] and (len(found) >= 4 or length < len(first) or suffix == ".zst")
        [(told, entry)] = rejections.as_dict().items()
        assert re.fullmatch(reason, told) and entry == {"count": 1, "first": [f"{file}:{len(found)}"]}
        if length % 20 == 1:
            with pytest.raises(UserError, match=f"rows.jsonl{suffix}: {reason} after line {len(found)}; "):
                texts_of(file)
    (tmp_path / f"one.txt{suffix}").write_bytes(first[:-1])
    assert_rejected_file(tmp_path / f"one.txt{suffix}", f"the {name} stream is damaged or cut short")


def assert_rejected_file(file, reason):
    with pytest.raises(UserError, match=f"{file.name}: {reason}"):
        texts_of(file)
    found, rejections = documents_of(file, on_bad="skip")
    assert not found and rejections.counts == {reason: 1}


@pytest.mark.parametrize("suffix", PACK)
def test_damage_far_into_a_stream_keeps_what_stands_before(tmp_path, suffix):
    texts = [random.Random(n).randbytes(40).hex() for n in range(20_000)]
    packed = PACK[suffix](lines_of(texts))
    file = tmp_path / f"rows.jsonl{suffix}"
    for damaged in (packed[: len(packed) // 2], packed[: len(packed) // 2] + b"\0" * 999, lines_of(texts)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="stream is damaged or cut short after line"):
            texts_of(file)
        found, rejections = documents_of(file, on_bad="skip")
        assert rejections.total == 1 and (8_500 < len(found) < 10_500 or damaged == lines_of(texts))
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
    found, rejections = documents_of(file, on_bad="skip")
    assert [document.text for document in found] == texts[:50]
    assert rejections.first == {"the parquet file is damaged or cut short": [f"{file}:50"]}


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".parquet"])
def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), file)
    else:
        file.write_bytes(PACK[".zst"](lines_of(TEXTS)))
    parts = take_inventory(file, 10**9).ranges
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
            assert len(list(read_documents(parts[0], ReadOptions(on_bad="skip"), RejectionCounts()))) == len(TEXTS)
        except OSError as error:
            assert "network" in str(error)
            failures += 1
    assert 0 < failures < 6


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_memory_holds_a_line(tmp_path, suffix):
    """A line that is too long is passed over, and many lines are as one."""
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(PACK.get(suffix.removeprefix(".jsonl"), bytes)(b"y" * 30_000_000 + b"\n" + row * 10_000))
    tracemalloc.start()
    rejections = RejectionCounts()
    count = sum(
        1
        for part in take_inventory(file, 10**9).ranges
        for _ in read_documents(part, ReadOptions(max_bytes=10_000, on_bad="skip"), rejections)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and rejections.total == 1 and peak < 5e6


def test_rows_of_all_files_in_order(tmp_path):
    pq.write_table(pa.table({"prompt": ["p1", "p2"], "more": [[{"role": "a"}], []]}), tmp_path / "2.parquet")
    (tmp_path / "1.jsonl").write_bytes(b'{"prompt": 1, "other": 2}\nno\n')
    (tmp_path / "3.txt").write_text("not rows")
    rejections = RejectionCounts()
    rows = list(read_all_records(tmp_path, ReadOptions(on_bad="skip"), rejections, ["prompt", "more"]))
    assert rows == [
        ({"prompt": 1, "other": 2}, f"{tmp_path}/1.jsonl:1"),
        ({"prompt": "p1", "more": [{"role": "a"}]}, f"{tmp_path}/2.parquet:1"),
        ({"prompt": "p2", "more": []}, f"{tmp_path}/2.parquet:2"),
    ]
    assert rejections.counts == {"not valid JSON": 1}


@pytest.mark.parametrize("suffix", PACK)
def test_several_streams_are_one_and_what_follows_them_is_told(tmp_path, suffix):
    one, other = (PACK[suffix](lines_of([text])) for text in ("fever", "cough"))
    file = tmp_path / f"rows.JSONL{suffix.upper()}"
    file.write_bytes(one + other + bytes(512))
    assert texts_of(file) == ["fever", "cough"]
    file.write_bytes(one + b"something else")
    with pytest.raises(
        UserError, match=r"stream (has something else after its end|is damaged or cut short) after line"
    ):
        texts_of(file)
    texts, rejections = documents_of(file, on_bad="skip")
    assert [text for text, _ in texts] == ["fever"] and rejections.total == rejections.of_files == rejections.rows == 1


@pytest.mark.parametrize("log, problem", [(28, None), (30, None), (31, r"needs more than 1 GiB .* --long=30 or less")])
def test_long_windows_of_zstd(tmp_path, log, problem):
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=log, chain_log=10, hash_log=10, strategy=1)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    file = tmp_path / "rows.jsonl.zst"
    file.write_bytes(stream.compress(lines_of(TEXTS)) + stream.flush())
    if problem is None:
        assert texts_of(file) == TEXTS
        return
    with pytest.raises(UserError, match=problem):
        texts_of(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_pointer_is_not_a_document(tmp_path, name):
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    whole = whole_file(epath.Path(file))
    for read in (take_inventory, lambda _: list(read_documents(whole, ReadOptions(), RejectionCounts()))):
        with pytest.raises(UserError, match="only says where its content is: fetch it with `git lfs pull`"):
            read(file)

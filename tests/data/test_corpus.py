import gzip
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_jax.data import corpus as corpus_module
from medllm_jax.data import store as store_module
from medllm_jax.data.corpus import Dropped, find_files, prepare_corpus, read_documents
from medllm_jax.data.store import RowStore
from medllm_jax.data.tokenizer import encode_plain, fingerprint, load_tokenizer
from medllm_jax.errors import UserError
from tests.tiny import make_tokenizer, write_json_lines

TEXTS = [
    "The patient has a fever and a cough.",
    "患者は発熱を訴えている。\n\n正解は三番。",
    "a",
    "Ends early?<|endoftext|>No.<|im_end|>",
    "long " * 120,
    "Hypertension is treated with diuretics. " * 3,
]


def texts_of(inputs, on_bad="error", dropped=None):
    return [document.text for document in read_documents(inputs, on_bad, dropped or Dropped())]


def segments_of(path):
    """Token ids of all segments of a store, row by row."""
    rows = RowStore.open(path)
    rows = rows.read(range(len(rows)))
    return [[tuple(row[0][row[1] == number]) for number in range(1, row[1].max() + 1)] for row in rows]


# Reading


def test_formats_give_the_same_documents(tmp_path):
    lines = "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in TEXTS)
    (tmp_path / "plain.jsonl").write_text(lines)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "blank.jsonl").write_text("\n" + lines.replace("\n", "\n\n  \n").rstrip())
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("plain.jsonl", "windows.jsonl", "blank.jsonl", "packed.jsonl.gz"):
        assert texts_of(tmp_path / name) == TEXTS
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    assert texts_of([str(tmp_path / "*.txt")]) == TEXTS


def test_inputs_are_files_folders_and_globs_each_file_once(tmp_path):
    for name in ("b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "a/notes.md", "a/.hidden.jsonl", "[x].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    suffixes = (".jsonl", ".jsonl.gz", ".txt")

    def names(*inputs):
        return [str(file.relative_to(tmp_path)) for file in find_files([tmp_path / i for i in inputs], suffixes)]

    assert names("") == ["[x].jsonl", "a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("b", "a") == ["b/1.jsonl", "a/2.txt", "a/deep/3.jsonl.gz"]
    assert names("?/*") == ["a/2.txt", "a/deep/3.jsonl.gz", "b/1.jsonl"]
    assert names("a/*/*.gz", "a") == ["a/deep/3.jsonl.gz", "a/2.txt"]
    assert names("[x].jsonl", "[ab]/*.jsonl") == ["[x].jsonl", "b/1.jsonl"]
    assert [file.name for file in find_files(str(tmp_path / "b"), suffixes)] == ["1.jsonl"]
    for wrong, message in (
        ("c", "does not exist"),
        ("a/notes.md", "not a file of a kind"),
        ("*.md", "no file"),
        ("**/*", "searched"),
    ):
        with pytest.raises(UserError, match=message):
            names(wrong)


BAD_LINES = {
    b'{"text": "secret': "not valid JSON",
    b'["secret"]': "not a JSON object",
    b'{"txet": "secret"}': "no field `text`",
    b'{"text": ["secret"]}': "text is not a string",
    b'{"text": " \\n"}': "text is empty",
    b'{"text": "secret \xff"}': "not UTF-8",
    b'{"text": "secret \\ud800"}': "text is not valid Unicode (a lone surrogate)",
    b"[" * 100_000: "not valid JSON",
    b'{"text": ' + b"1" * 5000 + b"}": "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode(errors="replace"))
def test_a_bad_line_is_an_error_with_its_place_or_is_counted(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    good = b'{"text": "good"}\n'
    file.write_bytes(good + b"\n" + line + b"\n" + good)
    reason = BAD_LINES[line]
    with pytest.raises(UserError) as caught:
        texts_of(file)
    assert str(caught.value).startswith(f"{file}:3: {reason}; ")
    assert "secret" not in str(caught.value)
    dropped = Dropped()
    assert texts_of(file, "skip", dropped) == ["good", "good"]
    assert dropped.as_dict() == {reason: {"count": 1, "first": [f"{file}:3"]}}


def test_dropped_keeps_all_counts_and_the_first_places(tmp_path):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": ""}] * 25 + [{}])
    dropped = Dropped()
    assert texts_of(file, "skip", dropped) == []
    assert dropped.counts == {"text is empty": 25, "no field `text`": 1} and dropped.total == 26
    assert dropped.first["text is empty"] == [f"{file}:{line}" for line in range(1, 11)]


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.txt").write_text("fine")
    dropped = Dropped()
    assert texts_of(tmp_path, "skip", dropped) == ["fine"]
    assert dropped.counts == {"not UTF-8": 1, "text is empty": 1}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_damaged_compression_is_an_error_always(tmp_path, on_bad):
    lines = "".join(json.dumps({"text": f"{n} " * 50}) + "\n" for n in range(3000)).encode()
    packed = gzip.compress(lines)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for damaged in (packed[: len(packed) // 2], bytes(flipped), lines):
        (tmp_path / "rows.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows.jsonl.gz is damaged after .*rows.jsonl.gz"):
            texts_of(tmp_path / "rows.jsonl.gz", on_bad)


# Preparing


@pytest.mark.parametrize("packing", ["best_fit", "split"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_the_store_holds_the_documents(tmp_path, tokenizer_dir, packing, append_eos):
    write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    found = prepare_corpus(
        tmp_path / "rows.jsonl", tokenizer_dir, tmp_path / "store", 64, packing=packing, append_eos=append_eos
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    eos = [tokenizer.eos_token_id] if append_eos else []
    documents = [tuple(ids + eos) for ids in encode_plain(tokenizer, TEXTS)]
    longer = [document for document in documents if len(document) > 64]
    assert longer and len(longer) < len(documents)

    rows = segments_of(tmp_path / "store")
    if packing == "split":
        assert sum((segment for row in rows for segment in row), ()) == sum(documents, ())
        assert found.rows == -(-found.tokens // 64)
    else:
        cut = Counter(document[n : n + 64] for document in documents for n in range(0, len(document), 64))
        assert Counter(segment for row in rows for segment in row) == cut
    flat = sum((segment for row in rows for segment in row), ())
    assert flat.count(tokenizer.eos_token_id) == (len(TEXTS) if append_eos else 0)

    assert found == RowStore.open(tmp_path / "store").metadata
    assert (found.kind, found.packing, found.sequence_length, found.rows) == ("cpt", packing, 64, len(rows))
    assert (found.examples, found.split_documents, found.pairs_per_row) == (len(TEXTS), len(longer), 0)
    assert found.tokens == sum(map(len, documents)) and found.fill == found.tokens / (64 * len(rows))
    assert (found.max_token_id, found.vocab_size) == (max(flat), len(tokenizer))
    assert (found.tokenizer_fingerprint, found.eos_token_id) == (fingerprint(tokenizer_dir), tokenizer.eos_token_id)
    assert found.dropped == {}
    store = RowStore.open(tmp_path / "store")
    assert not store.read(range(len(store)))[:, 2].any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=8),
    st.integers(2, 40),
)
def test_any_text_comes_back(tmp_path, tokenizer_dir, texts, sequence_length):
    write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    prepare_corpus(
        tmp_path / "rows.jsonl", tokenizer_dir, tmp_path / "store", sequence_length, packing="split", overwrite=True
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    flat = [int(token) for row in segments_of(tmp_path / "store") for segment in row for token in segment]
    assert tokenizer.decode(flat) == "".join(text + tokenizer.eos_token for text in texts)


def test_batches_of_the_tokenizer_change_nothing(tmp_path, tokenizer_dir, monkeypatch):
    write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS * 5])
    calls = []
    digests = set()
    for documents, characters in ((1, 10**6), (7, 10**6), (10**6, 50), (10**6, 10**6)):
        monkeypatch.setattr(corpus_module, "_BATCH_DOCUMENTS", documents)
        monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", characters)
        progress = []
        found = prepare_corpus(
            tmp_path / "rows.jsonl",
            tokenizer_dir,
            tmp_path / "store",
            32,
            overwrite=True,
            progress=lambda *so_far, progress=progress: progress.append(so_far),
        )
        calls.append(len(progress))
        digests.add(found.digest)
        assert progress[-1] == (found.examples, found.tokens) and progress == sorted(progress)
    assert calls[0] == 30 and calls[1] == 5 and calls[2] > 5 and calls[3] == 1
    assert len(digests) == 1


def test_what_was_skipped_is_in_the_store(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "good"}, {"text": ""}, {}, {"text": 3}, {"text": ""}])
    with pytest.raises(UserError, match=":2: text is empty"):
        prepare_corpus(file, tokenizer_dir, tmp_path / "store", 16)
    found = prepare_corpus(file, tokenizer_dir, tmp_path / "store", 16, on_bad="skip")
    assert found.examples == 1
    assert {reason: entry["count"] for reason, entry in found.dropped.items()} == {
        "text is empty": 2,
        "no field `text`": 1,
        "text is not a string": 1,
    }
    assert found.dropped["text is empty"]["first"] == [f"{file}:2", f"{file}:5"]


def test_failures_leave_nothing_and_say_why(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_SHARD_ROWS", 2)
    monkeypatch.setattr(corpus_module, "_BATCH_DOCUMENTS", 10)
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    out.mkdir()
    written = []

    def fails(match, rows, **options):
        file = write_json_lines(inputs / "rows.jsonl", rows)
        arguments = {"inputs": file, "tokenizer_dir": tokenizer_dir, "output": out / "store", "sequence_length": 16}
        with pytest.raises(UserError, match=match):
            prepare_corpus(**arguments | options, progress=lambda *_: written.append(list(out.rglob("zarr.json"))))
        assert not list(out.iterdir())

    fails(r"rows.jsonl:101: text is empty", [{"text": "row after row " * 3}] * 100 + [{"text": ""}], packing="split")
    assert written[-1], "that failure came after rows had been written"
    fails("no document to prepare in .*nothing", [])
    fails("no document to prepare in .*2 text is empty .first at ", [{"text": ""}] * 2, on_bad="skip")
    fails("sequence length is 1", [{"text": "a"}], sequence_length=1)
    fails("no tokenizer folder", [{"text": "a"}], tokenizer_dir=tmp_path / "none")
    fails("does not exist", [{"text": "a"}], inputs=tmp_path / "none")


def test_output_exists(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "one"}])
    first = prepare_corpus(file, tokenizer_dir, tmp_path / "store", 16)
    write_json_lines(file, [{"text": "two"}])
    with pytest.raises(UserError, match="exists"):
        prepare_corpus(file, tokenizer_dir, tmp_path / "store", 16)
    assert RowStore.open(tmp_path / "store").metadata == first
    second = prepare_corpus(file, tokenizer_dir, tmp_path / "store", 16, overwrite=True)
    assert RowStore.open(tmp_path / "store").metadata == second != first


def test_a_tokenizer_without_end_of_sequence(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare_corpus(file, tmp_path / "tokenizer", tmp_path / "store", 16)
    found = prepare_corpus(file, tmp_path / "tokenizer", tmp_path / "store", 16, append_eos=False)
    assert found.eos_token_id is None


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_SHARD_ROWS", 16)
    monkeypatch.setattr(corpus_module, "_BATCH_DOCUMENTS", 16)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1000)))
    peaks = []
    for count in (100, 800):
        file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text}] * count)
        tracemalloc.start()
        prepare_corpus(file, tokenizer_dir, tmp_path / "store", 256, packing="split", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]

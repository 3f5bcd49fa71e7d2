import dataclasses
import gzip
import hashlib
import json
import lzma
import random
import tracemalloc
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_jax.cli import main
from medllm_jax.data import store_writer
from medllm_jax.data.prepare import corpus as corpus_module
from medllm_jax.data.prepare import tasks
from medllm_jax.data.prepare.corpus import STAGES, Corpus, Recipe, prepare_corpus
from medllm_jax.data.prepare.jobs import in_processes, on_beam
from medllm_jax.data.prepare.store_report import report
from medllm_jax.data.store import RowStore, verify
from medllm_jax.data.tokenizer import encode_plain, fingerprint, load_tokenizer
from medllm_jax.errors import UserError
from tests.tiny import make_tokenizer, write_json_lines

TEXTS = [
    "The patient has a fever and a cough.",
    "患者は発熱を訴えている。\n\n正解は三番。",
    "a",
    "Ends early?<|endoftext|>No.<|im_end|>",
    "long " * 120 + ".",
    "Hypertension is treated with diuretics. " * 3 + ".",
]


def prepare(inputs, tokenizer_dir, output, **options):
    """One corpus; options of the recipe, or of prepare_corpus."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in options.items() if name in fields})
    more = {name: value for name, value in options.items() if name not in fields}
    return prepare_corpus([Corpus("corpus", str(inputs))], tokenizer_dir, output, recipe, **more)


def rows_of(path):
    store = RowStore.open(path)
    return store.read(range(len(store)))


def segments_of(path):
    """Token ids of all segments of a store, row by row."""
    return [
        [tuple(row[0][row[1] == number].tolist()) for number in range(1, row[1].max() + 1, 2)] for row in rows_of(path)
    ]


def texts_of(path, tokenizer_dir):
    """The documents of a store whose documents are all shorter than a row, sorted."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return sorted(tokenizer.decode(segment[:-1]) for row in segments_of(path) for segment in row)


def sentences(count, seed=0):
    rng = random.Random(seed)
    words = "患者 発熱 咳 肺炎 高血圧 insulin fever liver dose 投与 治療 検査 所見 診断 心臓 腎臓"
    return [" ".join(rng.choices(words.split(), k=rng.randint(4, 60))) + f" {number}." for number in range(count)]


# --- what is in a store ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "split"])
@pytest.mark.parametrize("append_eos", [True, False])
def test_the_store_holds_the_documents(tmp_path, tokenizer_dir, packing, append_eos):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    found = prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=64, packing=packing, append_eos=append_eos)
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
    assert found.dropped == {} and found.recipe["packing"] == packing
    assert not rows_of(tmp_path / "store")[:, 2].any()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), min_size=1, max_size=8),
    st.integers(2, 40),
)
def test_any_text_comes_back(tmp_path, tokenizer_dir, texts, sequence_length):
    write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    options = {"packing": "split", "duplicates": "keep", "pii": "report"}
    prepare(
        tmp_path / "rows.jsonl",
        tokenizer_dir,
        tmp_path / "store",
        sequence_length=sequence_length,
        overwrite=True,
        **options,
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    flat = [token for row in segments_of(tmp_path / "store") for segment in row for token in segment]
    assert tokenizer.decode(flat) == "".join(text + tokenizer.eos_token for text in texts)


def test_a_sentencepiece_model_prepares_as_a_folder_does(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_prefix=str(tmp_path / "tiny"),
        vocab_size=120,
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(40)])
    found = prepare(file, tmp_path / "tiny.model", tmp_path / "store", sequence_length=128)
    assert found.examples == 40 and found.tokenizer_fingerprint == fingerprint(tmp_path / "tiny.model")


# --- several corpora -------------------------------------------------------------------------------------------------


def two_corpora(folder):
    write_json_lines(folder / "a1.jsonl", [{"body": text} for text in sentences(30)])
    (folder / "a2.jsonl.gz").write_bytes(gzip.compress((folder / "a1.jsonl").read_bytes()))
    write_json_lines(folder / "b.jsonl", [{"text": text} for text in sentences(50, seed=1) + sentences(3)])
    checksums = sorted(hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("a1.jsonl", "a2.jsonl.gz"))
    checksum = hashlib.sha256("".join(f"{line}\n" for line in checksums).encode()).hexdigest()
    manifest = {"provenance": "made up", "licence": "CC0-1.0", "processing": "raw", "contact": "team@example.org"}
    return [
        Corpus("a", (str(folder / "a1.jsonl"), str(folder / "a2.*")), "body", **manifest, checksum=checksum),
        Corpus("b", str(folder / "b.jsonl")),
    ]


def test_corpora_keep_to_their_rows_and_their_manifests(tmp_path, tokenizer_dir):
    corpora = two_corpora(tmp_path)
    found = prepare_corpus(corpora, tokenizer_dir, tmp_path / "store", Recipe(sequence_length=128))
    a, b = found.corpora
    assert (a.examples, b.examples, a.first_row, b.first_row, a.rows + b.rows) == (30, 50, 0, a.rows, found.rows)
    assert a.manifest["licence"] == "CC0-1.0" and a.manifest["checksum"] == corpora[0].checksum
    assert [file["bytes"] for file in b.manifest["files"]] == [(tmp_path / "b.jsonl").stat().st_size]
    # The same texts stand in both files of the first corpus, and some in the second: the first of all is kept.
    reason = "the text of an earlier document"
    assert a.manifest["dropped"][reason]["count"] == 30 and b.manifest["dropped"][reason]["count"] == 3
    assert b.manifest["dropped"][reason]["first"] == [f"{tmp_path / 'b.jsonl'}:{n}" for n in (51, 52, 53)]
    assert found.dropped[reason]["count"] == 33
    for name, alone in (("a", corpora[0]), ("b", corpora[1])):
        prepare_corpus([alone], tokenizer_dir, tmp_path / name, Recipe(sequence_length=128))
    assert np.array_equal(rows_of(tmp_path / "store")[: a.rows], rows_of(tmp_path / "a"))
    text = report(found)
    assert "licence: CC0-1.0" in text and "licence: not stated" in text and "33 the text of an earlier" in text
    assert a.manifest["text"]["documents"] == 30 and a.manifest["tokens"]["tokens"] == a.tokens - 30
    with pytest.raises(UserError, match=r"corpus a has the checksum .*, its manifest says 0+"):
        changed = dataclasses.replace(corpora[0], checksum="0" * 64)
        prepare_corpus([changed], tokenizer_dir, tmp_path / "c")
    with pytest.raises(UserError, match="share a name"):
        prepare_corpus([corpora[1], corpora[1]], tokenizer_dir, tmp_path / "c")


# --- tasks, executors, going on--------------------------------------------------------------------------------------


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(corpus_module, "_TASK_BYTES", 2000)
    monkeypatch.setattr(corpus_module, "_READ_TOKENS", 300)


def test_tasks_batches_and_executors_change_nothing(tmp_path, tokenizer_dir, monkeypatch):
    corpora, recipe = two_corpora(tmp_path), Recipe(sequence_length=128, duplicates="near")
    whole = prepare_corpus(corpora, tokenizer_dir, tmp_path / "whole", recipe)
    monkeypatch.setattr(corpus_module, "_TASK_BYTES", 1500)
    monkeypatch.setattr(corpus_module, "_READ_TOKENS", 300)
    monkeypatch.setattr(tasks, "_BATCH_DOCUMENTS", 3)
    calls = []
    with in_processes(2) as executor:
        show = lambda *progress: calls.append(progress)  # noqa: E731
        parts = prepare_corpus(corpora, tokenizer_dir, tmp_path / "parts", recipe, executor=executor, progress=show)
    assert parts == whole
    assert {job: total for job, _, total in calls}["survey"] > 5
    assert [job for job, done, total in calls if done == total] == [
        "inventory", "survey", "duplicates", "tokens", "packing a", "packing b"
    ]  # fmt: skip
    for stage in {job.split()[0] for job, _, _ in calls}:
        assert all(title and counted in ("files", "bytes", "documents") for title, counted in [STAGES[stage]])
    totals = {job: total for job, _, total in calls}
    assert totals["packing a"] + totals["packing b"] == whole.examples <= totals["tokens"] == totals["duplicates"]


def test_beam_makes_the_same_store(tmp_path, tokenizer_dir, small_tasks):
    corpora, recipe = two_corpora(tmp_path), Recipe(sequence_length=128)
    here = prepare_corpus(corpora, tokenizer_dir, tmp_path / "here", recipe)
    assert prepare_corpus(corpora, tokenizer_dir, tmp_path / "beam", recipe, executor=on_beam([])) == here
    write_json_lines(tmp_path / "b.jsonl", [{"text": 3}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: text is not a string"):
        prepare_corpus(corpora, tokenizer_dir, tmp_path / "bad", recipe, executor=on_beam([]))


class Interrupted(Exception):  # noqa: N818 (not an error)
    pass


def counting(fail_after=None):
    """An executor that counts what it does by job, and may stop in the middle."""
    done = Counter()

    def executor(function, arguments):
        for argument in arguments:
            if sum(done.values()) == fail_after:
                raise Interrupted
            yield function(argument)
            done[function.args[0].name] += 1

    executor.done = done
    return executor


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path, tokenizer_dir, small_tasks):
    corpora = two_corpora(tmp_path)
    recipe = Recipe(sequence_length=128)
    expected = prepare_corpus(corpora, tokenizer_dir, tmp_path / "expected", recipe, executor=(full := counting()))
    total = sum(full.done.values())
    assert full.done["survey"] == full.done["tokens"] > 4
    for stop in (0, 2, total // 2, total - 1):
        output = tmp_path / f"stop{stop}"
        with pytest.raises(Interrupted):
            prepare_corpus(corpora, tokenizer_dir, output, recipe, executor=counting(stop))
        assert not output.exists()
        rest = counting()
        assert prepare_corpus(corpora, tokenizer_dir, output, recipe, executor=rest) == expected
        assert sum(rest.done.values()) == total - stop


def test_only_what_changed_is_made_again(tmp_path, tokenizer_dir, small_tasks, monkeypatch):
    """Packing is stopped, so that the work of the jobs before it stays."""
    corpora = two_corpora(tmp_path)

    def stop(*_):
        raise Interrupted

    def again(**options):
        executor = counting()
        with pytest.raises(Interrupted):
            recipe = Recipe(sequence_length=128, **options)
            prepare_corpus(corpora, tokenizer_dir, tmp_path / "store", recipe, executor=executor)
        return dict(executor.done)

    monkeypatch.setattr(corpus_module, "_pack", stop)
    first = again()
    assert again() == {}
    assert again(packing="split", pii="report") == {}
    assert again(append_eos=False) == {"tokens": first["tokens"]}
    assert again(normalise="nfkc") == {name: first[name] for name in ("survey", "tokens")}
    # A line more: the file is looked at again, the tasks before its end are as they were.
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    changed = again()
    assert changed["inventory"] == 1 and changed["survey"] < first["survey"]


def test_damaged_work_is_told(tmp_path, tokenizer_dir, monkeypatch):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    pack = corpus_module._pack

    def damage(*arguments):
        (tokens,) = (tmp_path / ".store.preparing" / "tokens").glob("*.tokens")
        data = bytearray(tokens.read_bytes())
        data[8] ^= 1
        tokens.write_bytes(data)
        return pack(*arguments)

    monkeypatch.setattr(corpus_module, "_pack", damage)
    with pytest.raises(UserError, match=r"\.tokens is damaged: remove"):
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=64)
    assert not (tmp_path / "store").exists()


# --- what is left out ------------------------------------------------------------------------------------------------


def test_what_was_skipped_is_in_the_store(tmp_path, tokenizer_dir):
    file = write_json_lines(
        tmp_path / "rows.jsonl",
        [{"text": "good"}, {"text": ""}, {}, {"text": 3}, {"text": "\u200b \r\n"}, {"text": "no"}],
    )
    with pytest.raises(UserError, match=":2: text is empty"):
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16)
    found = prepare(
        file, tokenizer_dir, tmp_path / "store", sequence_length=16, on_bad="skip", min_characters=3, max_bytes=100
    )
    assert found.examples == 1
    assert {reason: entry["count"] for reason, entry in found.dropped.items()} == {
        "text is empty": 2,
        "no field `text`": 1,
        "text is not a string": 1,
        "shorter than 3 characters": 1,
    }
    assert found.dropped["text is empty"]["first"] == [f"{file}:2", f"{file}:5"]


def test_files_and_rows_add_up_and_are_told(tmp_path, tokenizer_dir, capsys):
    """What was found is what was read and what was passed over; what was read is what is kept and what was left out."""
    folder = tmp_path / "in"
    folder.mkdir()
    composed = "が\u3067す \xe9"
    rows = [{"text": text} for text in ("fever", "cough", "fever", unicodedata.normalize("NFD", composed), composed)]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "no json\n\n"
    (folder / "a.JSONL").write_text(lines)
    (folder / "b.txt.xz").write_bytes(lzma.compress(b"a text"))
    (folder / "cut.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "liver"}\n' * 2 + random.Random(0).randbytes(999))[:-9]
    )
    (folder / "empty.txt").write_text("")
    (folder / "notes.md").write_text("notes")
    (folder / "again.jsonl").symlink_to("a.JSONL")
    arguments = ["--input", str(folder), "--tokenizer", str(tokenizer_dir), "--sequence-length", "64"]
    output = ["--output", str(tmp_path / "store"), "--on-bad", "skip", "--workers", "1"]
    assert main(["data", "cpt", *arguments, *output]) == 0
    printed = capsys.readouterr().out
    [corpus] = RowStore.open(tmp_path / "store").metadata.corpora
    size = sum(entry.stat().st_size for entry in folder.iterdir() if not entry.is_symlink() and entry.suffix != ".md")
    counts = {reason: entry["count"] for reason, entry in corpus.manifest["dropped"].items()}
    of_files = counts.pop("the gzip stream is damaged or cut short") + counts.pop("the file is empty")
    assert of_files == 2 and counts.pop("the text of an earlier document") >= 2
    assert (
        corpus.manifest["rows"]
        == corpus.examples + sum(entry["count"] for entry in corpus.manifest["dropped"].values()) - of_files
    )
    assert corpus.examples == 5 and sum(file["bytes"] for file in corpus.manifest["files"]) == size
    assert f"input: 4 files, {size:,} bytes, {corpus.manifest['rows']} rows, of which 5 are in the store" in printed
    assert "passed over: 1 (of a kind that is not read (.md)), first at" in printed
    assert "passed over: 1 (another path to a file that is read), first at" in printed
    assert main(["data", "show", str(tmp_path / "store")]) == 0
    shown = capsys.readouterr().out
    assert f"4 files of {size:,} bytes, {corpus.manifest['rows']} rows" in shown and "Files passed over" in shown


def test_a_document_that_fills_its_rows_leaves_no_row_for_its_end(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    [ids] = encode_plain(tokenizer, ["long " * 400])
    text = tokenizer.decode(ids[:32])
    assert encode_plain(tokenizer, [text]) == [ids[:32]]
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text}])
    found = prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16)
    assert (found.rows, found.tokens) == (2, 32)


def test_near_duplicates_are_left_out_when_asked_for(tmp_path, tokenizer_dir):
    text = " ".join(sentences(8))
    rows = [text, text.replace("\u60a3\u8005", "\u75c5\u4eba", 1), text, "something else altogether " * 5]
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": row} for row in rows])
    kept = {}
    for duplicates in ("keep", "exact", "near"):
        found = prepare(file, tokenizer_dir, tmp_path / duplicates, sequence_length=2048, duplicates=duplicates)
        kept[duplicates] = found.examples
    assert kept == {"keep": 4, "exact": 3, "near": 2}
    assert found.dropped["nearly the text of an earlier document"]["first"] == [f"{file}:2"]


def test_texts_are_normalised(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "ｶﾞﾝ\r\n10⁶\x00 ml"}])
    for form, expected in (("none", "ｶﾞﾝ\n10⁶ ml"), ("nfkc", "ガン\n10⁶ ml")):
        prepare(file, tokenizer_dir, tmp_path / form, sequence_length=64, normalise=form)
        assert texts_of(tmp_path / form, tokenizer_dir) == [expected]


# --- the personal data gate ------------------------------------------------------------------------------------------

NUMBER = "090-1234-5678"


def test_personal_data_stops_before_anything_is_written(tmp_path, tokenizer_dir, small_tasks):
    rows = [{"text": text} for text in sentences(99)] + [{"text": f"連絡先は {NUMBER} です。"}]
    file = write_json_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as caught:
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=64)
    message = str(caught.value)
    assert "1 of 100 documents of corpus (1.000%; 0.000% may have any): 1 phone (first at" in message
    assert f"{file}:100 characters 5-18" in message and NUMBER not in message
    work = tmp_path / ".store.preparing"
    assert not (work / "tokens").exists() and not any(b"1234" in f.read_bytes() for f in work.rglob("*.json"))

    kept = prepare(file, tokenizer_dir, tmp_path / "rate", sequence_length=64, pii_rate=0.01)
    assert kept.corpora[0].manifest["personal_data"]["flagged"] == 1
    assert any(NUMBER in text for text in texts_of(tmp_path / "rate", tokenizer_dir))
    prepare(file, tokenizer_dir, tmp_path / "report", sequence_length=64, pii="report")
    masked = prepare(file, tokenizer_dir, tmp_path / "masked", sequence_length=64, pii="mask")
    assert masked.corpora[0].manifest["personal_data"]["findings"]["phone"]["count"] == 1
    assert not any("1234" in text for text in texts_of(tmp_path / "masked", tokenizer_dir))
    assert "1 phone: " in report(masked)


def test_patterns_of_a_file_count(tmp_path, tokenizer_dir):
    patterns = tmp_path / "patterns.yaml"
    patterns.write_text("- {name: trial, label: Trial number, regex: 'JMA-\\d+', mask: '[trial]'}\n")
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "registered as JMA-00123"}])
    prepare(file, tokenizer_dir, tmp_path / "without", sequence_length=64)
    with pytest.raises(UserError, match="1 trial"):
        prepare(file, tokenizer_dir, tmp_path / "with", sequence_length=64, pii_patterns=(str(patterns),))
    prepare(file, tokenizer_dir, tmp_path / "mask", sequence_length=64, pii="mask", pii_patterns=(str(patterns),))
    assert texts_of(tmp_path / "mask", tokenizer_dir) == ["registered as [trial]"]


# --- failures --------------------------------------------------------------------------------------------------------


def test_failures_leave_no_store_and_say_why(tmp_path, tokenizer_dir):
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    out.mkdir()

    def fails(match, rows, **options):
        file = write_json_lines(inputs / "rows.jsonl", rows)
        arguments = {"inputs": file, "tokenizer_dir": tokenizer_dir, "sequence_length": 16} | options
        with pytest.raises(UserError, match=match):
            prepare(output=out / "store", **arguments)
        assert not [entry for entry in out.iterdir() if entry.name != ".store.preparing"]

    fails(r"rows.jsonl:101: text is empty", [{"text": "row after row"}] * 100 + [{"text": ""}])
    fails(r"rows.jsonl: the file is empty", [])
    fails("no document to prepare in .*1 the file is empty", [], on_bad="skip")
    fails("no document to prepare in .*2 text is empty .first at ", [{"text": ""}] * 2, on_bad="skip")
    fails("sequence_length is 1", [{"text": "a"}], sequence_length=1)
    fails("near_threshold is 0", [{"text": "a"}], near_threshold=0.0)
    fails("pii_rate is 2", [{"text": "a"}], pii_rate=2.0)
    fails("no tokenizer", [{"text": "a"}], tokenizer_dir=tmp_path / "none")
    fails("does not exist", [{"text": "a"}], inputs=tmp_path / "none")


def test_a_failure_while_rows_are_written_leaves_no_store(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(store_writer, "_MAX_SHARD_ROWS", 2)
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(50)])
    pack, written = corpus_module._pack, []

    def some(*arguments):
        for number, row in enumerate(pack(*arguments)):
            if number == 20:
                written.extend(tmp_path.rglob("zarr.json"))
                raise Interrupted
            yield row

    monkeypatch.setattr(corpus_module, "_pack", some)
    with pytest.raises(Interrupted):
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16, packing="split")
    assert written and not list(tmp_path.rglob("zarr.json"))


def test_output_exists(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "one"}])
    first = prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16)
    write_json_lines(file, [{"text": "two"}])
    with pytest.raises(UserError, match="exists"):
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16)
    assert RowStore.open(tmp_path / "store").metadata == first
    second = prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=16, overwrite=True)
    assert verify(tmp_path / "store").metadata == second != first


def test_a_tokenizer_without_end_of_sequence(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    file = write_json_lines(tmp_path / "rows.jsonl", [{"text": "one"}])
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare(file, tmp_path / "tokenizer", tmp_path / "store", sequence_length=16)
    found = prepare(file, tmp_path / "tokenizer", tmp_path / "store", sequence_length=16, append_eos=False)
    assert found.eos_token_id is None


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(store_writer, "_MAX_SHARD_ROWS", 16)
    monkeypatch.setattr(tasks, "_BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(corpus_module, "_TASK_BYTES", 50_000)
    monkeypatch.setattr(corpus_module, "_READ_TOKENS", 20_000)
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1000)))
    peaks = []
    for count in (100, 100, 800):  # the first time, libraries fill caches
        rows = [{"text": f"{text} {number}"} for number in range(count)]
        file = write_json_lines(tmp_path / "rows.jsonl", rows)
        tracemalloc.start()
        prepare(file, tokenizer_dir, tmp_path / "store", sequence_length=256, packing="split", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]

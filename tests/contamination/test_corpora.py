"""Planted questions are found in files and stores, however they are laid out; others are not."""

import json

import pytest

from medllm_jax.cli import main
from medllm_jax.contamination.corpora import contamination
from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.errors import UserError
from tests.contamination.world import EXAM, text_of
from tests.tiny import make_tokenizer, write_json_lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus in which two questions stand, and pairs in which another does; as files and as stores."""
    root = tmp_path_factory.mktemp("corpus")
    make_tokenizer(root / "tokenizer", [text_of(n, 200) for n in range(50)], 400)
    documents = [text_of(100 + n, 60) for n in range(30)]
    documents[7] += EXAM.questions[1].text
    documents[21] = EXAM.questions[4].text + documents[21]
    write_json_lines(root / "corpus.jsonl", [{"text": text} for text in documents])
    (root / "plain.txt").write_text("\n".join(documents), encoding="utf-8")
    pairs = [{"prompt": text_of(200 + n), "chosen": " 甲", "rejected": " 乙"} for n in range(10)]
    pairs[3]["prompt"] = EXAM.questions[3].text
    write_json_lines(root / "pairs.jsonl", pairs)
    recipe = Recipe(sequence_length=512)
    prepare_corpus([Corpus("corpus", str(root / "corpus.jsonl"))], root / "tokenizer", root / "store", recipe)
    prepare_pairs([str(root / "pairs.jsonl")], root / "tokenizer", root / "pair-store", 512)
    return root


@pytest.mark.parametrize(
    ("sources", "ids"),
    [
        (["corpus.jsonl"], ["q1", "q4"]),
        (["plain.txt"], ["q1", "q4"]),
        (["store"], ["q1", "q4"]),
        (["pairs.jsonl"], ["q3"]),
        (["pair-store"], ["q3"]),
        (["store", "pairs.jsonl"], ["q1", "q3", "q4"]),
    ],
)
def test_files_and_stores_say_the_same(corpus, sources, ids):
    found = contamination(EXAM, [str(corpus / s) for s in sources], tokenizer=str(corpus / "tokenizer"))
    assert found["ids"] == ids and found["share"] == len(ids) / 6 and found["by_year"] == {"2020": len(ids)}
    assert all(found["shares"][key] == 1.0 for key in ids)
    assert not any(question.text[:8] in json.dumps(found, ensure_ascii=False) for question in EXAM.questions)


def test_the_command(corpus, tmp_path, capsys):
    rows = [{"id": q.id, "question": q.text, "choices": list(q.choices), "answer": "a"} for q in EXAM.questions]
    exam = write_json_lines(tmp_path / "exam.jsonl", rows)
    arguments = ["contamination", "--exam", str(exam), "--output", str(tmp_path / "out"), "--against"]
    assert main([*arguments, str(corpus / "corpus.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "2 of 6 questions (33.3%): 50% or more of their 13-character stretches" in printed
    assert json.loads((tmp_path / "out/contamination.json").read_text())["ids"] == ["q1", "q4"]
    make_tokenizer(tmp_path / "other", ["another"], 300)
    for more, line in (
        ([str(corpus / "store")], "is a store of tokens: give the --tokenizer"),
        ([str(corpus / "store"), "--tokenizer", str(tmp_path / "other")], "tokenizer"),
        (["nowhere"], "nowhere does not exist"),
        ([str(corpus / "corpus.jsonl"), "--threshold", "0"], "--threshold: '0': a number is expected, above 0"),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there is no text in it"):
        contamination(EXAM, [str(tmp_path / "empty.jsonl")])

"""Planted questions are found in files and stores, however they are laid out; others are not."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.cli import main
from medllm_jax.contamination.corpora import contamination
from medllm_jax.contamination.ngrams import Overlap, grams, plain
from medllm_jax.data.prepare.corpus import Corpus, Recipe, prepare_corpus
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from tests.tiny import make_tokenizer, write_json_lines

_WORDS = ("患者", "発熱", "咳嗽", "肺炎", "血圧", "治療", "検査", "所見", "診断", "心臓", "男性", "投与")


def text_of(seed, words=40):
    rng = random.Random(seed)
    return "、".join("".join(rng.choices(_WORDS, k=3)) for _ in range(words // 3)) + "。"


def question(number):
    choices, gold = ("選択肢の一", "選択肢の二"), frozenset({frozenset("a")})
    return Question(id=f"q{number}", text=text_of(number), choices=choices, gold=gold, year=2020)


EXAM = Exam("small", tuple(map(question, range(6))))


@given(st.text("abcあ1", max_size=60), st.integers(1, 20))
def test_equal_stretches_have_equal_hashes_and_others_do_not(text, n):
    found = grams(text, n).tolist()
    expected = [text[start : start + n] for start in range(len(text) - n + 1)]
    assert len(found) == len(expected)
    assert len(set(found)) == len(set(expected)) == len(set(zip(found, expected, strict=True)))


def test_the_hash_of_a_stretch_does_not_depend_on_where_it_stands():
    text = "あいうえおかきくけこさしすせそたちつ"
    for n in (4, 7, 13, 16):
        assert set(grams(text, n)) <= set(grams(f"前置き{text}", n))


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda text: f"問題は次の通り。{text}以上。", 1.0),
        (lambda text: "\n ".join(text), 1.0),
        (lambda text: text.replace("、", " ,").replace("。", "."), 1.0),
        (lambda text: text.translate({c: c + 0xFEE0 for c in range(0x21, 0x7F)}), 1.0),
        (lambda text: text[: len(text) // 2] + "腎" + text[len(text) // 2 :], 0.7),
        (lambda text: text[:20], 0.05),
    ],
)
def test_a_planted_question_is_found(change, share):
    overlap = Overlap(EXAM.questions)
    overlap.add(text_of(99, 300) + change(EXAM.questions[2].text) + text_of(98, 300))
    shares = overlap.shares()
    assert (shares.pop("q2") >= share) and (share == 1.0 or overlap.shares()["q2"] < 1)
    assert max(shares.values()) < 0.05


def test_nothing_is_found_across_two_texts():
    overlap, text = Overlap(EXAM.questions), plain(EXAM.questions[0].text)
    for start in range(0, len(text), 12):
        overlap.add(text[start : start + 12])
    assert overlap.shares()["q0"] == 0


def test_a_question_that_is_too_short_is_counted():
    short = Question(id="s", text="どれか。", choices=("甲", "乙"), gold=frozenset({frozenset("a")}))
    assert Overlap([*EXAM.questions, short]).too_short == 1


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
        ([str(corpus / "corpus.jsonl"), "--threshold", "0"], "the threshold in (0, 1]"),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there is no text in it"):
        contamination(EXAM, [str(tmp_path / "empty.jsonl")])


def test_the_sieve_lets_every_known_stretch_through():
    overlap = Overlap(EXAM.questions)
    for question in EXAM.questions:
        overlap.add(question.text)
    assert np.all(overlap._seen) and set(overlap.shares().values()) == {1.0}

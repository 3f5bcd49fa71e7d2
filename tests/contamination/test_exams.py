"""Planted questions are found in text however they are laid out, and in other exams; others are not."""

import unicodedata

import numpy as np
import pytest

from medllm_jax.contamination.exams import Overlap, overlapping
from medllm_jax.contamination.ngrams import plain
from medllm_jax.evaluation.exam import Exam, Question
from tests.contamination.world import EXAM, text_of

LONG = "55歳の男性。発熱を主訴に来院した。3日前から39℃の発熱があり、改善しないため受診した。考えられるのはどれか。"
CHOICES = ("肺炎球菌性肺炎", "マイコプラズマ肺炎", "ニューモシスチス肺炎", "過敏性肺炎", "肺結核")


def ask(text, choices=CHOICES, name="mine"):
    return Question(id=name, text=text, choices=choices, gold=frozenset({frozenset("b")}))


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


def test_the_sieve_lets_every_known_stretch_through():
    overlap = Overlap(EXAM.questions)
    for question in EXAM.questions:
        overlap.add(question.text)
    assert np.all(overlap._seen) and set(overlap.shares().values()) == {1.0}


def test_the_same_question_is_found_in_other_clothes():
    judged = [Exam("judged", (ask(LONG, name="other"),))]

    def reason(text, choices=CHOICES, name="mine"):
        return overlapping(Exam("x", (ask(text, choices, name),)), judged).get(name)

    assert reason("nothing alike", name="other") == "same id"
    assert reason(LONG) == "same text"
    assert reason(unicodedata.normalize("NFKC", LONG).replace("。", "。\n　")) == "same text"
    assert reason(LONG.replace("39", "３９").upper()) == "same text"
    assert reason(LONG, CHOICES[::-1]) == "similar text"
    assert reason(f"次の文を読み、問いに答えよ。{LONG}1つ選べ。") == "similar text"
    assert reason(LONG.replace("3日前", "5日前")) == "similar text"
    assert reason("".join(map(chr, range(0x4E00, 0x4F00))) + LONG) == "similar text"
    assert (
        reason("45歳の女性。腹痛を主訴に来院した。最も考えられるのはどれか。", ("急性虫垂炎", "胆石症", "腎結石"))
        is None
    )
    assert reason("最も考えられるのはどれか。", ("急性虫垂炎", "胆石症", "腎結石", "卵巣茎捻転", "腸閉塞")) is None
    assert reason("誤りは?", ("甲", "乙")) is None


def test_short_questions_are_compared_whole():
    judged = [Exam("judged", (ask("正しいのは?", ("甲", "乙"), "other"),))]
    assert overlapping(Exam("x", (ask("正しいのは?", ("甲", "丙")),)), judged) == {}
    assert overlapping(Exam("x", (ask(" 正しいのは？", ("甲", "乙")),)), judged) == {"mine": "same text"}

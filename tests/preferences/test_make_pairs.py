"""Preference pairs: what is right and wrong, what is in no pair, how lists are walked, what must not be asked."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.data.prepare.preference_pairs import read_pairs
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.samples import sample_exam
from medllm_jax.evaluation.sampling import Completion, Sampler, SamplingParams
from medllm_jax.preferences.make_pairs import (
    PairOptions,
    choose_questions,
    gold_response,
    make_pairs,
    pair_up,
)
from tests.tiny import write_json_lines

TEMPLATE = load_template("plain")


@pytest.fixture
def exam(tmp_path):
    rows = [
        {
            "id": "q1",
            "question": "Which?",
            "choices": ["red", "green", "blue"],
            "answer": "b",
            "explanation": "Leaves.",
        },
        {"id": "q2", "question": "What?", "choices": ["cat", "dog", "cow"], "answer": "a"},
    ]
    return load_exam(write_json_lines(tmp_path / "exam.jsonl", rows))


@pytest.fixture
def pairs_of(tmp_path):
    """Makes pairs where every prompt has the same samples."""

    def make(exam, condition, texts, *, chat=False, examples=0, **options):
        drawn = [text if isinstance(text, Completion) else Completion(text, "stop") for text in texts]

        def draw(prompts, seeds, params):
            return [drawn for _ in prompts]

        sampler = Sampler("m", "here", draw, chat)
        how = SamplingParams(n=len(drawn), temperature=0.8)
        samples = sample_exam(exam, TEMPLATE, [condition], tmp_path / "s.jsonl", sampler, how, anew=True)
        return make_pairs(exam, TEMPLATE, [condition], samples, PairOptions(**options), examples=examples)

    return make


def both_sides(rows):
    return [(row["id"], row["chosen"], row["rejected"]) for row in rows]


def test_right_over_wrong(exam, pairs_of):
    rows, report = pairs_of(exam, "answer_only", [" b", " c", " a"], strategy="onpolicy")
    assert both_sides(rows) == [("q1", " b", " c"), ("q1", " b", " a"), ("q2", " a", " b"), ("q2", " a", " c")]
    assert report.samples["answer_only"].counts == {"right": 2, "wrong": 4}
    assert all(row["prompt"].endswith("答え:") for row in rows)
    assert report.prompts.counts == {"with pairs": 2}


@pytest.mark.parametrize(
    ("strategy", "chosen"),
    [
        ("gold", {"q1": [" Leaves.\n答え: b"]}),
        ("onpolicy", {"q1": ["y\n答え: b"], "q2": ["x\n答え: a"]}),
        ("both", {"q1": [" Leaves.\n答え: b", "y\n答え: b"], "q2": ["x\n答え: a"]}),
    ],
)
def test_every_strategy_of_the_same_samples(exam, pairs_of, strategy, chosen):
    texts = ["x\n答え: a", "y\n答え: b", "z\n答え: c"]
    rows, report = pairs_of(exam, "explain", texts, strategy=strategy)
    assert {q: list(dict.fromkeys(row["chosen"] for row in rows if row["id"] == q)) for q in chosen} == chosen
    assert {row["id"] for row in rows} == chosen.keys()
    assert report.rows == Counter(row["prefers"] for row in rows)
    assert all((row["prefers"] == "gold") == ("Leaves" in row["chosen"]) for row in rows)
    if strategy != "onpolicy":
        assert report.gold.as_dict() == {"without an explanation": {"count": 1, "first": ["q2/explain"]}}
    if strategy == "gold":
        assert report.prompts.counts == {"with pairs": 1, "without a usable ground truth": 1}


@pytest.mark.parametrize(
    ("sample", "options", "verdict"),
    [
        (Completion(" b", "length"), {}, "cut at the length limit"),
        (Completion(" b", "content_filter"), {}, "cut by the server"),
        ("\n", {}, "empty"),
        (" b<|im_start|>", {}, "with a control token"),
        (" b ", {"min_characters": 2}, "too short"),
        (" b: green", {"max_characters": 7}, "too long"),
        (" c:blue\n ", {}, "duplicate"),
        (" 申し訳ありませんが、答えられません。", {}, "wrong: no answer to read"),
        (" 申し訳ありませんが、答えられません。", {"format_failures": "drop"}, "no answer to read"),
        ("葉の色である b が最も考えられる", {}, "right only if read leniently"),
        (" a,b", {}, "wrong"),
        (" b", {}, "right"),
    ],
)
def test_every_sample_has_one_verdict_and_only_three_make_pairs(exam, pairs_of, sample, options, verdict):
    exam = Exam("one", exam.questions[:1])
    rows, report = pairs_of(
        exam, "answer_only", ["c:blue", "b:green", sample], strategy="onpolicy", **options, examples=9
    )
    tally = report.samples["answer_only"]
    assert tally.counts.total() == 3
    assert [reason for reason, shown in tally.texts.items() if shown[-1]["id"] == "q1/answer_only/2"] == [verdict]
    text = sample if isinstance(sample, str) else sample.text
    assert any(text == row["chosen"] for row in rows) == (verdict == "right")
    assert any(text == row["rejected"] for row in rows) == verdict.startswith("wrong")


def test_prompts_without_pairs_are_counted_by_reason(exam, pairs_of):
    for texts, strategy, reason in (
        ([" b", " a"], "onpolicy", "with pairs"),
        ([" c", "c"], "onpolicy", "without a right answer"),
        (["\n"], "both", "without a usable sample"),
    ):
        _, report = pairs_of(exam, "answer_only", texts, strategy=strategy)
        assert report.prompts.counts == {reason: 2}
    _, report = pairs_of(Exam("one", exam.questions[:1]), "answer_only", [" b", " b"])
    assert report.prompts.counts == {"without a wrong sample": 1}


def test_at_most_so_many_pairs_a_prompt_and_the_rest_is_counted(exam, pairs_of):
    texts = [f"{n}\n答え: {'ac'[n % 2]}" for n in range(8)]
    rows, report = pairs_of(exam, "explain", texts, strategy="onpolicy", max_pairs_per_prompt=3)
    assert len(rows) == 3 and report.beyond_most == 1
    rows, report = pairs_of(exam, "explain", texts, strategy="onpolicy")
    assert len(rows) == 4 and report.beyond_most == 0


def test_texts_are_in_the_report_only_where_they_are_asked_for(exam, pairs_of):
    texts = ["secret one\n答え: b", "secret two\n答え: c", "secret three\n答え: c"]
    rows, report = pairs_of(exam, "explain", texts)
    assert rows and "secret" not in json.dumps(report.as_dict()) + "".join(report.lines())
    rows, report = pairs_of(exam, "explain", texts, examples=1)
    shown = report.as_dict()["examples"]["explain"]
    assert [each["text"] for each in shown["right"]] == [texts[0]] and "secret" not in "".join(report.lines())


def test_chat_samples_make_rows_of_messages(exam, pairs_of, tmp_path):
    rows, _ = pairs_of(exam, "explain", ["x\n答え: c", "y\n答え: b"], chat=True)
    assert rows[0]["prompt"] == TEMPLATE.render_messages(exam.questions[0], "explain")
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "Leaves.\n答え: b"}]
    read = read_pairs(str(write_json_lines(tmp_path / "rows.jsonl", rows)), "error", RejectionCounts())
    assert len(list(read)) == len(rows) > 0


# --- the ground truth ------------------------------------------------------------------------------------------------


def test_gold_in_words_where_the_template_shows_no_letters(exam):
    from medllm_jax.recipes.demo.author import TEMPLATE as WORDS

    assert gold_response(exam.questions[0], load_template(WORDS), "explain") == "Leaves.\n答え:green"


def test_gold_of_an_answer_alone_needs_no_explanation(exam, pairs_of):
    rows, _ = pairs_of(exam, "answer_only", [" c"], strategy="gold")
    assert both_sides(rows) == [("q1", " b", " c"), ("q2", " a", " c")]


def test_gold_of_a_number(tmp_path, pairs_of):
    row = {"id": "n", "question": "How many?", "choices": [], "answer": "12", "explanation": "Counted."}
    exam = load_exam(write_json_lines(tmp_path / "number.jsonl", [row]))
    rows, _ = pairs_of(exam, "explain", ["x\n答え: 13"], strategy="gold")
    assert [row["chosen"] for row in rows] == [" Counted.\n答え: 12"]


def test_gold_that_does_not_read_as_right_is_not_used(exam, pairs_of):
    misleading = dataclasses.replace(exam.questions[0], explanation="答え: a\n答え: c")
    contradicting = dataclasses.replace(exam.questions[0], id="q3", gold=frozenset({frozenset("bc")}), k=1)
    rows, report = pairs_of(Exam("x", (misleading, contradicting)), "explain", ["x\n答え: c"], strategy="gold")
    assert rows == [] or {row["id"] for row in rows} == {"q1"}
    assert "not read as right" in report.gold.counts


# --- walking ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(), max_size=6, unique=True), st.lists(st.text(), max_size=6, unique=True), st.integers(1, 8))
def test_walking_side_by_side(chosen, rejected, most):
    pairs = list(pair_up(chosen, rejected, most))
    assert len(pairs) == len(set(pairs)) == (min(most, max(len(chosen), len(rejected))) if chosen and rejected else 0)
    assert {c for c, _ in pairs} == set(chosen[: len(pairs)])
    assert {r for _, r in pairs} == set(rejected[: len(pairs)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_pairs_per_prompt": 0},
        {"min_characters": 0},
        {"max_characters": 0},
        {"min_characters": 5, "max_characters": 4},
    ],
)
def test_senseless_options_are_refused(wrong):
    with pytest.raises(UserError, match=r"at least 1|no less than min_characters"):
        PairOptions(**wrong)


# --- overlap ---------------------------------------------------------------------------------------------------------

LONG = "55歳の男性。発熱を主訴に来院した。3日前から39℃の発熱があり、改善しないため受診した。考えられるのはどれか。"
CHOICES = ("肺炎球菌性肺炎", "マイコプラズマ肺炎", "過敏性肺炎")


@pytest.fixture
def ask(exam):
    return lambda text, choices=CHOICES, name="mine": dataclasses.replace(
        exam.questions[0], id=name, text=text, choices=choices
    )


def test_overlap_is_refused_or_left_out_and_withdrawn_questions_are_not_asked(ask):
    withdrawn = dataclasses.replace(ask("excluded?", name="w"), points=0)
    exam = Exam("mine", (ask(LONG, name="a"), ask("another one?", ("x", "y"), "b"), withdrawn))
    judged = [Exam("first", (ask("else?", name="z"),)), Exam("second", (ask(LONG, name="other"),))]
    with pytest.raises(
        UserError, match=r"1 of 2 questions of mine .* first or second too, by same text: 1 \(a\); take"
    ):
        choose_questions(exam, judged, "refuse")
    kept, left_out = choose_questions(exam, judged, "drop")
    assert [question.id for question in kept.questions] == ["b"]
    assert left_out == {
        "withdrawn (points 0)": {"count": 1, "first": ["w"]},
        "in an evaluation exam (same text)": {"count": 1, "first": ["a"]},
    }
    with pytest.raises(UserError, match="no question of mine is left"):
        choose_questions(Exam("mine", exam.questions[:1]), judged, "drop")
    assert choose_questions(exam, [], "refuse")[0].questions == exam.questions[:2]

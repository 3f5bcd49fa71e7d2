"""Preference pairs: what is right and wrong, how lists are walked, what is counted."""

from collections import namedtuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.pairs import PairOptions, gold_response, make_pairs, pair_up
from tests.tiny import write_json_lines

Sample = namedtuple("Sample", "text finish_reason")


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


def sampler(*texts):
    """Gives every prompt the same samples."""

    def complete(prompts, *, max_new_tokens, stop):
        for number, _ in enumerate(prompts):
            text = texts[number % len(texts)]
            yield text if isinstance(text, Sample) else Sample(text, "stop")

    return complete


def test_right_over_wrong_both_ways_of_preferring(exam):
    template = load_template("plain")
    complete = sampler(" b", " c", " c", " a")
    rows, counts = make_pairs(exam, template, ["answer_only"], complete, PairOptions(samples=4, strategy="onpolicy"))
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        ("q1", " b", " c"),
        ("q1", " b", " a"),
        ("q2", " a", " b"),
        ("q2", " a", " c"),
    ]
    assert counts["samples"] == 8 and counts["right samples"] == 2 and counts["pairs"] == 4
    assert all(row["prompt"].endswith("答え:") for row in rows)


def test_gold_is_preferred_where_the_exam_has_an_explanation(exam):
    template = load_template("plain")
    rows, counts = make_pairs(
        exam, template, ["explain"], sampler("x\n答え: c"), PairOptions(samples=1, strategy="gold")
    )
    assert [(row["id"], row["chosen"]) for row in rows] == [("q1", " Leaves.\n答え: b")]
    assert counts["prompts without a right answer"] == 1


def test_gold_in_words_where_the_template_shows_no_letters(exam):
    from medllm_jax.demo.world import TEMPLATE

    assert gold_response(exam.questions[0], load_template(TEMPLATE), "explain") == "Leaves.\n答え:green"


def test_cut_samples_are_counted_and_in_no_pair(exam):
    complete = sampler(Sample(" b", "length"), Sample(" c", "length"))
    rows, counts = make_pairs(exam, load_template("plain"), ["answer_only"], complete, PairOptions(samples=2))
    assert rows == [] and counts["samples cut at the length limit"] == 4


def test_empty_samples_are_counted_and_in_no_pair(exam):
    complete = sampler(" b", "\n", "")
    rows, counts = make_pairs(exam, load_template("plain"), ["answer_only"], complete, PairOptions(samples=3))
    assert counts["empty samples"] == 4
    assert not any(row["rejected"].strip() == "" for row in rows)


def test_repeated_samples_count_once(exam):
    rows, _ = make_pairs(
        exam, load_template("plain"), ["answer_only"], sampler(" b", " b", " a"), PairOptions(samples=3)
    )
    assert len([row for row in rows if row["id"] == "q2"]) == 1


@given(st.lists(st.text(), max_size=6, unique=True), st.lists(st.text(), max_size=6, unique=True), st.integers(1, 8))
def test_walking_side_by_side(chosen, rejected, most):
    pairs = list(pair_up(chosen, rejected, most))
    assert len(pairs) == (min(most, max(len(chosen), len(rejected))) if chosen and rejected else 0)
    assert {c for c, _ in pairs} == set(chosen[: len(pairs)])
    assert {r for _, r in pairs} == set(rejected[: len(pairs)])


def test_senseless_options_are_refused():
    with pytest.raises(UserError, match="must be at least 1"):
        PairOptions(samples=0)

"""Intervals and tests against what can be worked out by hand, and parts that add up to the whole."""

import dataclasses
import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm_jax.errors import UserError
from medllm_jax.evaluation import significance
from medllm_jax.evaluation.grading import Grade
from medllm_jax.evaluation.significance import accuracy, compare, mcnemar

BLANK = Grade(
    id="", kind="choice", k=1, max_points=1, text_only=True, exam="", section="A", year=2020, category="", case="",
    answer="a", correct=True, lenient_correct=True, contraindicated=False, rule="letters", problem=None,
    truncated=False,
)  # fmt: skip


def graded(number, correct, **fields):
    return dataclasses.replace(BLANK, id=f"q{number}", correct=bool(correct), **fields)


@pytest.mark.parametrize("cells", [(0, 0), (1, 0), (5, 2), (2, 5), (10, 10), (40, 11), (300, 210)])
def test_mcnemar_is_the_sum_of_binomials(cells):
    n, smaller = sum(cells), min(cells)
    exact = Fraction(2 * sum(comb(n, k) for k in range(smaller + 1)), 2**n)
    assert mcnemar(*cells) == pytest.approx(float(min(exact, Fraction(1))), rel=1e-9)


def test_mcnemar_of_many_questions_is_a_number():
    assert 0 < mcnemar(600, 400) < 1e-9
    assert mcnemar(1000, 0) == pytest.approx(2.0**-999, rel=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_interval_of_single_questions_is_the_binomials(share):
    right = round(600 * share)
    found = accuracy([graded(n, n < right) for n in range(600)], weighted=False, resamples=4000)
    half = 1.96 * np.sqrt(share * (1 - share) / 600)
    assert found.value == share
    assert found.interval.low == pytest.approx(share - half, abs=0.006)
    assert found.interval.high == pytest.approx(share + half, abs=0.006)


def test_memory_is_bounded_and_intervals_are_the_same(monkeypatch):
    grades = [graded(n, n % 3, section="AB"[n % 2]) for n in range(500)]
    whole = accuracy(grades)
    monkeypatch.setattr(significance, "_MOST_DRAWN", 1000)
    assert accuracy(grades) == whole


def test_cases_that_go_wrong_together_are_resampled_together():
    alone = [graded(n, n // 3 % 2) for n in range(300)]
    together = [dataclasses.replace(g, case=f"q{n // 3 * 3}") for n, g in enumerate(alone)]
    width = {name: np.ptp(accuracy(grades).interval) for name, grades in (("alone", alone), ("together", together))}
    assert width["together"] / width["alone"] == pytest.approx(3**0.5, rel=0.1)


def test_strata_keep_their_sizes():
    """One section all right, one all wrong: nothing can vary."""
    grades = [graded(n, n % 2, section="AB"[n % 2]) for n in range(100)]
    assert accuracy(grades).interval == (0.5, 0.5)
    assert np.ptp(accuracy([dataclasses.replace(g, section="") for g in grades]).interval) > 0.1


def test_points_weigh_and_excluded_questions_weigh_nothing():
    grades = [graded(0, True, max_points=3), graded(1, False), graded(2, True, max_points=0)]
    assert accuracy(grades).value == 0.75
    assert accuracy(grades, weighted=False).value == pytest.approx(2 / 3)
    assert accuracy([graded(0, True, max_points=0)]).value == 0.0


_CASE = st.tuples(
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "empty", "wrong_count", "truncated"]),
    st.sampled_from([0, 1, 3]),
)


@given(st.lists(_CASE, min_size=1, max_size=40))
def test_the_parts_of_the_drop_add_up(cases):
    before = [graded(n, first, max_points=points) for n, (first, _, _, points) in enumerate(cases)]
    after = [
        graded(n, second, max_points=points, problem=None if second else problem)
        for n, (_, second, problem, points) in enumerate(cases)
    ]
    found = compare(before, after[::-1], resamples=10)
    assert found.both + found.only_before + found.only_after + found.neither == len(cases)
    for unit, difference, whole in (
        ("questions", found.difference, len(cases)),
        ("points", found.weighted_difference, sum(g.max_points for g in before)),
    ):
        lost = sum(getattr(part, unit) for part in (found.unparseable, found.wrong_count, found.wrong_answer))
        assert getattr(found.gained, unit) - lost == pytest.approx(difference.value * whole)
    assert json.loads(json.dumps(found.as_dict()))["gained"] == found.gained._asdict()


def test_the_difference_of_paired_results_is_surer_than_each():
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.7
    before = [graded(n, right[n]) for n in range(400)]
    after = [graded(n, right[n] and n % 20) for n in range(400)]
    found = compare(before, after)
    assert found.difference.interval.high < 0 and found.p_value < 0.001
    assert np.ptp(found.difference.interval) < np.ptp(accuracy(before).interval) / 2


def test_results_of_other_questions_are_refused():
    with pytest.raises(UserError, match=r"different questions, 2 of them in one only \(q0, q2"):
        compare([graded(0, True), graded(1, True)], [graded(1, True), graded(2, True)])

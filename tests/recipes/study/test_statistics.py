"""The study's intervals and verdicts."""

import numpy as np
import pytest

from medllm_jax.evaluation.significance import Estimate, Interval
from medllm_jax.recipes.study import statistics, verdicts
from medllm_jax.recipes.study.results import WRITTEN
from medllm_jax.recipes.study.statistics import Accuracies, Asked, accuracy, drop, less, share_lost
from medllm_jax.recipes.study.verdicts import Claim, Judged
from tests.recipes.study.conftest import CASES, seed_results

BASE = [Asked("base", "answer_only"), Asked("base", "explain")]


def test_figures_are_means_over_seeds_of_what_each_seed_has():
    study = [seed_results(seed, {"base": (0.9, 0.5)}) for seed in range(3)]
    found = Accuracies.of(study, "test", BASE)
    shares = [[results.right("base", "test", name).mean() for name in ("answer_only", "explain")] for results in study]
    only, explained = np.array(shares).T
    np.testing.assert_allclose(found.in_each_seed(drop("base")), only - explained)
    assert found.estimate(drop("base")).value == pytest.approx((only - explained).mean())
    assert found.estimate(share_lost("base")).value == pytest.approx((1 - explained / only).mean())


def test_a_bootstrap_of_one_seed_is_that_of_its_diseases():
    results = seed_results(0, {"base": (0.7, 0.7)})
    interval = Accuracies.of([results], "test", BASE).estimate(accuracy("base", "answer_only")).interval
    of_case = results.right("base", "test", "answer_only").reshape(CASES, -1).mean(axis=1)
    error = of_case.std() / CASES**0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_seeds_that_differ_widen_an_interval():
    alike = [seed_results(seed, {"base": (0.6, 0.6)}) for seed in range(5)]
    unlike = [seed_results(seed, {"base": (share, share)}) for seed, share in enumerate((0.2, 0.4, 0.6, 0.8, 1.0))]
    widths = []
    for study in (alike, unlike):
        low, high = Accuracies.of(study, "test", BASE).estimate(accuracy("base", "answer_only")).interval
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_differences_are_paired():
    """Two models that answer alike differ by nothing, in every resample."""
    results = seed_results(0)
    results.answers[WRITTEN]["cpt"] = results.answers[WRITTEN]["base"]
    found = Accuracies.of([results], "test", [*BASE, Asked("cpt", "explain")])
    equal = found.estimate(less(accuracy("cpt", "explain"), accuracy("base", "explain")))
    assert equal == Estimate(0.0, Interval(0.0, 0.0))


@pytest.mark.parametrize(
    ("low", "high", "bound", "said"),
    [
        (0.01, 0.2, 0.0, "shown"),
        (0.0, 0.2, 0.0, "not shown"),
        (-0.1, 0.2, 0.0, "not shown"),
        (-0.2, -0.01, 0.0, "reversed"),
        (-0.01, 0.01, -0.02, "shown"),
        (-0.03, 0.01, -0.02, "not shown"),
        (-0.03, -0.01, -0.02, "not shown"),
        (-0.05, -0.03, -0.02, "reversed"),
    ],
)
def test_verdicts(low, high, bound, said):
    claim = Claim("of something", drop("base"), bound=bound)
    assert Judged(claim, Estimate((low + high) / 2, Interval(low, high)), []).verdict == said


def test_a_fact_is_as_good_as_its_worst_claim():
    def judged(low, high):
        return Judged(Claim("", drop("base")), Estimate(0.0, Interval(low, high)), [])

    assert verdicts.verdict([judged(0.1, 0.2), judged(0.1, 0.3)]) == "shown"
    assert verdicts.verdict([judged(0.1, 0.2), judged(-0.1, 0.3)]) == "not shown"
    assert verdicts.verdict([judged(-0.1, 0.3), judged(-0.2, -0.1)]) == "reversed"


def test_a_study_as_the_paper_has_it_shows_every_fact(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    paper = {
        "base": (0.6, 0.1),
        "cpt": (1.0, 0.75),
        "rpo": (1.0, 1.0),
        "dpo": (1.0, 0.7),
        "nll": (1.0, 0.8),
        "base-rpo": (0.5, 0.5),
        "rpo-fast": (1.0, 0.9),
        "dpo-fast": (0.7, 0.4),
    }
    study = [seed_results(seed, paper) for seed in range(5)]
    judged = verdicts.judge(verdicts.accuracies(study))
    assert {fact.number: verdicts.verdict(claims) for fact, claims in judged.items()} == dict.fromkeys(
        range(1, 9), "shown"
    )


def test_a_study_in_which_nothing_helps_shows_no_fact(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    judged = verdicts.judge(verdicts.accuracies([seed_results(seed) for seed in range(5)]))
    assert "shown" not in {verdicts.verdict(claims) for claims in judged.values()}

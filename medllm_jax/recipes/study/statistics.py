"""Figures of a study with their intervals: by a bootstrap over seeds, and within each seed over its diseases.

A seed is another world, another model and another order of data, so that seeds are what a result must hold over;
questions about one disease go right and wrong together. Everything is paired: a resample takes the same seeds and
diseases for every model and condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medllm_jax.evaluation.significance import Estimate, Interval
from medllm_jax.recipes.study.results import WRITTEN, SeedResults

RESAMPLES = 10_000
_TAILS = (0.025, 0.975)

Shares = Callable[[str, str], np.ndarray]
# A figure of each seed, float64 [..., seeds], from the accuracies of a model under a condition.
Figure = Callable[[Shares], np.ndarray]


class Asked(NamedTuple):
    """Whose accuracy, under which condition."""

    model: str
    condition: str


@dataclass(frozen=True)
class Accuracies:
    """The accuracies of some models in some conditions, in each seed, and in resamples of seeds and diseases.

    places: which column is whose. found: float64 [columns, seeds]; drawn: float64 [columns, resamples, seeds].
    """

    places: dict[Asked, int]
    found: np.ndarray
    drawn: np.ndarray

    @classmethod
    def of(
        cls, study: Sequence[SeedResults], exam: str, asked: Sequence[Asked], reading: str = WRITTEN, seed: int = 0
    ) -> "Accuracies":
        """Of what was asked in an exam; seed: of the resamples."""
        rng = np.random.default_rng(seed)
        counts = [_counts(results, exam, asked, reading) for results in study]
        found = [_shares(of_seed.sum(axis=0)) for of_seed in counts]
        chosen = rng.integers(len(study), size=(RESAMPLES, len(study)))
        drawn = np.empty((len(asked), *chosen.shape))
        for number, of_seed in enumerate(counts):
            cases = len(of_seed)
            places = np.nonzero(chosen == number)
            times = rng.multinomial(cases, np.full(cases, 1 / cases), size=len(places[0]))
            drawn[:, *places] = _shares(times @ of_seed).T
        return cls({one: place for place, one in enumerate(asked)}, np.stack(found, axis=1), drawn)

    def in_each_seed(self, figure: Figure) -> np.ndarray:
        """float64 [seeds]."""
        return figure(lambda model, condition: self.found[self.places[Asked(model, condition)]])

    def estimate(self, figure: Figure) -> Estimate:
        """The mean over the seeds, with the 95 % interval of the resamples' means."""
        means = figure(lambda model, condition: self.drawn[self.places[Asked(model, condition)]]).mean(axis=-1)
        low, high = np.quantile(means, _TAILS)
        return Estimate(float(self.in_each_seed(figure).mean()), Interval(float(low), float(high)))


def _counts(results: SeedResults, exam: str, asked: Sequence[Asked], reading: str) -> np.ndarray:
    """float64 [diseases, 1 + asked]: of each disease its questions, and how many of them are right."""
    cases = np.array(results.exams[exam].cases)
    columns = [np.ones(len(cases)), *(results.right(one.model, exam, one.condition, reading) for one in asked)]
    return np.stack([np.bincount(cases, weights=column) for column in columns], axis=1)


def _shares(counts: np.ndarray) -> np.ndarray:
    """[..., 1 + asked] -> [..., asked]."""
    return counts[..., 1:] / counts[..., :1]


# --- figures -----------------------------------------------------------------------------------------------------


def accuracy(model: str, condition: str) -> Figure:
    return lambda of: of(model, condition)


def drop(model: str) -> Figure:
    """What explaining costs, in shares of all questions."""
    return lambda of: of(model, "answer_only") - of(model, "explain")


def share_lost(model: str) -> Figure:
    """What explaining costs, as a share of what was right without."""
    return lambda of: 1 - of(model, "explain") / of(model, "answer_only")


def less(one: Figure, other: Figure) -> Figure:
    """One figure minus another."""
    return lambda of: one(of) - other(of)


def minus(figure: Figure) -> Figure:
    return lambda of: -figure(of)

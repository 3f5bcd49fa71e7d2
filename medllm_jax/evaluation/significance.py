"""How sure a score is, and whether two scores differ: intervals by bootstrap, McNemar's test, and the drop in parts.

Questions are resampled within their year and section (strata), and those about one case together (clusters): exams are
made so, and answers within a case go wrong together.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from medllm_jax.errors import UserError
from medllm_jax.evaluation.grading import Grade

_CONFIDENCE = 0.95
_LISTED = 3
_MOST_DRAWN = 2**23  # numbers of a bootstrap that are in memory at a time


class Interval(NamedTuple):
    """A 95 % interval, by the percentiles of the bootstrap."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value and its interval: where another exam of the same kind could have put it."""

    value: float
    interval: Interval


def accuracy(grades: Sequence[Grade], *, weighted: bool = True, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The share of points earned, or with `weighted` False of questions answered right; in [0, 1]."""
    earned = [g.points if weighted else float(g.correct) for g in grades]
    return _ratio(grades, earned, _weights(grades, weighted), resamples, seed)


class Part(NamedTuple):
    """Some questions, and their points."""

    questions: int
    points: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two results on the same questions.

    both, only_before, only_after, neither: questions right in which of them. p_value: of McNemar's exact test,
    two-sided. difference, weighted_difference: after minus before, of the shares of questions and of points.
    unparseable, wrong_count, wrong_answer: what was right before and is lost, by what stands there now; gained: what is
    right now and was not. The net change is gained minus lost, in questions and in points.
    """

    both: int
    only_before: int
    only_after: int
    neither: int
    p_value: float
    difference: Estimate
    weighted_difference: Estimate
    unparseable: Part
    wrong_count: Part
    wrong_answer: Part
    gained: Part

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for name, value in found.items():
            if isinstance(value, Estimate):
                found[name] = {"value": value.value, "low": value.interval.low, "high": value.interval.high}
            elif isinstance(value, Part):
                found[name] = value._asdict()
        return found


def compare(before: Sequence[Grade], after: Sequence[Grade], *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compares two models, or two prompts of one model.

    Raises:
      UserError: they are not of the same questions.
    """
    later = {grade.id: grade for grade in after}
    if unpaired := sorted({g.id for g in before} ^ later.keys()):
        named = ", ".join(unpaired[:_LISTED])
        raise UserError(
            f"two results are of different questions, {len(unpaired)} of them in one only ({named}, ...): "
            "compare results of one exam, whole"
        )
    pairs = [(grade, later[grade.id]) for grade in before]
    cells = defaultdict(int)
    for first, second in pairs:
        cells[first.correct, second.correct] += 1
    lost = [second for first, second in pairs if first.correct and not second.correct]
    gained = [second for first, second in pairs if second.correct and not first.correct]
    reasons = {"unparseable": [], "wrong_count": [], "wrong_answer": []}
    for grade in lost:
        reasons["wrong_answer" if grade.problem is None else _reason(grade.problem)].append(grade)
    changes = [float(second.correct) - float(first.correct) for first, second in pairs]
    points = [float(second.points - first.points) for first, second in pairs]
    return Comparison(
        both=cells[True, True],
        only_before=cells[True, False],
        only_after=cells[False, True],
        neither=cells[False, False],
        p_value=mcnemar(cells[True, False], cells[False, True]),
        difference=_ratio(before, changes, _weights(before, False), resamples, seed),
        weighted_difference=_ratio(before, points, _weights(before, True), resamples, seed),
        **{name: _part(found) for name, found in reasons.items()},
        gained=_part(gained),
    )


def mcnemar(only_before: int, only_after: int) -> float:
    """The exact two-sided p-value: twice the smaller tail of a fair coin thrown once for each discordant question."""
    n, smaller = only_before + only_after, min(only_before, only_after)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(smaller + 1)]
    top = max(logs)
    tail = math.log(math.fsum(math.exp(each - top) for each in logs)) + top - n * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def _reason(problem: str) -> str:
    return "wrong_count" if problem == "wrong_count" else "unparseable"


def _part(grades: Sequence[Grade]) -> Part:
    return Part(len(grades), sum(grade.max_points for grade in grades))


def _weights(grades: Sequence[Grade], weighted: bool) -> list[float]:
    return [float(g.max_points) if weighted else 1.0 for g in grades]


def _ratio(
    grades: Sequence[Grade], numerators: Sequence[float], denominators: Sequence[float], resamples: int, seed: int
) -> Estimate:
    """Sum of numerators over sum of denominators, with its interval over resampled clusters of each stratum."""
    clusters: dict[Any, dict[Any, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    for grade, numerator, denominator in zip(grades, numerators, denominators, strict=True):
        stratum = (grade.year or 0, grade.section)
        clusters[stratum][grade.case or grade.id] += (numerator, denominator)
    strata = [np.stack(list(clusters[stratum].values())) for stratum in sorted(clusters)]
    sizes = tuple(map(len, strata))
    few = sum(sizes) * resamples <= _MOST_DRAWN
    whole = sum((values.sum(axis=0) for values in strata), np.zeros(2))
    sums = np.zeros((resamples, 2))
    for stratum, part, times in (_kept if few else _resampled)(sizes, resamples, seed):
        sums[part] += times @ strata[stratum]
    # A resample without a point in it (tiny exams) says nothing.
    ratios = sums[sums[:, 1] > 0]
    ratios = ratios[:, 0] / ratios[:, 1]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail]) if len(ratios) else (0.0, 0.0)
    return Estimate(float(whole[0] / whole[1]) if whole[1] else 0.0, Interval(float(low), float(high)))


class _Drawn(NamedTuple):
    """A part of the resamples of one stratum; times: float64 [those resamples, clusters], how often each was drawn."""

    stratum: int
    part: slice
    times: np.ndarray


def _resampled(sizes: tuple[int, ...], resamples: int, seed: int) -> Iterator[_Drawn]:
    """All resamples of all strata, of so many clusters each, in parts that memory holds."""
    rng = np.random.default_rng(seed)
    for stratum, size in enumerate(sizes):
        step = max(1, _MOST_DRAWN // size)
        for first in range(0, resamples, step):
            part = slice(first, min(first + step, resamples))
            times = rng.multinomial(size, np.full(size, 1 / size), size=part.stop - first)
            yield _Drawn(stratum, part, times.astype(np.float64))


@functools.lru_cache(maxsize=4)  # an exam has one shape, and many estimates
def _kept(sizes: tuple[int, ...], resamples: int, seed: int) -> list[_Drawn]:
    return list(_resampled(sizes, resamples, seed))

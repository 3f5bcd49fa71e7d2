"""Says in a sentence what came of runs and exams, no surer than the numbers are."""

from collections.abc import Sequence
from typing import NamedTuple

from medllm_jax.evaluation.significance import Estimate
from medllm_jax.report.collect import RecordedRun
from medllm_jax.report.scored import CONDITION_NAMES, Scored

_NAMED = 4  # models that a sentence names


class Headline(NamedTuple):
    """A sentence, and the intervals of its numbers ("" where it has none)."""

    sentence: str
    intervals: str = ""


def of_page(runs: Sequence[RecordedRun], exams: Sequence[Sequence[Scored]]) -> Headline:
    """The result of the one exam; of several, how many there are, for each has a headline of its own."""
    if len(exams) == 1:
        return of_exam(exams[0])
    if exams:
        models = len({scored.name for exam in exams for scored in exam})
        return Headline(f"{_count(models, 'model')} on {len(exams)} exams")
    return Headline(_told([_of_run(run) for run in runs], "run") or "No exam has been answered yet")


def of_exam(models: Sequence[Scored]) -> Headline:
    """The best model with an explanation and what explaining costs it, then what it costs the others."""
    explained = [each for each in models if each.change is not None]
    return _of_change(explained, len(models)) if explained else _of_accuracy(models)


def _of_change(models: Sequence[Scored], among: int) -> Headline:
    lead = max(models, key=lambda each: each.by_questions["explain"].value)
    n = lead.summaries["explain"].n
    told = [
        f"{lead.name} answers {_percent(lead.by_questions['explain'])} % of {_count(n, 'question')} right with an "
        f"explanation, {_than_without(_difference(lead))}"
    ]
    for each in models:
        if each is not lead:
            of = each.summaries["explain"].n
            others = "" if of == n else f" of {_count(of, 'question')}"
            told.append(f"{each.name} {_loses(_difference(each))}{others}")
    intervals = [
        f"{each.name} {_between(each.by_questions['explain'])} % with an explanation, "
        f"{_between(_difference(each), '+')} by explaining"
        for each in _first(lead, models)
    ]
    left_out = among - len(models)
    asked = f"; {_count(left_out, 'model')} asked in one way only" if left_out else ""
    return Headline(_told(told, "model") + asked, "95 % intervals: " + "; ".join(intervals))


def _of_accuracy(models: Sequence[Scored]) -> Headline:
    condition = max(CONDITION_NAMES, key=lambda name: sum(name in each.summaries for each in models))
    asked = [each for each in models if condition in each.summaries]
    lead = max(asked, key=lambda each: each.by_questions[condition].value)
    n = lead.summaries[condition].n
    how = {"answer_only": "without explaining", "explain": "with an explanation"}[condition]
    right = f"{_percent(lead.by_questions[condition])} % of {_count(n, 'question')} right {how}"
    told = [f"{lead.name} answers {right}"]
    for each in asked:
        if each is not lead:
            of = each.summaries[condition].n
            others = "" if of == n else f" of {_count(of, 'question')}"
            told.append(f"{each.name} {_percent(each.by_questions[condition])} %{others}")
    intervals = [f"{each.name} {_between(each.by_questions[condition])} %" for each in _first(lead, asked)]
    left_out = len(models) - len(asked)
    other = f"; {_count(left_out, 'model')} asked otherwise" if left_out else ""
    return Headline(_told(told, "model") + other, "95 % intervals: " + "; ".join(intervals))


def _of_run(run: RecordedRun) -> str:
    if not run.metrics:
        return f"{run.name} has taken no step yet"
    last = run.metrics[-1]
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    steps = f"{run.name} has taken {last['step']:,} of {run.config.steps or 0:,} steps"
    return f"{steps}, loss {losses[0]:.2f} to {losses[-1]:.2f}" if losses else steps


# --- words -----------------------------------------------------------------------------------------------------------


def _difference(each: Scored) -> Estimate:
    assert each.change is not None
    return each.change.difference


def _than_without(change: Estimate) -> str:
    points = f"{abs(100 * change.value):.1f}"
    if points == "0.0":
        return f"as many as without{_chance(change)}"
    return f"{points} percentage points {'fewer' if change.value < 0 else 'more'} than without{_chance(change)}"


def _loses(change: Estimate) -> str:
    points = f"{abs(100 * change.value):.1f}"
    verb = "loses" if change.value < 0 else "gains"
    return f"{'loses none' if points == '0.0' else f'{verb} {points}'}{_chance(change)}"


def _chance(change: Estimate) -> str:
    """Said of a change whose interval holds none at all."""
    low, high = change.interval
    return " (may be chance)" if low <= 0 <= high and low < high else ""


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f}"


def _between(found: Estimate, sign: str = "") -> str:
    low, high = (f"{100 * end:{sign}.1f}".replace("-", "\u2212") for end in found.interval)
    return f"{low} to {high}"


def _first(lead: Scored, models: Sequence[Scored]) -> list[Scored]:
    return [lead, *(each for each in models if each is not lead)][:_NAMED]


def _told(told: Sequence[str], unit: str) -> str:
    more = len(told) - _NAMED
    return "; ".join(told[:_NAMED]) + (f"; and {_count(more, f'more {unit}')}" if more > 0 else "")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"

"""Which pictures a page shows, and what they are called."""

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from medllm_jax.report import plots
from medllm_jax.report.collect import RecordedRun
from medllm_jax.report.scored import CONDITION_NAMES, Scored

_SLUG = 60
# Metric -> what it is called, and whether its axis is logarithmic.
_METRICS = {
    "loss": ("loss", False),
    "nll": ("NLL of the chosen responses, nats a token", False),
    "rewards/margins": ("reward margin", False),
    "rewards/chosen": ("reward of the chosen responses (below zero they have lost likelihood)", False),
    "rewards/rejected": ("reward of the rejected responses", False),
    "rewards/accuracies": ("share of pairs with the chosen response ahead", False),
    "entropy": ("entropy on chosen tokens, nats", False),
    "grad_norm": ("gradient norm", True),
    "learning_rate": ("learning rate", False),
    "tokens_per_second": ("tokens a second", False),
    "mfu": ("MFU: share of the chips' peak that the model's FLOPs take", False),
    "data_wait": ("share of time spent waiting for data", False),
    "goodput": ("goodput: share of the time since the first start that went into steps", False),
    "likelihood_weighted_accuracy": ("likeliest letters right, by points (no exam score)", False),
}


class Picture(NamedTuple):
    """A figure of the page; `file` is its name without its ending."""

    file: str
    title: str
    alt: str
    drawn: plots.Drawn

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.drawn.svg).decode()

    @property
    def size(self) -> tuple[int, int]:
        return plots.size_of(self.drawn.png)


def of_runs(runs: Sequence[RecordedRun]) -> Iterator[Picture]:
    """The metrics of all runs, each in one picture."""
    for metric, (title, log) in _METRICS.items():
        found = []
        for number, run in enumerate(runs):
            for name, held_out in ((metric, False), (f"held_out/{metric}", True)):
                points = [(line["step"], line[name]) for line in run.metrics if name in line]
                if points:
                    steps, values = np.array(points, float).T
                    found.append(plots.Curve(run.name, number, steps, values, held_out))
        if found:
            ends = "; ".join(
                f"{c.run}{' (held out)' if c.held_out else ''}: {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in found
            )
            if any(curve.held_out for curve in found):
                title += "; dots: held out"
            yield Picture(metric.replace("/", "-"), title, f"{title} over steps. {ends}", plots.curves(found, log=log))


def of_exam(name: str, number: int, models: Sequence[Scored]) -> Iterator[Picture]:
    """Accuracies, and what explaining costs, of all models on the nth exam of a page."""
    # A name of a file: short, and of this exam alone, though another differs in its Japanese part.
    slug = "".join(c if c.isalnum() and c.isascii() else "-" for c in name[:_SLUG]) + (f"-{number}" if number else "")
    spread = {
        each.name: {c: (e.value, e.interval.low, e.interval.high) for c, e in each.by_points.items()} for each in models
    }
    values = "; ".join(
        f"{each.name}: {', '.join(f'{CONDITION_NAMES[c]} {e.value:.3f}' for c, e in each.by_points.items())}"
        for each in models
    )
    title = "accuracy under both conditions, with 95 % intervals"
    yield Picture(f"accuracy-{slug}", title, f"Accuracy. {values}", plots.conditions(spread))
    changes = {each.name: each.change for each in models if each.change is not None}
    if changes:
        told = "; ".join(f"{model}: {found.weighted_difference.value:+.3f}" for model, found in changes.items())
        title = "what explaining costs, and why"
        drops = plots.drops({each.name: _shares(each) for each in models if each.change is not None})
        yield Picture(f"drop-{slug}", title, f"Differences by points. {told}", drops)


def _shares(model: Scored) -> dict[str, float]:
    names, of = ("unparseable", "wrong_count", "wrong_answer", "gained"), model.summaries["explain"].max_points
    return {name: getattr(model.change, name).points / max(of, 1) for name in names}

"""A study's pictures."""

from collections.abc import Sequence

import numpy as np

from medllm_jax.recipes.demo.stages import CONDITIONS
from medllm_jax.recipes.study.results import A_WRONG_CHOICE, NO_CHOICE, SeedResults
from medllm_jax.recipes.study.variants import MODELS, STAGES
from medllm_jax.report.plots import COLOURS, new_figure, patch, png

_GAINED = "gained"
_PARTS = dict(zip([*NO_CHOICE.values(), A_WRONG_CHOICE, _GAINED], [COLOURS[i] for i in (4, 5, 6, 1, 2)], strict=True))


def stages(study: Sequence[SeedResults], exam: str, reading: str) -> bytes:
    """Accuracy by stage and condition; a point is a seed, and a line goes through the means."""
    figure, axes = new_figure(height=3.0)
    for condition, colour, mark, shift in zip(CONDITIONS, COLOURS, "os", (-0.06, 0.06), strict=False):
        found = np.array(
            [[results.right(model, exam, condition, reading).mean() for results in study] for model in STAGES]
        )
        at = np.arange(len(STAGES)) + shift
        label = condition.replace("_", " ").replace("explain", "with explanation")
        axes.plot(at, found.mean(axis=1), "-", color=colour, linewidth=1.5, marker=mark, markersize=6, label=label)
        axes.plot(at, found, mark, color=colour, markersize=3, markerfacecolor="white", linewidth=0)
    axes.set_xticks(range(len(STAGES)), [MODELS[model] for model in STAGES])
    axes.set_ylabel("accuracy; open: one seed", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    return png(figure)


def losses(study: Sequence[SeedResults], exam: str) -> bytes:
    """The drop in parts: of every model, shares of all questions that are lost and gained, over all seeds."""
    figure, axes = new_figure(height=0.9 + 0.3 * len(MODELS))
    for place, model in enumerate(MODELS):
        parts = np.mean([_parts(results, model, exam) for results in study], axis=0)
        left = 0.0
        for part, (name, colour) in zip(parts, _PARTS.items(), strict=True):
            lost = name != _GAINED
            axes.barh(place, -part if lost else part, left=left if lost else 0, color=colour, height=0.6)
            left -= part if lost else 0
        axes.plot(left + parts[-1], place, "D", color="black", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(MODELS)), list(MODELS.values()))
    axes.set_ylim(len(MODELS) - 0.5, -0.5)
    axes.set_xlabel("share of all questions; diamond: the whole difference", fontsize=7)
    handles = [patch(colour) for colour in _PARTS.values()]
    figure.legend(
        handles, list(_PARTS), ncols=3, loc="outside upper center", fontsize=6.5, frameon=False, columnspacing=0.9
    )
    return png(figure)


def _parts(results: SeedResults, model: str, exam: str) -> list[float]:
    """In the order of _PARTS."""
    found = results.lost(model, exam) | {_GAINED: results.gained(model, exam)}
    return [float(found[name].mean()) for name in _PARTS]


def margins(study: Sequence[SeedResults], models: Sequence[str]) -> bytes:
    """The reward margin over the steps of preference training; a thin line is a seed, the thick one their mean."""
    figure, axes = new_figure(height=3.0)
    for model, colour in zip(models, COLOURS, strict=False):
        lines = [np.array(results.curves[model]["margins"]) for results in study]
        for line in lines:
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(lines[0][:, 0], np.mean([line[:, 1] for line in lines], axis=0), color=colour, label=MODELS[model])
    axes.set_xlabel("step")
    axes.set_ylabel("reward margin, nats", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return png(figure)

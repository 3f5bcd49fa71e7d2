"""Draws the pictures of a report: small, one question each, readable in print and without colour vision."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Okabe and Ito's colours, which stay apart for colour-blind readers; the line styles do so in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_REASONS = {"unparseable": "#E69F00", "wrong_count": "#56B4E9", "wrong_answer": "#D55E00", "gained": "#009E73"}
_POINTS = 300  # of a curve: as many as a picture of this size shows
_DPI = 160
_SIZE = (4.6, 2.7)  # inches


class Curve(NamedTuple):
    """A metric of a run: steps and values, both [N]; `held_out` is drawn as dots."""

    run: str
    number: int
    steps: np.ndarray
    values: np.ndarray
    held_out: bool = False


def curves(curves: Sequence[Curve], *, log: bool = False) -> bytes:
    """A metric over steps: a line through the means of neighbouring steps, in a band from the least to the most."""
    figure, axes = new_figure()
    for curve in curves:
        colour, style = COLOURS[curve.number % len(COLOURS)], _STYLES[curve.number % len(_STYLES)]
        if curve.held_out:
            axes.plot(curve.steps, curve.values, "o", color=colour, markersize=3.5, markerfacecolor="white")
            continue
        steps, mean, low, high = _thinned(curve.steps, curve.values)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, style, color=colour, linewidth=1.4)
    if log and all(np.all(curve.values > 0) for curve in curves):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    return png(figure)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean step, mean, least and greatest value of at most `_POINTS` runs of neighbours."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    return tuple(
        np.array([reduce(of[part]) for part in parts])
        for reduce, of in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, values))
    )


def conditions(rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> bytes:
    """Accuracy of each model under each condition, with its interval: name -> condition -> (value, low, high)."""
    figure, axes = new_figure(height=0.9 + 0.5 * len(rows))
    marks = {"answer_only": ("o", "white"), "explain": ("s", "fill")}
    for place, found in enumerate(rows.values()):
        for shift, (condition, (value, low, high)) in zip((-0.13, 0.13), found.items(), strict=False):
            shape, face = marks[condition]
            colour = COLOURS[0] if condition == "answer_only" else COLOURS[1]
            axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.6)
            face = colour if face == "fill" else face
            axes.plot(value, place + shift, shape, color=colour, markerfacecolor=face, markersize=6)
    _name_rows(axes, list(rows))
    axes.set_xlabel("accuracy by points; round: answer only, square: with explanation", fontsize=7)
    return png(figure)


def drops(rows: Mapping[str, Mapping[str, float]]) -> bytes:
    """The change when a model must explain, in shares of points: lost by reason at the left, gained at the right."""
    figure, axes = new_figure(height=1.1 + 0.42 * len(rows))
    for place, parts in enumerate(rows.values()):
        left = 0.0
        for reason in ("unparseable", "wrong_count", "wrong_answer"):
            axes.barh(place, -parts[reason], left=left, color=_REASONS[reason], height=0.6, edgecolor="white")
            left -= parts[reason]
        axes.barh(place, parts["gained"], color=_REASONS["gained"], height=0.6, edgecolor="white")
        axes.plot(left + parts["gained"], place, "D", color="black", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    _name_rows(axes, list(rows))
    axes.set_xlabel("share of all points; diamond: the whole difference", fontsize=7)
    handles = [patch(colour) for colour in _REASONS.values()]
    names = [reason.replace("_", " ") for reason in _REASONS]
    figure.legend(handles, names, ncols=4, loc="outside upper center", fontsize=6.5, frameon=False, columnspacing=0.9)
    return png(figure)


def _name_rows(axes, names: list[str]) -> None:
    shown = [name if name.isascii() else f"model {place + 1}" for place, name in enumerate(names)]
    axes.set_yticks(range(len(names)), [name if len(name) <= 24 else f"...{name[-22:]}" for name in shown])
    axes.set_ylim(len(names) - 0.5, -0.5)


def patch(colour: str):
    """For a legend."""
    from matplotlib.patches import Patch

    return Patch(color=colour)


def new_figure(height: float = _SIZE[1]):
    """A figure in the report's style, so many inches high, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], min(height, 9.0)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5)
    axes.xaxis.label.set_fontsize(8)
    return figure, axes


def png(figure) -> bytes:
    """The figure as a file's content."""
    with io.BytesIO() as content:
        figure.savefig(content, format="png")
        return content.getvalue()


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in CSS pixels of a picture made here."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    scale = _DPI / 96
    return math.ceil(width / scale), math.ceil(height / scale)

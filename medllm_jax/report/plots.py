"""Draws the pictures of a report: one question each, readable on a phone, in print and without colour vision.

A picture is an SVG whose words stay words, so that the reader's own fonts write them in any language, and a PNG for
slides. The marks of a legend are told apart by shape or line as well as by colour.
"""

import functools
import io
import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's colours, which stay apart for colour-blind readers; the line styles do so in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_REASONS = {"unparseable": "#E69F00", "wrong_count": "#56B4E9", "wrong_answer": "#D55E00", "gained": "#009E73"}
_REASON_NAMES = {"unparseable": "lost: not readable", "wrong_count": "lost: wrong count"}
_REASON_NAMES |= {"wrong_answer": "lost: wrong answer", "gained": "gained"}
_POINTS = 300  # of a curve: as many as a picture of this size shows
_DPI = 160
_SIZE = (4.6, 2.7)  # inches
# A page's picture is narrower than a phone's page, so that its text is not shrunk there: its 9.5 points are 12 pixels.
_PAGE_SIZE, _TEXT = (3.9, 2.6), 9.5
_ROUND = (1, 2, 5, 10)  # a step between ticks is one of these times a power of ten
_MOST_OF_A_NAME = 44  # in widths of a Latin letter; a Japanese one has two
_LEAST_RANGE = 10.0  # percentage points of an accuracy axis, so that small differences look small
_JAPANESE_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "Meiryo", "BIZ UDGothic", "MS Gothic"),
    *("IPAexGothic", "IPAGothic", "TakaoGothic", "VL Gothic", "Source Han Sans JP", "Noto Serif CJK JP"),
)


class Curve(NamedTuple):
    """A metric of a run: steps and values, both [N]; `held_out` is drawn as dots."""

    run: str
    number: int
    steps: np.ndarray
    values: np.ndarray
    held_out: bool = False


class Drawn(NamedTuple):
    """One picture twice: for a page, and for programs that take no SVG."""

    svg: bytes
    png: bytes


def style_of(number: int) -> tuple[str, str]:
    """Colour and CSS's name for the line of the nth run, for a legend beside the pictures."""
    return COLOURS[number % len(COLOURS)], ("solid", "dashed", "dashed", "dotted")[number % len(_STYLES)]


def curves(curves: Sequence[Curve], *, log: bool = False) -> Drawn:
    """A metric over steps: a line through the means of neighbouring steps, in a band from the least to the most."""
    figure, axes = _page_figure()
    for curve in curves:
        colour, style = COLOURS[curve.number % len(COLOURS)], _STYLES[curve.number % len(_STYLES)]
        if curve.held_out:
            axes.plot(curve.steps, curve.values, "o", color=colour, markersize=3.5, markerfacecolor="white")
            continue
        steps, mean, low, high = _thinned(curve.steps, curve.values)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, style, color=colour, linewidth=1.4)
    if log and all(np.all(curve.values > 0) for curve in curves):
        _log_ticks(axes)
    else:
        _between_ticks(axes.yaxis, *axes.dataLim.intervaly)
    _between_ticks(axes.xaxis, min(curve.steps[0] for curve in curves), axes.dataLim.intervalx[1])
    axes.set_xlabel("step")
    return _drawn(figure)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean step, mean, least and greatest value of at most `_POINTS` runs of neighbours."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    return tuple(
        np.array([reduce(of[part]) for part in parts])
        for reduce, of in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, values))
    )


def conditions(rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Drawn:
    """Accuracy of each model under each condition, with its interval: name -> condition -> (value, low, high)."""
    from matplotlib.lines import Line2D

    figure, axes = _page_figure(height=1.15 + 0.62 * len(rows))
    marks: dict[str, dict[str, Any]] = {
        "answer_only": {"marker": "o", "color": COLOURS[0], "markerfacecolor": "white"},
        "explain": {"marker": "s", "color": COLOURS[1]},
    }
    reached = []
    for place, found in enumerate(rows.values()):
        for condition, (value, low, high) in found.items():
            at, mark = place + {"answer_only": -0.04, "explain": 0.22}[condition], marks[condition]
            axes.plot([100 * low, 100 * high], [at, at], color=mark["color"], linewidth=1.6)
            axes.plot(100 * value, at, markersize=6, **mark)
            reached += [100 * low, 100 * high, 100 * value]
    replaced = _name_rows(axes, list(rows))
    low, high = min(reached, default=0), max(reached, default=100)
    spare = max(_LEAST_RANGE - (high - low), 0) / 2
    _between_ticks(axes.xaxis, max(low - spare, 0), min(high + spare, 100))
    axes.set_xlabel("accuracy by points, %")
    names = {"answer_only": "answer only", "explain": "with explanation"}
    used = [condition for condition in marks if any(condition in found for found in rows.values())]
    handles = [Line2D([], [], linewidth=1.6, markersize=6, **marks[condition]) for condition in used]
    _legend(figure, handles, [names[condition] for condition in used])
    return _drawn(figure, replaced)


def drops(rows: Mapping[str, Mapping[str, float]]) -> Drawn:
    """The change when a model must explain, in shares of points: lost by reason at the left, gained at the right."""
    from matplotlib.lines import Line2D

    figure, axes = _page_figure(height=1.55 + 0.62 * len(rows))
    ends = [0.0]
    for place, parts in enumerate(rows.values()):
        left, at = 0.0, place + 0.12
        for reason in ("unparseable", "wrong_count", "wrong_answer"):
            lost = 100 * parts[reason]
            axes.barh(at, -lost, left=left, color=_REASONS[reason], height=0.4, edgecolor="white")
            left -= lost
        gained = 100 * parts["gained"]
        axes.barh(at, gained, color=_REASONS["gained"], height=0.4, edgecolor="white")
        axes.plot(left + gained, at, "D", color="black", markersize=4)
        ends += [left, gained]
    axes.axvline(0, color="black", linewidth=0.8)
    replaced = _name_rows(axes, list(rows))
    spare = max(_LEAST_RANGE - (max(ends) - min(ends)), 0) / 2
    _between_ticks(axes.xaxis, min(ends) - spare, max(ends) + spare)
    axes.set_xlabel("percentage points")
    found = [reason for reason in _REASONS if any(parts[reason] for parts in rows.values())]
    handles: list[Any] = [patch(_REASONS[reason]) for reason in found]
    handles.append(Line2D([], [], linewidth=0, marker="D", color="black", markersize=4))
    _legend(figure, handles, [*(_REASON_NAMES[reason] for reason in found), "in all"])
    return _drawn(figure, replaced)


# --- axes ------------------------------------------------------------------------------------------------------------


def _legend(figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    style = {"ncols": 2, "fontsize": _TEXT, "frameon": False, "columnspacing": 1.0, "handlelength": 1.4}
    figure.legend(handles, names, loc="outside upper left", **style)


def _name_rows(axes, names: list[str]) -> dict[Any, str]:
    """Writes a name above each row, which leaves the row its width; returns what stands for a name in a PNG.

    Nothing does where a font of this machine has the letters.
    """
    japanese = _japanese_font()
    replaced = {}
    for place, name in enumerate(names):
        where = {"transform": axes.get_yaxis_transform(), "va": "bottom", "fontsize": _TEXT + 0.5}
        family = ["sans-serif", *([japanese] if japanese else [])]
        text = axes.text(0.0, place - 0.24, _shortened(name), family=family, in_layout=False, parse_math=False, **where)
        if not name.isascii() and japanese is None:
            replaced[text] = f"model {place + 1}"
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.5, -0.65)
    return replaced


def _shortened(name: str) -> str:
    """The end of a name, as much as a picture is wide: ends tell the folders of runs apart."""
    width, kept = 0, ""
    for letter in reversed(name):
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width > _MOST_OF_A_NAME:
            return f"...{kept}"
        kept = letter + kept
    return name


@functools.cache
def _japanese_font() -> str | None:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return next((name for name in _JAPANESE_FONTS if name in installed), None)


def _between_ticks(axis, low: float, high: float) -> None:
    """An axis from one round number to another, around what is shown."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    ticks = MaxNLocator(nbins=6, steps=_ROUND).tick_values(low, high)
    margin = (ticks[-1] - ticks[0]) / 60  # marks at an end are not cut
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_view_interval(ticks[0] - margin, ticks[-1] + margin, ignore=True)


def _log_ticks(axes) -> None:
    """Powers of ten, and twice and five times as much where they are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if math.log10(high / low) > 3 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def number(value: float) -> str:
    """A round number as people write it: 20,000 and 0.05; 2M and 5e-6 where zeros would be counted."""
    size = abs(value)
    if 1e5 <= size < 1e9:
        written = f"{value / 1e6:.10g}M" if size >= 1e6 else f"{value / 1e3:.10g}k"
    elif value and not 1e-4 <= size < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        written = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        written = f"{round(value, 10):,.10g}"
    return written.replace("-", "\u2212")


# --- figures ---------------------------------------------------------------------------------------------------------


def patch(colour: str):
    """For a legend."""
    from matplotlib.patches import Patch

    return Patch(color=colour)


def new_figure(height: float = _SIZE[1], *, width: float = _SIZE[0], ticks: float = 7.5, label: float = 8):
    """A figure in the project's style, in inches, and its axes, whose text has these sizes in points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, min(height, 9.0)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=ticks)
    axes.xaxis.label.set_fontsize(label)
    return figure, axes


def _page_figure(height: float = _PAGE_SIZE[1]):
    return new_figure(height, width=_PAGE_SIZE[0], ticks=_TEXT, label=_TEXT)


def png(figure) -> bytes:
    """The figure as a file's content."""
    with io.BytesIO() as content:
        figure.savefig(content, format="png")
        return content.getvalue()


def _drawn(figure, replaced: Mapping[Any, str] | None = None) -> Drawn:
    """Both forms; `replaced` holds texts whose letters no font of this machine has, and what the PNG says instead."""
    from matplotlib import rc_context

    # Equal pictures are equal files: no date, and names within them that are no random ones.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "medllm_jax"}
    with rc_context(settings), io.BytesIO() as content, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts have it
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        svg = content.getvalue()
    for text, instead in (replaced or {}).items():
        text.set_text(instead)
    return Drawn(svg, png(figure))


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in CSS pixels of a picture made here."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    scale = _DPI / 96
    return math.ceil(width / scale), math.ceil(height / scale)

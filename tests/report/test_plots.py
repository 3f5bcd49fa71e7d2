"""Pictures have round numbers on their axes and words that any reader's fonts can write."""

import re

import numpy as np
import pytest

from medllm_jax.report import plots


def words(svg):
    return [re.sub("<[^>]*>", "", found) for found in re.findall(r"<text.*?</text>", svg.decode(), re.S)]


def numbers(svg):
    found = (re.fullmatch("[\u22120-9.,e]+", word) for word in words(svg))
    return [float(each[0].replace("\u2212", "-").replace(",", "")) for each in found if each]


def is_round(value):
    """At most two digits count, as a person would read them from a ruler: 0.05, 20,000, 1.5."""
    return value == 0 or len(f"{abs(value):.10e}".partition("e")[0].replace(".", "").rstrip("0")) <= 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 8.3), (0.4, 0.61), (1e-6, 7e-6), (5507, 7113), (-0.197, 0.001), (0, 3e-3), (2.0, 2.0)]
)
def test_axes_have_round_numbers(low, high, log):
    curve = plots.Curve("a", 0, np.arange(1, 461), np.linspace(low, high, 460))
    found = numbers(plots.curves([curve], log=log).svg)
    assert len(found) >= 6 and all(map(is_round, found))


@pytest.mark.parametrize(("low", "high"), [(0.27, 0.98), (0.93, 0.931), (0, 0), (1, 1)])
def test_accuracies_are_percent_of_a_range_that_shows_small_differences_as_small(low, high):
    drawn = plots.conditions({"m": {"explain": (low, low, high)}})
    found = numbers(drawn.svg)
    assert all(map(is_round, (each for each in found if each < 100))) and max(found) - min(found) >= 4
    assert 0 <= min(found) <= 100 * low and 100 * high <= max(found) <= 100


@pytest.mark.parametrize(
    ("value", "written"),
    [
        *((0, "0"), (0.1 + 0.2, "0.3"), (20_000, "20,000"), (200_000, "200k"), (-2_500_000, "\u22122.5M")),
        *((-0.05, "\u22120.05"), (5e-6, "5e\u22126"), (2.5e9, "2.5e9")),
    ],
)
def test_numbers_are_written_as_people_do(value, written):
    assert plots.number(value) == written


def test_names_are_words_of_the_page_and_boxes_nowhere(monkeypatch):
    rows = {name: {"answer_only": (0.5, 0.4, 0.6)} for name in ("基盤モデル", "base $x_1$ <&>")}
    monkeypatch.setattr(plots, "_japanese_font", lambda: None)
    replaced = plots.conditions(rows)
    assert {"基盤モデル", "base $x_1$ &lt;&amp;&gt;"} <= set(words(replaced.svg))
    named = plots.conditions(dict(zip(("model 1", "base $x_1$ <&>"), rows.values(), strict=True)))
    assert replaced.png == named.png and replaced.svg != named.svg


def test_long_names_keep_their_ends():
    parts = {"unparseable": 0.1, "wrong_count": 0.0, "wrong_answer": 0.0, "gained": 0.1}
    long, japanese = "a" * 50 + "/run-7", "継" * 50 + "七"
    found = words(plots.drops({long: parts, japanese: parts}).svg)
    assert f"...{long[-44:]}" in found and f"...{japanese[-22:]}" in found


def test_equal_pictures_are_equal_files():
    curve = plots.Curve("a", 0, np.arange(1, 9), np.arange(8.0))
    assert plots.curves([curve]) == plots.curves([curve])
    assert b"<dc:date>" not in plots.curves([curve]).svg

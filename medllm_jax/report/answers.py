"""From a number to the questions behind it: lists of ids, which cells of tables link to."""

import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from medllm_jax.evaluation.grading import Grade
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.report.scored import CONDITION_NAMES, Scored

_CHANGE = "change"
_LOST = {"unparseable": "lost: unparseable", "wrong_count": "lost: wrong count", "wrong_answer": "lost: wrong answer"}


class Cell(NamedTuple):
    """A cell of a table; `to` is the place on the page that it links to, "" for none."""

    text: str
    to: str = ""


class Listed(NamedTuple):
    """The questions behind a number, and the name of their place on the page."""

    place: str
    title: str
    ids: list[str]

    def line(self, shown: Sequence[str]) -> str:
        """What to add to the command to see one of them; "" where all are shown."""
        hidden = next((each for each in self.ids if each not in shown), None)
        return "" if hidden is None else f"--example {shlex.quote(hidden)}"


class Behind:
    """All lists of one exam, the nth of a page."""

    def __init__(self, number: int, models: Sequence[Scored]):
        self._found: dict[tuple[int, str, str], Listed] = {}
        self._titles: dict[tuple[int, str], str] = {}
        for model, each in enumerate(models):
            for under, title, which, of, ids in _lists(each, models[0]):
                self._titles[model, under] = title
                place = f"exam{number}-model{model}-{under}-{which}".replace("_", "-")
                self._found[model, under, which] = Listed(place, of, ids)

    def cell(self, text: str, model: int, under: str, which: str) -> Cell:
        """A number of the nth model, with a link to its questions where it has any."""
        listed = self._found.get((model, under, which))
        return Cell(text, f"#{listed.place}" if listed and listed.ids else "")

    def groups(self) -> Iterator[tuple[str, list[Listed]]]:
        """Titles, and the lists under each that hold any question."""
        for key, title in self._titles.items():
            lists = [found for (*of, _), found in self._found.items() if tuple(of) == key and found.ids]
            if lists:
                yield title, lists


def against(condition: str) -> str:
    """The name of the comparison with the first model under a condition."""
    return f"first-{condition}"


def changed(model: Scored) -> dict[str, list[str]]:
    """Why a question was lost under explanation, or "gained" -> ids; {} where only one condition was asked for."""
    if model.change is None:
        return {}
    before, after = (model.results.grades[condition] for condition in CONDITIONS)
    later = {grade.id: grade for grade in after}
    found: dict[str, list[str]] = {name: [] for name in [*_LOST, "gained"]}
    for grade in before:
        now = later[grade.id]
        if grade.correct and not now.correct:
            reason = {None: "wrong_answer", "wrong_count": "wrong_count"}.get(now.problem, "unparseable")
            found[reason].append(grade.id)
        elif now.correct and not grade.correct:
            found["gained"].append(grade.id)
    return found


def _lists(model: Scored, first: Scored) -> Iterator[tuple[str, str, str, str, list[str]]]:
    """Of what and its title, which questions and their title, ids."""
    for condition, grades in model.results.grades.items():
        title = f"{model.name}, {CONDITION_NAMES[condition]}"
        yield condition, title, "right", "right", _ids(grade for grade in grades if grade.correct)
        wrong = _ids(grade for grade in grades if not grade.correct and grade.problem is None)
        yield condition, title, "wrong", "read, and wrong", wrong
        for problem in model.summaries[condition].problems:
            ids = _ids(grade for grade in grades if grade.problem == problem)
            yield condition, title, problem, problem.replace("_", " "), ids
        contraindicated = _ids(grade for grade in grades if grade.contraindicated)
        yield condition, title, "contraindicated", "a contraindicated choice taken", contraindicated
    for reason, ids in changed(model).items():
        yield _CHANGE, f"{model.name}, what explaining changed", reason, _LOST.get(reason, reason), ids
    for condition in CONDITIONS if model is not first else ():
        before, after = (each.results.grades.get(condition, []) for each in (first, model))
        if before and {grade.id for grade in before} == {grade.id for grade in after}:
            right = {grade.id for grade in before if grade.correct}, {grade.id for grade in after if grade.correct}
            title = f"{model.name} against {first.name}, {CONDITION_NAMES[condition]}"
            only = [grade.id for grade in before if grade.id in right[0] - right[1]]
            yield against(condition), title, "before", f"only {first.name} right", only
            only = [grade.id for grade in before if grade.id in right[1] - right[0]]
            yield against(condition), title, "after", f"only {model.name} right", only


def _ids(grades: Iterator[Grade]) -> list[str]:
    return [grade.id for grade in grades]

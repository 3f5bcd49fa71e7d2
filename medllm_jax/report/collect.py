"""Collects the parts of a report: runs and exam results, read from the folders that the user names."""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from medllm_jax.config.schema import RunConfig
from medllm_jax.errors import UserError
from medllm_jax.evaluation.grading import Grade, read_grades
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.evaluation.samples import Samples
from medllm_jax.evaluation.sampling import Completion
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.json_lines import Row
from medllm_jax.storage.remote import is_there, names_in
from medllm_jax.storage.run_folder import METRICS, read_metrics, recorded_config

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What a run folder holds: the config of its first start, and the metrics of every step."""

    name: str
    config: RunConfig
    metrics: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Results:
    """A folder of exam results: what a model answered under each condition, graded.

    likelihood, contamination: what their commands wrote beside the grades, or None.
    """

    name: str
    folder: epath.Path
    exam: str
    model: str
    grades: dict[str, list[Grade]]
    likelihood: dict[str, Any] | None
    contamination: dict[str, Any] | None

    @functools.cached_property
    def samples(self) -> Samples | None:
        """The raw outputs; None where they were not kept."""
        return Samples.read(self.folder / "samples.jsonl")

    def outputs(self, question: str, condition: str) -> tuple[Completion, ...]:
        """The raw outputs to a question; none where they were not kept."""
        try:
            return self.samples.of(question, condition) if self.samples else ()
        except KeyError:
            return ()


def collect(paths: Iterable[str]) -> tuple[list[RecordedRun], list[Results]]:
    """Runs and results in the given order; a run brings the results in its `evaluation` folder.

    Raises:
      UserError: a path is neither, or what is in it can't be read.
    """
    runs: dict[epath.Path, RunConfig] = {}
    results: dict[epath.Path, epath.Path | None] = {}  # folder -> the run it is of
    for path in dict.fromkeys(str(path).rstrip("/") for path in paths):
        folder = epath.Path(path)
        held = names_in(folder)
        if (config := recorded_config(folder)) is not None:
            runs[folder], inside = config, folder / "evaluation"
            found = [inside / each for each in sorted(names_in(inside)) if _is_results(names_in(inside / each))]
            results |= dict.fromkeys(found, folder)
        elif _is_results(held):
            results.setdefault(folder)
        else:
            raise UserError(
                f"{path}: neither a run folder (no config.yaml in it) nor exam results (no scores.json in it)"
            )
    alone = [folder for folder, run in results.items() if run is None]
    run_names = dict(zip(runs, _distinct(list(runs)), strict=True))
    of_run = Counter(results.values())
    names = {
        f: run_names[run] if of_run[run] == 1 else f"{run_names[run]}/{f.name}" for f, run in results.items() if run
    }
    names |= dict(zip(alone, _distinct(alone, names.values()), strict=True))
    read = [RecordedRun(run_names[f], config, _metrics(f)) for f, config in runs.items()]
    return read, [_results(folder, names[folder]) for folder in results]


def _metrics(run: epath.Path) -> list[dict[str, Any]]:
    rows, damaged = read_metrics(run)
    if damaged:
        _log.warning(f"warning: {len(damaged)} lines of {run / METRICS} can't be read, the first is line {damaged[0]}")
    if not rows:
        _log.warning(f"warning: {run / METRICS} has no numbers yet, or they are lost")
    return rows


def _is_results(names: set[str]) -> bool:
    return bool(names & {"scores.json", "likelihood.json"})


def _distinct(folders: Sequence[epath.Path], taken: Iterable[str] = ()) -> list[str]:
    """Short names that tell folders apart, none of them taken: the last part of each, or as many parts as it takes."""
    others = set(taken)
    parts = [[p for p in str(folder).split("/") if p not in ("", ".", "..", "gs:", "evaluation")] for folder in folders]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names) | others) == len(names) + len(others):
            break
    return names if folders else []


def _results(folder: epath.Path, name: str) -> Results:
    scores = _json(folder / "scores.json", {})
    likelihood = _json(folder / "likelihood.json", _LIKELIHOOD)
    found = (likelihood if scores is None else scores) or {}
    told = {} if scores is None else scores.get("conditions", {})
    if not all(isinstance(found.get(key), str) for key in ("exam", "model")) or not _are_scores(told):
        raise UserError(f"{folder}: scores.json is not what `medllm evaluate` or `medllm score` writes")
    files = {condition: folder / f"grades-{condition}.jsonl" for condition in CONDITIONS}
    grades = {condition: read_grades(file) for condition, file in files.items() if is_there(file)}
    if scores and not grades:
        raise UserError(f"{folder} holds scores.json and no grades-*.jsonl: evaluate again, which asks no model twice")
    missing = [each for each in told if each in files and each not in grades]
    if missing:
        raise UserError(
            f"{folder}: scores.json tells of {missing[0]}, and {files[missing[0]].name} is not there: evaluate again, "
            "which asks no model twice"
        )
    for condition, graded in grades.items():
        if not graded:
            raise UserError(f"{files[condition]} holds no grade: evaluate again, which asks no model twice")
        if condition in told and told[condition]["n"] != len(graded):
            raise UserError(
                f"{files[condition]} holds {len(graded)} grades, and scores.json tells of "
                f"{_short(told[condition]['n'])}: evaluate again, which asks no model twice"
            )
    contamination = _json(folder / "contamination.json", _CONTAMINATION)
    return Results(name, folder, found["exam"], found["model"], grades, likelihood, contamination)


def _are_scores(conditions: Any) -> bool:
    """Whether they tell how many questions were asked under each condition."""
    each = conditions.values() if isinstance(conditions, dict) else [None]
    return all(isinstance(scores, dict) and type(scores.get("n")) is int for scores in each)


# What is read of files that programs wrote beside the grades; what may be None may be absent.
_LIKELIHOOD = {"n": int, "accuracy": int | float, "weighted_accuracy": int | float, "step": int | None}
_CONTAMINATION = {"overlapping": int, "questions": int, "share": int | float, "threshold": int | float, "n": int}
_CONTAMINATION |= {"corpora": list}


def _json(file: epath.Path, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object in a file, whose fields have the given types; None where there is no file."""
    if not is_there(file):
        return None
    content = read_json(file)
    row = Row(content, str(file))
    for name, kind in fields.items():
        value = row.get(name, kind, None) if isinstance(None, kind) else row.get(name, kind)
        if isinstance(value, list):
            if not all(isinstance(each, str) for each in value):
                raise row.error(f"the field {name!r} is {_short(value)}; a list of strings was expected")
        elif value is not None and not _is_number(value):
            raise row.error(f"the field {name!r} is no number that can be shown")
    return content


def _short(value: Any) -> str:
    return str(value)[:20]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)

"""Scores of predictions that others made, in three tiers, as text and as the files that a report reads."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from medllm_jax.evaluation.exam import Exam
from medllm_jax.evaluation.grading import TIERS, Grade, Summary, grade_by_tier, has_official, summarize, write_grades
from medllm_jax.evaluation.predictions import Prediction
from medllm_jax.evaluation.significance import Comparison, Estimate, accuracy, compare
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import write_whole
from medllm_jax.terminal.tables import aligned


@dataclasses.dataclass(frozen=True)
class SystemScore:
    """A system's grades and counts by tier; without the official one for exams that have none."""

    name: str
    condition: str
    grades: dict[str, list[Grade]]
    summaries: dict[str, Summary]

    @classmethod
    def of(cls, name: str, predictions: dict[str, Prediction], exam: Exam, condition: str) -> "SystemScore":
        found = [
            grade_by_tier(q, predictions[q.id].text, predictions[q.id].finish_reason, condition) for q in exam.questions
        ]
        tiers = [tier for tier in TIERS if tier != "official" or has_official(exam.questions)]
        grades = {tier: [by_tier[tier] for by_tier in found] for tier in tiers}
        return cls(name, condition, grades, {tier: summarize(found) for tier, found in grades.items()})

    @sole_writer("folder")
    def write(self, folder: epath.Path, exam: Exam) -> None:
        """A folder of results as `medllm evaluate` writes them, of the strict tier."""
        folder.mkdir(parents=True, exist_ok=True)
        write_grades(folder / f"grades-{self.condition}.jsonl", self.grades["strict"])
        scores = {
            "exam": exam.name,
            "template": "",
            "model": self.name,
            "conditions": {self.condition: self.summaries["strict"].as_dict()},
            "tiers": {tier: summary.as_dict() for tier, summary in self.summaries.items()},
        }
        text = json.dumps(scores, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / "scores.json", text)


def text_of(systems: Sequence[SystemScore], tier: str) -> str:
    """All tables: points of every tier by year, then one tier's parts, groups, rules and problems."""
    chosen = {system.name: system.summaries[tier] for system in systems}
    blocks = [
        ("points by year and tier", _points(systems)),
        (f"the parts of the exam ({tier})", list(_parts(chosen))),
        (f"accuracy of groups ({tier})", list(_groups(chosen))),
        (f"what could not be read, or had a wrong number of letters ({tier})", list(_counts(chosen, "problems"))),
        (f"which rule read the answer ({tier})", list(_counts(chosen, "rules"))),
    ]
    none = [] if "official" in systems[0].summaries else ["official: none; only results on IgakuQA were published"]
    return "\n\n".join([*(f"{title}\n{aligned(rows)}" for title, rows in blocks if len(rows) > 1), *none])


def _years(summary: Summary) -> dict[str, Summary]:
    return {str(year): of_year for year, of_year in summary.by_year.items()} | {"all": summary}


def _points(systems: Sequence[SystemScore]) -> list[tuple[str, ...]]:
    years = list(_years(systems[0].summaries["strict"]))
    rows: list[tuple[str, ...]] = [("system", "tier", *years, "of", "weighted [95%]", "unweighted [95%]")]
    for system in systems:
        for tier, summary in system.summaries.items():
            points = [str(of_year.points) for of_year in _years(summary).values()]
            estimates = [_share(accuracy(system.grades[tier], weighted=weighted)) for weighted in (True, False)]
            rows.append((system.name, tier, *points, str(summary.max_points), *estimates))
    return rows


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.interval.low:.3f}, {estimate.interval.high:.3f}]"


def _parts(chosen: dict[str, Summary]) -> Iterator[tuple[str, ...]]:
    yield ("system", "year", "points", "weighted", "unweighted", "required", "general", "contraindicated", "passed")
    for name, summary in chosen.items():
        for year, of_year in _years(summary).items():
            parts = [
                f"{part.points}/{part.max_points}" if part else "-" for part in (of_year.required, of_year.general)
            ]
            shares = (f"{of_year.weighted_accuracy:.3f}", f"{of_year.accuracy:.3f}")
            passed = {True: "yes", False: "no", None: "-"}[of_year.passed]
            points = f"{of_year.points}/{of_year.max_points}"
            yield (name, year, points, *shares, *parts, str(of_year.contraindicated), passed)


def _groups(chosen: dict[str, Summary]) -> Iterator[tuple[str, ...]]:
    first = next(iter(chosen.values()))
    yield ("group", "questions", *chosen)
    for group, found in first.groups.items():
        yield (group, str(found.n), *(f"{summary.groups[group].accuracy:.3f}" for summary in chosen.values()))


def _counts(chosen: dict[str, Summary], field: str) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(name for summary in chosen.values() for name in getattr(summary, field))
    yield (field, *chosen)
    for name in names:
        yield (name, *(str(getattr(summary, field).get(name, 0)) for summary in chosen.values()))


def comparison_text(before: SystemScore, after: SystemScore, tier: str) -> str:
    """Two systems on the same questions, in words and numbers."""
    found = compare(before.grades[tier], after.grades[tier])
    return "\n".join(_compared(before.name, after.name, tier, found))


def _compared(before: str, after: str, tier: str, found: Comparison) -> Iterator[str]:
    yield f"{after} against {before} ({tier})"
    yield f"  right: both {found.both}, only {before} {found.only_before}, only {after} {found.only_after}"
    yield f"  wrong: both {found.neither}; McNemar's exact test p = {found.p_value:.3g}"
    yield f"  difference: {_share(found.weighted_difference)} by points, {_share(found.difference)} by questions"
    lost = {"unparseable": found.unparseable, "wrong count": found.wrong_count, "wrong answer": found.wrong_answer}
    listed = ", ".join(f"{name} {part.questions} ({part.points} points)" for name, part in lost.items())
    yield f"  lost: {listed}; gained: {found.gained.questions} ({found.gained.points} points)"


def as_json(systems: Sequence[SystemScore], compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """Everything that the tables show, for programs; the comparisons by the system that was compared."""
    scores = {s.name: {tier: summary.as_dict() for tier, summary in s.summaries.items()} for s in systems}
    return {"systems": scores, "compared": {name: found.as_dict() for name, found in compared.items()}}

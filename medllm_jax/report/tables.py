"""The tables of a page; cells that count answers link to the questions behind them."""

from collections.abc import Sequence
from typing import NamedTuple

from medllm_jax.evaluation.significance import Estimate, Part, compare
from medllm_jax.report.answers import Behind, Cell, against
from medllm_jax.report.collect import RecordedRun, Results
from medllm_jax.report.scored import CONDITION_NAMES, Scored


class Table(NamedTuple):
    """The first row is the header, the first column names the rows."""

    caption: str
    rows: list[list[Cell]]


def table(caption: str, rows: Sequence[Sequence[Cell | str]]) -> Table:
    """Of cells, or of texts alone."""
    return Table(caption, [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows])


def of_runs(runs: Sequence[RecordedRun]) -> Table:
    """What was trained, how far, and to which loss."""
    rows = [
        ["run", "objective", "model", "adapter", "steps", "rows a step", "peak learning rate", "tokens", "last loss"]
    ]
    for run in runs:
        config, last = run.config, run.metrics[-1] if run.metrics else {}
        model, adapter = config.model, config.adapter
        tokens = sum(line.get("tokens", 0) for line in run.metrics)
        rows.append(
            [
                run.name,
                config.objective.name,
                f"{model.num_hidden_layers} layers of {model.hidden_size}" if model else "-",
                f"rank {adapter.rank} on {adapter.base}" if adapter else "-",
                f"{last.get('step', 0):,} of {config.steps or 0:,}",
                f"{config.data.batch_size:,}",
                f"{config.optimizer.learning_rate:.2g}",
                f"{tokens:,.0f}",
                f"{last['loss']:.4f}" if "loss" in last else "-",
            ]
        )
    return table("Runs", rows)


def of_likelihoods(results: Sequence[Results]) -> Table:
    """How often the likeliest letters are right."""
    rows = [["model", "exam", "step", "questions", "by points", "by questions"]]
    for each in results:
        if (found := each.likelihood) is not None:
            shares = [f"{found['weighted_accuracy']:.3f}", f"{found['accuracy']:.3f}"]
            rows.append([each.name, each.exam, str(found.get("step", "-")), str(found["n"]), *shares])
    return table("Likeliest letters right", rows)


# --- an exam ---------------------------------------------------------------------------------------------------------


def of_exam(models: Sequence[Scored], behind: Behind) -> list[Table]:
    """What everyone looks at: points, accuracies, differences, and what explaining costs."""
    return [
        _years(models, behind),
        _differences(models, behind),
        _against_first(models, behind),
        _changes(models, behind),
    ]


def details(models: Sequence[Scored], behind: Behind) -> list[Table]:
    """What some look for."""
    return [
        _parts(models, behind),
        _groups(models),
        _counts("No answer, or a wrong number of letters", models, "problems", behind),
        _counts("Rule that read the answer", models, "rules", behind),
    ]


def _years(models: Sequence[Scored], behind: Behind) -> Table:
    first = next(iter(models[0].summaries.values()))
    header = [f"{year} /{s.max_points}" for year, s in first.by_year.items()]
    rows: list[list[Cell | str]] = [
        ["model", "prompt", *header, f"points /{first.max_points}", "by points", "by questions"]
    ]
    for number, each in enumerate(models):
        for condition, s in each.summaries.items():
            years = [str(s.by_year[year].points) if year in s.by_year else "-" for year in first.by_year]
            shares = [str(s.points), f"{s.weighted_accuracy:.3f}", f"{s.accuracy:.3f}"]
            linked = [behind.cell(share, number, condition, "right") for share in shares]
            rows.append([each.name, CONDITION_NAMES[condition], *years, *linked])
    return table("Points, and accuracy by points and by questions", rows)


def _differences(models: Sequence[Scored], behind: Behind) -> Table:
    rows: list[list[Cell | str]] = [["model", *CONDITION_NAMES.values(), "difference", "McNemar's p"]]
    for number, each in enumerate(models):
        shares = [
            behind.cell(_estimate(each.by_points[condition]), number, condition, "right")
            if condition in each.by_points
            else "-"
            for condition in CONDITION_NAMES
        ]
        last = ["-", "-"]
        if each.change is not None:
            last = [_estimate(each.change.weighted_difference, "+"), f"{each.change.p_value:.2g}"]
        rows.append([each.name, *shares, *last])
    return table("Accuracy by points, with 95 % intervals", rows)


def _estimate(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.interval.low:{sign}.3f}, {found.interval.high:{sign}.3f}]"


def _against_first(models: Sequence[Scored], behind: Behind) -> Table:
    """Each model and the first one, question by question under the same prompt."""
    first = models[0]
    rows: list[list[Cell | str]] = [
        ["model", "prompt", "difference", f"only {first.name} right", "only this right", "McNemar's p"]
    ]
    for number, each in enumerate(models[1:], 1):
        for condition in (c for c in CONDITION_NAMES if c in first.summaries and c in each.summaries):
            before, after = first.results.grades[condition], each.results.grades[condition]
            cells: list[Cell | str] = ["of other questions", "-", "-", "-"]
            if {g.id for g in before} == {g.id for g in after}:
                found = compare(before, after)
                only = {"before": found.only_before, "after": found.only_after}
                linked = [behind.cell(str(n), number, against(condition), which) for which, n in only.items()]
                cells = [_estimate(found.weighted_difference, "+"), *linked, f"{found.p_value:.2g}"]
            rows.append([each.name, CONDITION_NAMES[condition], *cells])
    return table(f"Against {first.name}, by points, with 95 % intervals", rows)


def _changes(models: Sequence[Scored], behind: Behind) -> Table:
    rows: list[list[Cell | str]] = [["model", "lost: unparseable", "wrong count", "wrong answer", "gained", "net"]]
    for number, each in enumerate(models):
        if each.change is not None:
            parts: dict[str, Part] = {
                name: getattr(each.change, name) for name in ("unparseable", "wrong_count", "wrong_answer", "gained")
            }
            net = [parts["gained"][i] - sum(parts[name][i] for name in parts if name != "gained") for i in range(2)]
            linked = [
                behind.cell(f"{part.questions} ({part.points})", number, "change", name) for name, part in parts.items()
            ]
            rows.append([each.name, *linked, f"{net[0]:+} ({net[1]:+})"])
    return table("The drop under explanation, in questions (points)", rows)


def _parts(models: Sequence[Scored], behind: Behind) -> Table:
    rows: list[list[Cell | str]] = [["model", "prompt", "year", "required", "general", "contraindicated", "passed"]]
    for number, each in enumerate(models):
        for condition, summary in each.summaries.items():
            only = each.results.grades[condition][0].year
            for year, s in (summary.by_year or {only: summary}).items():
                if s.required and s.general:
                    parts = [f"{part.points}/{part.max_points}" for part in (s.required, s.general)]
                    passed = {True: "yes", False: "no", None: "-"}[s.passed]
                    taken = behind.cell(str(s.contraindicated), number, condition, "contraindicated")
                    rows.append([each.name, CONDITION_NAMES[condition], str(year), *parts, taken, passed])
    return table("Parts of the licensing exam", rows)


def _groups(models: Sequence[Scored]) -> Table:
    columns = {f"{each.name}, {CONDITION_NAMES[c]}": s for each in models for c, s in each.summaries.items()}
    first = next(iter(columns.values()))
    rows = [["group", "questions", *columns]]
    for group, of in first.groups.items():
        found = [s.groups.get(group) for s in columns.values()]
        rows.append([group, str(of.n), *(f"{each.accuracy:.3f}" if each else "-" for each in found)])
    return table("Accuracy of groups, by questions", rows)


def _counts(caption: str, models: Sequence[Scored], field: str, behind: Behind) -> Table:
    columns = [(number, c, s) for number, each in enumerate(models) for c, s in each.summaries.items()]
    names = dict.fromkeys(name for _, _, s in columns for name in getattr(s, field))
    rows: list[list[Cell | str]] = [[field, *(f"{models[n].name}, {CONDITION_NAMES[c]}" for n, c, _ in columns)]]
    for name in names:
        rows.append([name, *(behind.cell(str(getattr(s, field).get(name, 0)), n, c, name) for n, c, s in columns)])
    return table(caption, rows)

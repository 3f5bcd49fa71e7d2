"""A report as one HTML page that asks for nothing else, and its pictures as files."""

import base64
import datetime
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath

from medllm_jax import __version__
from medllm_jax.errors import UserError
from medllm_jax.evaluation.grading import Grade, Summary, summarize
from medllm_jax.evaluation.prompts import CONDITIONS
from medllm_jax.evaluation.significance import Comparison, Estimate, accuracy, compare
from medllm_jax.report import plots
from medllm_jax.report.collect import RecordedRun, Results
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import write_whole

_CONDITION_NAMES = {"answer_only": "answer only", "explain": "with explanation"}

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
    """A figure of the page; `file` is its name without .png."""

    file: str
    title: str
    alt: str
    png: bytes

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def size(self) -> tuple[int, int]:
        return plots.size_of(self.png)


class Table(NamedTuple):
    """Cells of text; the first row is the header, the first column names the rows."""

    caption: str
    rows: list[list[str]]


@sole_writer("output", unit="report")  # a run may be written in the same folder
def write_page(
    runs: Sequence[RecordedRun], results: Sequence[Results], output: epath.PathLike, examples: Sequence[str] = ()
) -> epath.Path:
    """Writes report.html and figures/*.png into a folder, local or gs://; returns the page's path.

    Args:
      runs, results: see `collect`.
      output: the folder, made where it does not exist.
      examples: ids of questions whose outputs are shown. No output is shown otherwise.

    Raises:
      UserError: an example is no question of the results, or a model's conditions are of different questions.
    """
    output = epath.Path(output)
    graded = [each for each in results if each.grades]
    pictures = list(_curves(runs))
    names = dict.fromkeys(r.exam for r in graded)
    exams = [_exam(name, n, [r for r in graded if r.exam == name]) for n, name in enumerate(names)]
    page = _environment().get_template("page.html.jinja")
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    html = page.render(
        made=made,
        version=__version__,
        runs=_run_table(runs),
        colours=[(run.name, plots.COLOURS[n % len(plots.COLOURS)]) for n, run in enumerate(runs)],
        silent=[run.name for run in runs if not run.metrics],
        pictures=pictures,
        exams=exams,
        likelihoods=_likelihood_table(results),
        examples=[_example(question, graded) for question in examples],
    )
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for picture in [*pictures, *(picture for exam in exams for picture in exam["pictures"])]:
        (output / "figures" / f"{picture.file}.png").write_bytes(picture.png)
    write_whole(output / "report.html", html)
    return output / "report.html"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("medllm_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def _run_table(runs: Sequence[RecordedRun]) -> Table:
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
    return Table("Runs", rows)


def _curves(runs: Sequence[RecordedRun]) -> Iterator[Picture]:
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


# --- exams -----------------------------------------------------------------------------------------------------------


def _exam(name: str, number: int, results: Sequence[Results]) -> dict[str, Any]:
    """All about one exam, the nth of the page."""
    summaries = {r.name: {condition: summarize(found) for condition, found in r.grades.items()} for r in results}
    estimates = {r.name: {condition: accuracy(found) for condition, found in r.grades.items()} for r in results}
    compared = {r.name: _compared(r) for r in results if len(r.grades) == len(CONDITIONS)}
    # A name of a file: short, and of this exam alone, though another differs in its Japanese part.
    slug = "".join(c if c.isalnum() and c.isascii() else "-" for c in name[:_SLUG]) + (f"-{number}" if number else "")
    spread = {
        model: {c: (e.value, e.interval.low, e.interval.high) for c, e in found.items()}
        for model, found in estimates.items()
    }
    values = "; ".join(
        f"{model}: {', '.join(f'{_CONDITION_NAMES[c]} {e.value:.3f}' for c, e in found.items())}"
        for model, found in estimates.items()
    )
    pictures = [
        Picture(f"accuracy-{slug}", "accuracy under both conditions", f"Accuracy. {values}", plots.conditions(spread))
    ]
    if compared:
        parts = {model: _shares(found, summaries[model]["explain"]) for model, found in compared.items()}
        told = "; ".join(f"{model}: {found.weighted_difference.value:+.3f}" for model, found in compared.items())
        title = "what explaining costs, and why"
        pictures.append(Picture(f"drop-{slug}", title, f"Differences by points. {told}", plots.drops(parts)))
    return {
        "name": name,
        "pictures": pictures,
        "tables": [_years(summaries), _differences(estimates, compared), _against_first(results)],
        "split": _split(compared),
        "details": [
            _parts(results, summaries),
            _groups(summaries),
            _counts("No answer, or a wrong number of letters", summaries, "problems"),
            _counts("Rule that read the answer", summaries, "rules"),
        ],
        "contamination": [(r.name, r.contamination) for r in results if r.contamination],
        "questions": len(next(iter(results[0].grades.values()))),
    }


def _compared(results: Results) -> Comparison:
    try:
        return compare(results.grades["answer_only"], results.grades["explain"])
    except UserError as error:
        raise UserError(f"{results.folder}: {error}") from error


def _shares(found: Comparison, summary: Summary) -> dict[str, float]:
    parts = {name: getattr(found, name).points for name in ("unparseable", "wrong_count", "wrong_answer", "gained")}
    return {name: points / max(summary.max_points, 1) for name, points in parts.items()}


def _years(summaries: dict[str, dict[str, Summary]]) -> Table:
    first = next(iter(next(iter(summaries.values())).values()))
    header = [f"{year} /{s.max_points}" for year, s in first.by_year.items()]
    rows = [["model", "prompt", *header, f"points /{first.max_points}", "by points", "by questions"]]
    for model, found in summaries.items():
        for condition, s in found.items():
            years = [str(s.by_year[year].points) if year in s.by_year else "-" for year in first.by_year]
            shares = [f"{s.weighted_accuracy:.3f}", f"{s.accuracy:.3f}"]
            rows.append([model, _CONDITION_NAMES[condition], *years, str(s.points), *shares])
    return Table("Points, and accuracy by points and by questions", rows)


def _differences(estimates: dict[str, dict[str, Estimate]], compared: dict[str, Comparison]) -> Table:
    rows = [["model", *_CONDITION_NAMES.values(), "difference", "McNemar's p"]]
    for model, found in estimates.items():
        shares = [_estimate(found[condition]) if condition in found else "-" for condition in CONDITIONS]
        comparison = compared.get(model)
        last = (
            [_estimate(comparison.weighted_difference, "+"), f"{comparison.p_value:.2g}"] if comparison else ["-"] * 2
        )
        rows.append([model, *shares, *last])
    return Table("Accuracy by points, with 95 % intervals", rows)


def _estimate(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.interval.low:{sign}.3f}, {found.interval.high:{sign}.3f}]"


def _against_first(results: Sequence[Results]) -> Table:
    """Each model and the first one, question by question under the same prompt."""
    first, *others = results
    rows = [["model", "prompt", "difference", f"only {first.name} right", "only this right", "McNemar's p"]]
    for each in others:
        for condition in (c for c in CONDITIONS if c in first.grades and c in each.grades):
            before, after = first.grades[condition], each.grades[condition]
            cells = ["of other questions", "-", "-", "-"]
            if {g.id for g in before} == {g.id for g in after}:
                found = compare(before, after)
                difference = _estimate(found.weighted_difference, "+")
                cells = [difference, str(found.only_before), str(found.only_after), f"{found.p_value:.2g}"]
            rows.append([each.name, _CONDITION_NAMES[condition], *cells])
    return Table(f"Against {first.name}, by points, with 95 % intervals", rows)


def _split(compared: dict[str, Comparison]) -> Table:
    rows = [["model", "lost: unparseable", "wrong count", "wrong answer", "gained", "net"]]
    for model, found in compared.items():
        parts = [found.unparseable, found.wrong_count, found.wrong_answer, found.gained]
        net = [parts[3][i] - sum(part[i] for part in parts[:3]) for i in range(2)]
        rows.append([model, *(f"{part.questions} ({part.points})" for part in parts), f"{net[0]:+} ({net[1]:+})"])
    return Table("The drop under explanation, in questions (points)", rows)


def _parts(results: Sequence[Results], summaries: dict[str, dict[str, Summary]]) -> Table:
    rows = [["model", "prompt", "year", "required", "general", "contraindicated", "passed"]]
    for each in results:
        model = each.name
        for condition, summary in summaries[model].items():
            only = each.grades[condition][0].year
            for year, s in (summary.by_year or {only: summary}).items():
                if s.required and s.general:
                    parts = [f"{part.points}/{part.max_points}" for part in (s.required, s.general)]
                    passed = {True: "yes", False: "no", None: "-"}[s.passed]
                    row = [str(year), *parts, str(s.contraindicated), passed]
                    rows.append([model, _CONDITION_NAMES[condition], *row])
    return Table("Parts of the licensing exam", rows)


def _groups(summaries: dict[str, dict[str, Summary]]) -> Table:
    columns = {f"{model}, {_CONDITION_NAMES[c]}": s for model, found in summaries.items() for c, s in found.items()}
    first = next(iter(columns.values()))
    rows = [["group", "questions", *columns]]
    for group, of in first.groups.items():
        found = [s.groups.get(group) for s in columns.values()]
        rows.append([group, str(of.n), *(f"{each.accuracy:.3f}" if each else "-" for each in found)])
    return Table("Accuracy of groups, by questions", rows)


def _counts(caption: str, summaries: dict[str, dict[str, Summary]], field: str) -> Table:
    columns = {f"{model}, {_CONDITION_NAMES[c]}": s for model, found in summaries.items() for c, s in found.items()}
    names = dict.fromkeys(name for s in columns.values() for name in getattr(s, field))
    rows = [[field, *columns], *([n, *(str(getattr(s, field).get(n, 0)) for s in columns.values())] for n in names)]
    return Table(caption, rows)


def _likelihood_table(results: Sequence[Results]) -> Table:
    rows = [["model", "exam", "step", "questions", "by points", "by questions"]]
    for each in results:
        if (found := each.likelihood) is not None:
            shares = [f"{found['weighted_accuracy']:.3f}", f"{found['accuracy']:.3f}"]
            rows.append([each.name, each.exam, str(found.get("step", "-")), str(found["n"]), *shares])
    return Table("Likeliest letters right", rows)


# --- examples --------------------------------------------------------------------------------------------------------


def _example(question: str, results: Sequence[Results]) -> dict[str, Any]:
    shown = []
    for each in results:
        for condition, grades in each.grades.items():
            for grade in (g for g in grades if g.id == question):
                outputs = each.outputs(question, condition)
                shown.append((each.name, _CONDITION_NAMES[condition], _verdict(grade), [s.text for s in outputs]))
    if not shown:
        raise UserError(f"--example {question}: no question of these results has this id")
    return {"id": question, "shown": shown}


def _verdict(grade: Grade) -> str:
    read = grade.answer or "nothing"
    how = f" by {grade.rule}" if grade.rule else ""
    return f"{'right' if grade.correct else 'wrong'}; read: {read}{how}" + (
        f"; {grade.problem}" if grade.problem else ""
    )

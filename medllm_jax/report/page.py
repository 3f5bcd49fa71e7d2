"""A report as one HTML page that asks for nothing else, and its pictures as files."""

import datetime
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath

from medllm_jax import __version__
from medllm_jax.evaluation.exam import Exam
from medllm_jax.report import headline, pictures, plots, tables
from medllm_jax.report.answers import Behind
from medllm_jax.report.collect import RecordedRun, Results
from medllm_jax.report.examples import KINDS, chosen
from medllm_jax.report.language import lang, marked
from medllm_jax.report.scored import Scored
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import write_whole


@sole_writer("output", unit="report")  # a run may be written in the same folder
def write_page(
    runs: Sequence[RecordedRun],
    results: Sequence[Results],
    output: epath.PathLike,
    examples: Sequence[str] = (),
    texts: Sequence[Exam] = (),
) -> epath.Path:
    """Writes report.html and figures/*.png, *.svg into a folder, local or gs://; returns the page's path.

    Args:
      runs, results: see `collect`.
      output: the folder, made where it does not exist.
      examples: ids of questions whose outputs are shown, and `examples.KINDS`. No output is shown otherwise.
      texts: exams whose questions and right answers are shown beside these outputs.

    Raises:
      UserError: an example is no question of the results, an exam is none of them, or a model's conditions are of
        different questions.
    """
    output = epath.Path(output)
    by_exam: dict[str, list[Scored]] = {}
    for each in results:
        if each.grades:
            by_exam.setdefault(each.exam, []).append(Scored.of(each))
    shown = chosen(examples, list(by_exam.items()), texts)
    places = {each.name: each.places for each in shown}
    exams = [_exam(number, name, models, places.get(name, {})) for number, (name, models) in enumerate(by_exam.items())]
    curves = list(pictures.of_runs(runs))
    html = _environment().get_template("page.html.jinja").render(
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        headline=headline.of_page(runs, list(by_exam.values())),
        runs=tables.of_runs(runs),
        colours=[(run.name, *plots.style_of(n)) for n, run in enumerate(runs)],
        silent=[run.name for run in runs if not run.metrics],
        pictures=curves,
        exams=exams,
        likelihoods=tables.of_likelihoods(results),
        examples=shown,
        kinds=KINDS,
    )  # fmt: skip
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for picture in [*curves, *(picture for exam in exams for picture in exam["pictures"])]:
        (output / "figures" / f"{picture.file}.svg").write_bytes(picture.drawn.svg)
        (output / "figures" / f"{picture.file}.png").write_bytes(picture.drawn.png)
    write_whole(output / "report.html", html)
    return output / "report.html"


def _exam(number: int, name: str, models: Sequence[Scored], places: dict[str, str]) -> dict[str, Any]:
    """All about one exam, the nth of the page; `places` says where questions are shown."""
    behind = Behind(number, models)
    return {
        "name": name,
        "headline": headline.of_exam(models),
        "pictures": list(pictures.of_exam(name, number, models)),
        "tables": tables.of_exam(models, behind),
        "details": tables.details(models, behind),
        "behind": list(behind.groups()),
        "places": places,
        "contamination": [(each.name, each.results.contamination) for each in models if each.results.contamination],
        "questions": len(next(iter(models[0].results.grades.values()))),
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medllm_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"lang": lang, "marked": marked}
    return environment

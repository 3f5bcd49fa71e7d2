"""`medllm demo --study`: every seed, every variant, both exams; what is made is not made again."""

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from medllm_jax.evaluation.exam import LETTERS
from medllm_jax.evaluation.grading import Grade, read_grades
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.samples import Samples
from medllm_jax.recipes.commands import Runner, heading
from medllm_jax.recipes.demo.author import TEMPLATE
from medllm_jax.recipes.demo.corpora import ExamRow
from medllm_jax.recipes.demo.stages import CONDITIONS, STUDY, Stages, open_workdir, recipe_digest
from medllm_jax.recipes.study.explanations import contradicts, is_term, kind
from medllm_jax.recipes.study.page import write_page
from medllm_jax.recipes.study.results import (
    CURVES,
    IN_NATS,
    LIKELIEST,
    OUTSIDE,
    POINTS,
    READINGS,
    UNREADABLE,
    WRITTEN,
    WRONG_COUNT,
    Paper,
    SeedResults,
    file_of,
    write_seed,
)
from medllm_jax.recipes.study.variants import EXAMS, MODELS, VARIANTS
from medllm_jax.storage import lease
from medllm_jax.storage.json_lines import read_rows
from medllm_jax.storage.run_folder import read_metrics, recorded_config


def run_study(workdir: str, seeds: Sequence[int], medllm: Runner) -> Path:
    """Runs the seeds that have no results yet, and writes the page; returns it.

    A seed's runs are in `seed-N`, its results in `study/seed-N.json`. UserError if a folder holds something else.
    """
    start = time.monotonic()
    folder = Path(workdir) / "study"
    for seed in seeds:
        if file_of(folder, seed).exists():
            print(f"{file_of(folder, seed)} is there: seed {seed} is not run again")
        else:
            run_seed(str(Path(workdir) / f"seed-{seed}"), seed, medllm, folder)
    page = write_page(folder)
    print(f"\nverdicts and tables: {page}\nresults, to be merged with those of other seeds: {folder}")
    print(f"{time.monotonic() - start:.0f} s in all")
    return page


@lease.sole_writer("workdir")
def run_seed(workdir: str, seed: int, medllm: Runner, folder: Path) -> None:
    """The whole recipe and its variants in a folder, and their results to another."""
    work = Path(workdir)
    open_workdir(work, seed, STUDY)
    stages = Stages(work, seed, STUDY, medllm)
    heading(f"Seed {seed}: a world, a base model, and continued pretraining")
    stages.make_world()
    stages.import_model()
    stages.train_base()
    stages.pretrain()
    for variant in VARIANTS:
        heading(f"Seed {seed}: {variant.title}")
        stages.make_pairs(variant.start, variant.strategy, variant.pairs)
        stages.prefer(variant.name, variant.start, variant.pairs, *variant.settings)
    for exam in EXAMS:
        heading(f"Seed {seed}: the exam {exam}")
        for model in MODELS:
            stages.examine(model, exam, str(_evaluation(work, model, exam)))
            stages.choose(model, exam, str(_evaluation(work, model, exam)))
    write_seed(folder, _collected(work, seed))


def _evaluation(work: Path, model: str, exam: str) -> Path:
    return work / "evaluation" / exam / model


def _collected(work: Path, seed: int) -> SeedResults:
    exams = {exam: _questions(work, exam) for exam in EXAMS}
    answers: dict[str, dict[str, dict[str, dict[str, str]]]] = {
        reading: {model: {} for model in MODELS} for reading in READINGS
    }
    explained: dict[str, dict[str, str]] = {model: {} for model in MODELS}
    contradicted: dict[str, dict[str, str]] = {model: {} for model in MODELS}
    for model in MODELS:
        for exam, questions in exams.items():
            folder = _evaluation(work, model, exam)
            grades = {name: read_grades(folder / f"grades-{name}.jsonl") for name in CONDITIONS}
            samples = Samples.read(epath.Path(folder / "samples.jsonl"))
            assert samples is not None, folder
            texts = {name: [samples.of(question.id, name)[0].text for question in questions] for name in CONDITIONS}
            written = {name: "".join(map(_character, grades[name], texts[name])) for name in CONDITIONS}
            chosen = {name: read_grades(folder / f"likeliest-{name}.jsonl") for name in CONDITIONS}
            answers[WRITTEN][model][exam] = written
            answers[LIKELIEST][model][exam] = {
                name: "".join(str(grade.answer) for grade in found) for name, found in chosen.items()
            }
            said = texts["explain"]
            given = zip(questions, said, written["explain"], strict=True)
            explained[model][exam] = "".join(map(kind, said, (question.disease for question in questions)))
            contradicted[model][exam] = "".join(str(int(_contradicts(*one))) for one in given)
    return SeedResults(
        seed=seed,
        recipe=recipe_digest(),
        exams={exam: _paper(questions) for exam, questions in exams.items()},
        answers=answers,
        explained=explained,
        contradicts=contradicted,
        curves={variant.name: _curves(str(work / variant.name)) for variant in VARIANTS},
    )


def _questions(work: Path, exam: str) -> list[ExamRow]:
    return [ExamRow(**row.fields) for row in read_rows(work / "world" / "exam" / f"{exam}.jsonl")]


def _paper(questions: Sequence[ExamRow]) -> Paper:
    numbers = {case: number for number, case in enumerate(dict.fromkeys(question.case for question in questions))}
    return Paper("".join(q.answer for q in questions), [numbers[question.case] for question in questions])


def _character(grade: Grade, text: str) -> str:
    if grade.problem == "wrong_count":
        return WRONG_COUNT
    if grade.problem is not None or grade.answer is None:
        return OUTSIDE if is_term(_words(text)) else UNREADABLE
    return grade.answer


def _words(text: str) -> str:
    """The words of an answer, whatever comes before it."""
    return text.rpartition(_cue())[2].strip()


@functools.cache
def _cue() -> str:
    return load_template(TEMPLATE).condition("answer_only").cue


def _contradicts(question: ExamRow, said: str, character: str) -> bool:
    if character in LETTERS:
        return contradicts(said, question.category, question.choices[LETTERS.index(character)])
    return character == OUTSIDE and contradicts(said, question.category, _words(said))


def _curves(run: str) -> dict[str, list[list[float]]]:
    config = recorded_config(run)
    assert config is not None, run
    rows, _ = read_metrics(run)
    last = [int(steps[-1]) for steps in np.array_split([row["step"] for row in rows], POINTS)]
    units = {name: config.objective.beta if name in IN_NATS else 1.0 for name in CURVES}

    def means(name: str) -> list[float]:
        parts = np.array_split([row[CURVES[name]] for row in rows], POINTS)
        return [round(float(part.mean()) / units[name], 4) for part in parts]

    return {name: [[step, mean] for step, mean in zip(last, means(name), strict=True)] for name in CURVES}

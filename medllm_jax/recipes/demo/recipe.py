"""`medllm demo`: the whole recipe, tiny, and a table of what it did. An interrupted demo continues."""

import time
from pathlib import Path

from medllm_jax.evaluation.grading import Grade, read_grades
from medllm_jax.evaluation.significance import compare
from medllm_jax.recipes.commands import Runner, heading
from medllm_jax.recipes.demo.stages import CONDITIONS, Size, Stages, open_workdir
from medllm_jax.storage import lease
from medllm_jax.terminal.tables import markdown

DEMO = Size(28_000, 460)  # less than in the study, so as to end within four minutes
MODELS = (("base", "base"), ("CPT", "cpt"), ("CPT + RPO", "rpo"))
_ASKED = ("answer-only", "with explanation")
_CHANGES = ("lost", "of these unreadable", "gained")


@lease.sole_writer("workdir")
def run_demo(workdir: str, seed: int, medllm: Runner) -> Path:
    """Runs the recipe in a folder and prints the table; returns the table's file.

    UserError if the folder holds something else, or a demo of another seed.
    """
    start = time.monotonic()
    work = Path(workdir)
    open_workdir(work, seed, DEMO)
    stages = Stages(work, seed, DEMO, medllm)

    heading("A small world of medical facts: corpora, exams, a tokenizer, and a tiny random Qwen2.5 as a hub has it")
    stages.make_world()
    heading("From Hugging Face format to a run folder")
    stages.import_model()
    heading("To a base level: statements about diseases, and questions with their answers")
    stages.train_base()
    heading("Continued pretraining on diseases that the base knows poorly")
    stages.pretrain()
    heading("Preference pairs from the CPT model's own answers, graded by the exam's extractor")
    stages.make_pairs("cpt", "both", "pairs")
    heading("Reasoning Preference Optimization; the reference is the CPT model, scored once")
    stages.prefer("rpo", "cpt", "pairs")
    heading("The exam, on diseases that no training question asked about")
    results = [str(work / "evaluation" / name) for _, name in MODELS]
    for (_, name), output in zip(MODELS, results, strict=True):
        stages.examine(name, "test", output)
        stages.choose(name, "test", output)

    heading("Back to Hugging Face format, with a model card that shows these scores")
    if not (work / "export").exists():
        shown = [word for folder in results for word in ("--evaluation", folder)]
        medllm("convert", "to-hf", stages.place("rpo"), stages.place("export"), *shown)
    heading("Curves and scores on one page")
    medllm("report", *(stages.place(name) for _, name in MODELS), *results, "--output", stages.place("report"))

    table = _table(work)
    (work / "table.md").write_text(table, encoding="utf-8")
    questions = len(_grades(work, "rpo")[0])
    print(f"\n{table}\nExam accuracy on {questions} held-out questions, seed {seed}.")
    for what, where in (
        ("this table", "table.md"),
        ("curves and scores, for a browser", "report/report.html"),
        ("runs with metrics, TensorBoard events and checkpoints", "base, cpt, rpo"),
        ("every answer and its grade", "evaluation"),
        ("the model in Hugging Face format", "export"),
    ):
        print(f"  {what}: {work}/{where}")
    print(f"{time.monotonic() - start:.0f} s in all")
    return work / "table.md"


def _grades(work: Path, name: str, kind: str = "grades") -> list[list[Grade]]:
    """Under each condition."""
    return [read_grades(work / "evaluation" / name / f"{kind}-{condition}.jsonl") for condition in CONDITIONS]


def _table(work: Path) -> str:
    """Accuracies, and what became of the questions that were right without an explanation and are not with one.

    Both as written, and, where a model is held to the choices, by the likeliest of them.
    """
    rows = [["model", *_ASKED, "difference", *_CHANGES, *(f"likeliest choice, {name}" for name in _ASKED)]]
    for title, name in MODELS:
        grades = _grades(work, name)
        only, explained, *likeliest = map(_accuracy, (*grades, *_grades(work, name, "likeliest")))
        found = compare(*grades)
        counts = (found.only_before, found.unparseable.questions, found.gained.questions)
        shares = (f"{share:.3f}" for share in likeliest)
        rows.append([title, f"{only:.3f}", f"{explained:.3f}", f"{explained - only:+.3f}", *map(str, counts), *shares])
    return markdown(rows, numbers=False)


def _accuracy(grades: list[Grade]) -> float:
    return sum(grade.correct for grade in grades) / len(grades)

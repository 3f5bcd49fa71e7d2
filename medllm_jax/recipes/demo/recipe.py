"""`medllm demo`: the whole recipe, tiny, as the very commands that a large run is made of.

A stage whose output is there is not made again, so an interrupted demo continues.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation.grading import read_grades
from medllm_jax.evaluation.significance import compare
from medllm_jax.recipes.commands import Runner, Score, heading, read_scores
from medllm_jax.recipes.demo.author import TEMPLATE
from medllm_jax.recipes.demo.corpora import tokenizer_texts, write_world
from medllm_jax.recipes.demo.tokenizer import train_tokenizer
from medllm_jax.storage import lease
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.remote import names_in
from medllm_jax.terminal.tables import markdown

CONFIGS = Path(__file__).parent / "configs"
VOCABULARY = 2500
ROW = 128  # tokens; the documents of the world are short
MODELS = (("base", "base"), ("CPT", "cpt"), ("CPT + RPO", "rpo"))
CONDITIONS = ("answer_only", "explain")
SAMPLES = ("--samples", "8", "--temperature", "1.0", "--max-pairs-per-prompt", "4", "--strategy", "both")


@lease.sole_writer("workdir")
def run_demo(workdir: str, seed: int, medllm: Runner) -> Path:
    """Runs the recipe in a folder and prints the table; returns the table's file.

    UserError if the folder holds something else, or a demo of another seed.
    """
    start = time.monotonic()
    work = Path(workdir)
    _open_workdir(work, seed)
    place = {name: str(work / name) for name in ("world", "tokenizer", "random", "base", "cpt", "rpo", "export")}
    stores = {name: str(work / "stores" / name) for name in ("base", "cpt", "pairs")}
    batch = ("--batch-size", "64")

    heading("A small world of medical facts: corpora, exams and a tokenizer in Qwen2's format")
    if not (work / "world").exists():
        _make_whole(work / "world", lambda folder: write_world(folder, seed))
    if not (work / "tokenizer").exists():
        _make_whole(work / "tokenizer", lambda folder: _write_tokenizer(folder))

    heading("A tiny random Qwen2.5 in Hugging Face format, and from there to a run folder")
    if not (work / "hf").exists():
        _make_random_model(work, seed, medllm)
    if not (work / "random").exists():
        medllm("convert", "from-hf", str(work / "hf"), place["random"])

    heading("To a base level: statements about diseases, and questions with their answers")
    if not Path(stores["base"]).exists():
        # Only responses are learnt: which wrong choices a question has can't be, and they are most of its text.
        text = str(work / "world" / "base.jsonl")
        medllm("data", "sft", "--input", text, *_store_arguments(place["tokenizer"], stores["base"]))
    _train(medllm, "base", place, stores["base"], seed)

    heading("Continued pretraining on diseases that the base knows poorly")
    if not Path(stores["cpt"]).exists():
        # The world says the same things again and again: that is how so small a model comes to know them.
        text, store = str(work / "world" / "cpt.jsonl"), _store_arguments(place["tokenizer"], stores["cpt"])
        medllm("data", "cpt", "--input", text, *store, "--duplicates", "keep")
    _train(medllm, "cpt", place, stores["cpt"], seed)

    heading("Preference pairs from the CPT model's own answers, graded by the exam's extractor")
    rows = work / "pairs.jsonl"
    train_exam = ("--exam", str(work / "world" / "exam" / "train.jsonl"), "--template", str(TEMPLATE))
    if not rows.exists():
        seeded = ("--seed", str(seed))
        medllm("pairs", "--run", place["cpt"], *train_exam, *SAMPLES, *batch, *seeded, "--output", str(rows))
    if not Path(stores["pairs"]).exists():
        medllm("data", "pairs", "--input", str(rows), *_store_arguments(place["tokenizer"], stores["pairs"]))

    heading("Reasoning Preference Optimization; the reference is the CPT model, scored once")
    if not (work / "rpo" / "config.yaml").exists():  # a run that has begun has read them
        medllm("reference", *_run_arguments("rpo", place, stores["pairs"], seed))
    _train(medllm, "rpo", place, stores["pairs"], seed)

    heading("The exam, on diseases that no training question asked about")
    test_exam = ("--exam", str(work / "world" / "exam" / "test.jsonl"), "--template", str(TEMPLATE))
    for _, name in MODELS:
        output = str(work / "evaluation" / name)
        medllm("evaluate", "--run", place[name], *test_exam, *batch, "--output", output)

    results = [str(work / "evaluation" / name) for _, name in MODELS]
    heading("Back to Hugging Face format, with a model card that shows these scores")
    if not (work / "export").exists():
        shown = [word for folder in results for word in ("--evaluation", folder)]
        medllm("convert", "to-hf", place["rpo"], place["export"], *shown)

    heading("Curves and scores on one page")
    medllm("report", *(place[name] for _, name in MODELS), *results, "--output", str(work / "report"))

    table = _table(work)
    (work / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nExam accuracy on {_questions(work)} held-out questions, seed {seed}.")
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


def identity(seed: int) -> dict[str, int | str]:
    """What a demo's folder is known by: its seed, and a digest of what its world and its training are made from."""
    here = Path(__file__).parent
    sources = sorted(path for path in here.rglob("*") if path.suffix in (".py", ".yaml") and path != Path(__file__))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"seed": seed, "recipe": digest[:16]}


def _open_workdir(work: Path, seed: int) -> None:
    marker = work / "demo.json"
    if marker.exists():
        found = read_json(marker)
        if found != identity(seed):
            other = "seed" if found.get("seed") != seed else "version"
            raise UserError(f"{work} holds a demo of another {other}: give another --workdir, or remove it")
        print(f"{work} holds an earlier demo: what is there is kept; remove the folder to begin anew")
    elif names_in(epath.Path(work)) - {lease.FILE}:
        raise UserError(f"{work} is not empty and holds no demo: give another --workdir")
    else:
        work.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(identity(seed)))


def _make_whole(folder: Path, make) -> None:
    """Makes a folder under another name and then renames it, so that it is there whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make(unfinished)
    unfinished.rename(folder)


def _write_tokenizer(folder: Path) -> None:
    train_tokenizer(tokenizer_texts(), folder, vocab_size=VOCABULARY)


def _make_random_model(work: Path, seed: int, medllm: Runner) -> None:
    """A random model, exported to the folder `hf`: what a checkpoint from a model hub is to a large run."""
    from medllm_jax.checkpoint.write_model import write_model
    from medllm_jax.config.load import load_model_config, to_plain
    from medllm_jax.config.schema import MeshConfig, PrecisionConfig
    from medllm_jax.distributed.sharding import make_mesh
    from medllm_jax.model.abstract import abstract_model, random_params
    from medllm_jax.storage.run_folder import copy_tokenizer

    config = load_model_config(CONFIGS / "model.yaml")
    plan = abstract_model(config, PrecisionConfig(compute="float32"), make_mesh(MeshConfig()))

    def make(folder: Path) -> None:
        write_model(epath.Path(folder), random_params(plan, seed), to_plain(config))
        copy_tokenizer(epath.Path(work / "tokenizer"), epath.Path(folder))

    drawn = work / "drawn"
    if not drawn.exists():
        _make_whole(drawn, make)
    medllm("convert", "to-hf", str(drawn), str(work / "hf"))
    shutil.rmtree(drawn)


def _store_arguments(tokenizer: str, output: str) -> tuple[str, ...]:
    return ("--tokenizer", tokenizer, "--output", output, "--sequence-length", str(ROW))


def _run_arguments(name: str, place: dict[str, str], store: str, seed: int) -> tuple[str, ...]:
    before = {"base": "random", "cpt": "base", "rpo": "cpt"}[name]
    paths = ("--run", place[name], "--init.checkpoint", place[before], "--data.store", store)
    return ("--config", str(CONFIGS / f"{name}.yaml"), *paths, "--seed", str(seed))


def _train(medllm: Runner, name: str, place: dict[str, str], store: str, seed: int) -> None:
    medllm("train", *_run_arguments(name, place, store, seed))


# --- the table ---------------------------------------------------------------------------------------------------


def _scores(work: Path, name: str) -> dict[str, Score]:
    return read_scores(work / "evaluation" / name, CONDITIONS)


def _questions(work: Path) -> int:
    return _scores(work, "rpo")["explain"].questions


def _table(work: Path) -> str:
    """Accuracies, and what became of the questions that were right without an explanation and are not with one."""
    rows = [["model", "answer-only", "with explanation", "difference", "lost", "of these unreadable", "gained"]]
    for title, name in MODELS:
        only, explained = (score.accuracy for score in _scores(work, name).values())
        grades = (read_grades(work / "evaluation" / name / f"grades-{condition}.jsonl") for condition in CONDITIONS)
        found = compare(*grades)
        counts = (found.only_before, found.unparseable.questions, found.gained.questions)
        rows.append([title, f"{only:.3f}", f"{explained:.3f}", f"{explained - only:+.3f}", *map(str, counts)])
    return markdown(rows, numbers=False)

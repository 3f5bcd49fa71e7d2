"""The stages of the recipe on the miniature world, each as the very command that a large run is made of.

A stage whose output is there is not made again. A stage leaves its output whole or not at all.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.recipes.commands import Runner
from medllm_jax.recipes.demo.author import TEMPLATE
from medllm_jax.recipes.demo.corpora import tokenizer_texts, write_world
from medllm_jax.recipes.demo.tokenizer import train_tokenizer
from medllm_jax.storage import lease
from medllm_jax.storage.json_files import read_json
from medllm_jax.storage.remote import names_in

CONFIGS = Path(__file__).parent / "configs"
VOCABULARY = 2500
ROW = 128  # tokens; the documents of the world are short
CONDITIONS = ("answer_only", "explain")
BATCH = ("--batch-size", "64")
SAMPLES = ("--samples", "8", "--temperature", "1.0", "--max-pairs-per-prompt", "4")


class Size(NamedTuple):
    """How long the base model is trained: so many steps, in which it sees nearly every document once."""

    base_documents: int
    base_steps: int


STUDY = Size(36_000, 600)


@dataclass(frozen=True)
class Stages:
    """The recipe of one seed in a folder, stage by stage; a model is called by the name of its run's folder."""

    work: Path
    seed: int
    size: Size
    medllm: Runner

    def place(self, *names: str) -> str:
        return str(self.work.joinpath(*names))

    def exam(self, name: str) -> tuple[str, ...]:
        return ("--exam", self.place("world", "exam", f"{name}.jsonl"), "--template", str(TEMPLATE))

    def make_world(self) -> None:
        """Corpora, exams, a tokenizer in Qwen2's format, and a random model in Hugging Face's."""
        self._once("world", lambda folder: write_world(folder, self.seed, self.size.base_documents))
        self._once("tokenizer", lambda folder: train_tokenizer(tokenizer_texts(), folder, vocab_size=VOCABULARY))
        if not (self.work / "hf").exists():
            self._once("drawn", self._write_random_model)
            self.medllm("convert", "to-hf", self.place("drawn"), self.place("hf"))
            shutil.rmtree(self.work / "drawn")

    def import_model(self) -> None:
        """The model in Hugging Face's format as a run folder."""
        if not (self.work / "random").exists():
            self.medllm("convert", "from-hf", self.place("hf"), self.place("random"))

    def train_base(self) -> None:
        # Only responses are learnt: which wrong choices a question has can't be, and they are most of its text.
        self._store("sft", "base", self.place("world", "base.jsonl"))
        self._train("base", "base", "random", "base", "--steps", str(self.size.base_steps))

    def pretrain(self) -> None:
        # The world says the same things again and again: that is how so small a model comes to know them.
        self._store("cpt", "cpt", self.place("world", "cpt.jsonl"), "--duplicates", "keep")
        self._train("cpt", "cpt", "base", "cpt")

    def make_pairs(self, model: str, strategy: str, pairs: str) -> None:
        """A model's own answers to the train exam as preference pairs; `strategy` is that of `medllm pairs`."""
        rows = self.place(f"{pairs}.jsonl")
        if not Path(rows).exists():
            sampled = (*self.exam("train"), *SAMPLES, *BATCH, "--strategy", strategy, "--seed", str(self.seed))
            self.medllm("pairs", "--run", self.place(model), *sampled, "--output", rows)
        self._store("pairs", pairs, rows)

    def prefer(self, run: str, start: str, pairs: str, *settings: str) -> None:
        """Trains a run on pairs; the model `start`, which it begins with, is the reference."""
        if not (self.work / run / "config.yaml").exists():  # a run that has begun has read the reference's scores
            self.medllm("reference", *self._run_arguments("rpo", run, start, pairs), *settings)
        self._train("rpo", run, start, pairs, *settings)

    def examine(self, model: str, exam: str, output: str) -> None:
        self.medllm("evaluate", "--run", self.place(model), *self.exam(exam), *BATCH, "--output", output)

    def choose(self, model: str, exam: str, results: str) -> None:
        """Which answers a model finds likeliest, with nothing before them and after its explanations in the results."""
        if not (Path(results) / f"likeliest-{CONDITIONS[-1]}.jsonl").exists():
            self.medllm("likelihood", "--run", self.place(model), *self.exam(exam), *BATCH, "--after", results)

    def _once(self, name: str, make: Callable[[Path], object]) -> None:
        """Makes a folder under another name and then renames it, so that it is there whole or not at all."""
        folder = self.work / name
        if not folder.exists():
            unfinished = folder.with_name(f".{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)

    def _write_random_model(self, folder: Path) -> None:
        """What a checkpoint from a model hub is to a large run."""
        from medllm_jax.checkpoint.write_model import write_model
        from medllm_jax.config.load import load_model_config, to_plain
        from medllm_jax.config.schema import MeshConfig, PrecisionConfig
        from medllm_jax.distributed.sharding import make_mesh
        from medllm_jax.model.abstract import abstract_model, random_params
        from medllm_jax.storage.run_folder import copy_tokenizer

        config = load_model_config(CONFIGS / "model.yaml")
        plan = abstract_model(config, PrecisionConfig(compute="float32"), make_mesh(MeshConfig()))
        write_model(epath.Path(folder), random_params(plan, self.seed), to_plain(config))
        copy_tokenizer(epath.Path(self.work / "tokenizer"), epath.Path(folder))

    def _store(self, kind: str, name: str, text: str, *options: str) -> None:
        output = self.place("stores", name)
        if not Path(output).exists():
            row = ("--tokenizer", self.place("tokenizer"), "--output", output, "--sequence-length", str(ROW))
            self.medllm("data", kind, "--input", text, *row, *options)

    def _train(self, config: str, run: str, start: str, store: str, *settings: str) -> None:
        self.medllm("train", *self._run_arguments(config, run, start, store), *settings)

    def _run_arguments(self, config: str, run: str, start: str, store: str) -> tuple[str, ...]:
        places = ("--run", self.place(run), "--init.checkpoint", self.place(start))
        data = ("--data.store", self.place("stores", store), "--seed", str(self.seed))
        return ("--config", str(CONFIGS / f"{config}.yaml"), *places, *data)


def recipe_digest() -> str:
    """Of what worlds and their training are made from."""
    here = Path(__file__).parent
    shown = here / "recipe.py"  # prints and tabulates alone; the demo's size is told apart by itself
    sources = sorted(path for path in here.rglob("*") if path.suffix in (".py", ".yaml") and path != shown)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def identity(seed: int, size: Size) -> dict[str, Any]:
    """What a folder of the recipe is known by."""
    return {"seed": seed, "recipe": recipe_digest(), "size": size._asdict()}


def open_workdir(work: Path, seed: int, size: Size) -> None:
    """Makes a folder the recipe's, or takes it up again; UserError if it holds something else, or another seed."""
    marker = work / "demo.json"
    if marker.exists():
        found = read_json(marker)
        if found != identity(seed, size):
            other = "seed" if found.get("seed") != seed else "version"
            raise UserError(f"{work} holds a demo of another {other}: give another --workdir, or remove it")
        print(f"{work} holds an earlier demo: what is there is kept; remove the folder to begin anew")
    elif names_in(epath.Path(work)) - {lease.FILE}:
        raise UserError(f"{work} is not empty and holds no demo: give another --workdir")
    else:
        work.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(identity(seed, size)))

"""The study's commands: in order, each once, and continued where they stopped; what they leave becomes the results."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from medllm_jax.config.load import load_run_config
from medllm_jax.errors import RunError
from medllm_jax.evaluation.evaluate import evaluate
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.grading import read_grades, write_grades
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.sampling import Completion, Sampler
from medllm_jax.recipes.demo import corpora, stages
from medllm_jax.recipes.demo.author import TEMPLATE
from medllm_jax.recipes.demo.corpora import ExamRow
from medllm_jax.recipes.study import explanations, run, statistics
from medllm_jax.recipes.study.results import LIKELIEST, OUTSIDE, UNREADABLE, WRITTEN, read_study
from medllm_jax.recipes.study.run import run_study
from medllm_jax.recipes.study.variants import EXAMS, MODELS, VARIANTS
from medllm_jax.storage.json_lines import read_rows
from medllm_jax.storage.run_folder import record_config
from tests.tiny import write_json_lines


def metrics(step, beta):
    """Of a step in which the chosen answers have gained half a nat a step, and the rejected have lost a nat in all."""
    rewards = {"rewards/chosen": beta * step / 2, "rewards/rejected": -beta}
    return {**rewards, "rewards/margins": beta * (step / 2 + 1), "rewards/accuracies": 0.75, "entropy": 1.0}


class Commands:
    """Notes commands and leaves what the real ones leave; `failing` is refused once."""

    def __init__(self, failing=None):
        self.lines, self.failing = [], failing

    def __call__(self, verb, *words):
        named = dict(itertools.pairwise(words))
        if self.failing in words:
            self.failing = None
            raise RunError("the machine went away")
        self.lines.append((verb, *words))
        if verb == "convert":
            Path(words[-1]).mkdir()
        elif verb == "data":
            Path(named["--output"]).mkdir(parents=True)
        elif verb == "pairs":
            Path(named["--output"]).touch()
        elif verb == "train":
            config = load_run_config(words[1], words[2:])  # after --config
            record_config(epath.Path(config.run), config)
            beta = config.objective.beta
            rows = [{"step": step, **metrics(step, beta)} for step in range(1, 41)]
            write_json_lines(Path(config.run) / "metrics.jsonl", rows)
        elif verb == "evaluate":
            self.evaluate(Path(named["--run"]).name, Path(named["--exam"]), Path(named["--output"]))
        elif verb == "likelihood":
            for condition in stages.CONDITIONS:  # as if the model would always choose what it writes, or else a
                grades = read_grades(Path(named["--after"]) / f"grades-{condition}.jsonl")
                chosen = [dataclasses.replace(grade, answer=grade.answer or "a") for grade in grades]
                write_grades(Path(named["--after"]) / f"likeliest-{condition}.jsonl", chosen)

    def evaluate(self, model, file, output):
        questions = [ExamRow(**row.fields) for row in read_rows(file)]

        def sample(prompts, seeds, params):
            explain = params.max_new_tokens > 8
            for number, question in enumerate(questions):
                right = question.choices["abcde".index(question.answer)]
                said = ("", right, "心筋梗塞", right)[number % 4] if model == "base" else right
                yield (Completion(f"{question.explanation}\n答え:{said}" if explain else said, "stop"),)

        evaluate(load_exam(file), load_template(TEMPLATE), stages.CONDITIONS, Sampler(model, "here", sample), output)


@pytest.fixture
def small(monkeypatch):
    """Worlds of few documents, and a model that nothing is written for."""
    monkeypatch.setattr(run, "STUDY", stages.Size(base_documents=10, base_steps=1))
    monkeypatch.setattr(corpora, "CPT_DOCUMENTS", 10)
    monkeypatch.setattr(stages.Stages, "_write_random_model", lambda _, folder: folder.mkdir())
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


def test_a_study_is_continued_and_becomes_results(small, tmp_path):
    medllm = Commands(failing=str(tmp_path / "seed-1" / "dpo"))
    with pytest.raises(RunError):
        run_study(str(tmp_path), (0, 1), medllm)
    before = list(medllm.lines)
    page = run_study(str(tmp_path), (0, 1), medllm)
    again = [line for line in medllm.lines[len(before) :] if line[0] in ("convert", "data", "pairs", "reference")]
    assert not set(again) & set(before), "what is there is not made again"

    trained = [dict(itertools.pairwise(line)) for line in medllm.lines if line[0] == "train"]
    runs = {Path(one["--run"]).name: one for one in trained if "seed-1" in one["--run"]}
    assert list(runs) == ["base", "cpt", *(variant.name for variant in VARIANTS)]
    for variant in VARIANTS:
        assert Path(runs[variant.name]["--init.checkpoint"]).name == variant.start
        assert Path(runs[variant.name]["--data.store"]).name == variant.pairs
        settings = dict(zip(variant.settings[::2], variant.settings[1::2], strict=True))
        assert runs[variant.name].items() >= settings.items()
    made = [line for line in medllm.lines if line[0] == "pairs" and any("seed-0" in word for word in line)]
    assert len(made) == len({variant.pairs for variant in VARIANTS}), "variants share pairs"

    found = read_study(tmp_path / "study")
    assert [results.seed for results in found] == [0, 1]
    assert "### Verdicts" in page.read_text()
    done = len(medllm.lines)
    run_study(str(tmp_path), (0, 1), medllm)
    assert len(medllm.lines) == done


def test_results_say_what_models_said(small, tmp_path):
    run_study(str(tmp_path), (0,), Commands())
    (results,) = read_study(tmp_path / "study")
    for exam in EXAMS:
        rows = [json.loads(line) for line in (tmp_path / "seed-0" / "world" / "exam" / f"{exam}.jsonl").open()]
        right = "".join(row["answer"] for row in rows)
        assert results.exams[exam].right == right
        cases = np.array(results.exams[exam].cases)
        assert [rows[i]["case"] for i in np.searchsorted(cases, cases)] == [row["case"] for row in rows]
        for model in MODELS:
            for condition in stages.CONDITIONS:
                given = results.answers[WRITTEN][model][exam][condition]
                chosen = results.answers[LIKELIEST][model][exam][condition]
                assert chosen == given.replace(UNREADABLE, "a").replace(OUTSIDE, "a")
                if model != "base":
                    assert given == right
                    continue
                assert given[1::2] == right[1::2]
                assert set(given[0::4]) == {UNREADABLE}
                # A disease that is no choice can be read, unlike nothing.
                assert set(given[2::4]) <= {OUTSIDE, *"abcde"} and OUTSIDE in given[2::4]
            assert set(results.explained[model][exam]) == {explanations.TRUE}
        assert "1" in results.contradicts["base"][exam][2::4] and "1" not in results.contradicts["cpt"]["test"]
    steps = range(4, 41, 4)
    for name, beta in (("rpo", 0.1), ("beta-low", 0.03), ("nll", 1e-6)):
        assert results.curves[name] == {
            "margins": [[step, round(beta * (step / 2 + 0.25), 4)] for step in steps],
            "accuracies": [[step, 0.75] for step in steps],
            "chosen": [[step, step / 2 - 0.75] for step in steps],
            "rejected": [[step, -1.0] for step in steps],
            "entropy": [[step, 1.0] for step in steps],
        }, name

"""The harness' tasks say what `medllm evaluate` says: the same prompts, limits and scores."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medllm_jax.evaluation import grade, load_exam, load_template
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.grading import summarize
from tests.tiny import write_json_lines

FOLDER = Path(__file__).parents[2] / "tools" / "lm_eval_tasks"
CONDITIONS = ("answer_only", "explain")


def load_functions():
    """The module as the harness loads it: by its path."""
    spec = importlib.util.spec_from_file_location("exam_of_tasks", FOLDER / "exam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loader(yaml.SafeLoader):
    """Reads `!function exam.score` as that text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture
def exam(tmp_path):
    rows = [
        {"id": f"q{n}", "question": f"{n}?", "choices": ["甲", "乙", "丙"], "answer": "abc"[n % 3], "points": n % 4}
        for n in range(12)
    ]
    return write_json_lines(tmp_path / "exam.jsonl", rows)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_task_file_names_what_is_there_and_the_templates_limits(condition):
    task = yaml.load((FOLDER / f"{condition}.yaml").read_text("utf-8"), _Loader)
    functions = load_functions()
    named = [task["custom_dataset"], task["process_results"], task["metric_list"][1]["aggregation"]]
    assert all(callable(getattr(functions, name.removeprefix("exam."))) for name in named)
    limits = load_template("igakuqa").condition(condition)
    settings = task["generation_kwargs"]
    assert (tuple(settings["until"]), settings["max_gen_toks"]) == (limits.stop, limits.max_new_tokens)
    assert task["metadata"]["condition"] == condition and not settings["do_sample"]
    assert task["task"] in yaml.safe_load((FOLDER / "group.yaml").read_text())["task"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_scores_are_those_of_the_exam(exam, condition):
    functions = load_functions()
    questions = {q.id: q for q in load_exam(exam).questions}
    texts = ["a", "答え: b", "丙\n\n問題: 次", "a,b", "わからない", ""] * 2
    place = {"exam": str(exam), "template": "igakuqa", "condition": condition}
    scored = [functions.score({"id": key} | place, [text]) for key, text in zip(questions, texts, strict=True)]
    stops = load_template("igakuqa").condition(condition).stop
    assert "\n問題:" in stops
    cut = [text.split("\n問題:")[0].split("\n\n問題")[0] for text in texts]
    grades = [grade(q, extract(q, text, "stop", condition)) for q, text in zip(questions.values(), cut, strict=True)]
    whole = summarize(grades)
    assert sum(each["accuracy"] for each in scored) == whole.correct > 0
    assert functions.weighted_mean([each["weighted_accuracy"] for each in scored]) == whole.weighted_accuracy
    assert sum(each["unparseable"] for each in scored) == whole.unparseable > 0
    assert sum(each["wrong_count"] for each in scored) == whole.wrong_count > 0


def test_documents_are_prompts_and_nothing_else(exam):
    pytest.importorskip("datasets", reason="datasets comes with lm-eval")
    template = load_template("igakuqa")
    found = load_functions().documents("explain", exam=str(exam), version=1.0)["test"]
    assert [row["prompt"] for row in found] == [template.render(q, "explain") for q in load_exam(exam).questions]
    with pytest.raises(ValueError, match="no exam is named: --metadata"):
        load_functions().documents("explain")


@pytest.mark.slow
def test_the_harness_agrees_question_by_question(exam, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    from medllm_jax.cli import main
    from medllm_jax.evaluation.grading import read_grades
    from tests.inference.test_samplers import TEMPLATE
    from tests.tiny_hf import make_hf_folder

    make_hf_folder(tmp_path / "hf", tied=False, hidden=64, seed=3)
    (tmp_path / "short.yaml").write_text(TEMPLATE, encoding="utf-8")
    arguments = ["--exam", str(exam), "--template", str(tmp_path / "short.yaml"), "--output", str(tmp_path / "ours")]
    assert main(["evaluate", "--hf", str(tmp_path / "hf"), *arguments]) == 0
    metadata = json.dumps({"exam": str(exam), "template": str(tmp_path / "short.yaml")})
    for condition, limit in zip(CONDITIONS, (12, 24), strict=True):
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--log_samples"]
        command += ["--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32", "--include_path", str(FOLDER)]
        command += ["--tasks", f"medllm_exam_{condition}", "--metadata", metadata]
        command += ["--gen_kwargs", f"max_gen_toks={limit}", "--output_path", str(tmp_path / "theirs")]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=offline)
        (file,) = (tmp_path / "theirs").rglob(f"samples_medllm_exam_{condition}_*.jsonl")
        theirs = {row["doc"]["id"]: bool(row["accuracy"]) for row in map(json.loads, file.read_text().splitlines())}
        ours = {g.id: g.correct for g in read_grades(tmp_path / f"ours/grades-{condition}.jsonl")}
        assert theirs == ours

"""A run and two models' results to report, made without training and without a model that thinks."""

import json

import numpy as np
import pytest

from medllm_jax.config.load import load_run_config
from medllm_jax.evaluation.evaluate import evaluate
from medllm_jax.storage.run_folder import record_config
from tests.evaluation.test_evaluate import BOTH, EXAM, TEMPLATE, Model, asked_of


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folders `cpt` and `rpo`, runs of 700 steps, and `exams/base`, results alone; `rpo` has results of its own."""
    from etils import epath

    root = epath.Path(tmp_path_factory.mktemp("report"))
    rng = np.random.default_rng(0)
    for name, steps in (("cpt", 700), ("rpo", 40)):
        record_config(root / name, load_run_config(f"configs/runs/{name}-tiny.yaml", []))
        rows = [
            {"step": n, "loss": 3 / n**0.2 + rng.normal() / 20, "grad_norm": 1 + 1 / n, "tokens": 2048.0}
            | {"tokens_per_second": 1e4, "data_wait": 0.0, "learning_rate": 1e-4}
            | ({"rewards/margins": n / 20, "rewards/chosen": -n / 99, "entropy": 1.0} if name == "rpo" else {})
            | ({"held_out/loss": 3 / n**0.2} if n % 100 == 0 else {})
            for n in range(1, steps + 1)
        ]
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {"q1": 'b: 乙 <b> & "b"', "q2": "a,b"}
    evaluate(EXAM, TEMPLATE, BOTH, asked_of(Model(answers)), root / "rpo/evaluation/small")
    evaluate(EXAM, TEMPLATE, BOTH, asked_of(Model({"q0": "?"})), root / "exams/base")
    monitor = {"exam": "small", "model": "cpt@700", "step": 700, "n": 6, "accuracy": 0.5, "weighted_accuracy": 0.5}
    (root / "rpo/evaluation/small/likelihood.json").write_text(json.dumps(monitor))
    overlap = {"corpora": ["corpus"], "n": 13, "threshold": 0.5, "questions": 6, "overlapping": 1, "share": 1 / 6}
    (root / "rpo/evaluation/small/contamination.json").write_text(json.dumps(overlap | {"ids": ["q0"]}))
    return root

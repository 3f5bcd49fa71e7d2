"""Real exam questions as a corpus, a killed run that goes on, and a whole year's exam; where the data is at hand."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from medllm_jax.cli import main
from tests.tiny import make_tokenizer, write_json_lines
from tests.tiny_hf import make_hf_folder
from tests.warm import WarmPython

DATA = Path(__file__).parents[3] / "shared" / "data" / "igakuqa"
LETTERS = "abcdefgh"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not DATA.exists(), reason="the exam's questions are not vendored; put them at ../shared/data"),
]


def documents(years):
    """Question, choices and answer of each problem as one text."""
    for year in years:
        for file in sorted(DATA.glob(f"**/{year}/*.jsonl")):
            if "metadata" in file.name or "baseline" in str(file):
                continue
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                choices = "\n".join(f"{LETTERS[i]}: {text}" for i, text in enumerate(row["choices"]))
                yield {"text": f"問題: {row['problem_text']}\n{choices}\n答え: {','.join(map(str, row['answer']))}"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A store of 2018 and 2019, and a tiny model that came from a Hugging Face folder."""
    root = tmp_path_factory.mktemp("real")
    rows = list(documents((2018, 2019)))
    assert len(rows) == 800
    corpus = write_json_lines(root / "corpus.jsonl", rows)
    make_hf_folder(root / "hf", hidden=64, vocab=2048, max_position_embeddings=8192, tokenizer=False)
    make_tokenizer(root / "hf", texts=[row["text"] for row in rows], vocab_size=2048)
    store = ("--output", str(root / "store"), "--sequence-length", "256")
    assert main(["data", "cpt", "--input", str(corpus), "--tokenizer", str(root / "hf"), *store]) == 0
    assert main(["convert", "from-hf", str(root / "hf"), str(root / "model")]) == 0
    (root / "run.yaml").write_text(
        f"run: {root}/run\nsteps: 100\n"
        f"data: {{store: {root}/store, batch_size: 8}}\ninit: {{checkpoint: {root}/model}}\n"
        "precision: {params: float32, compute: float32}\ncheckpoint: {every: 20}\n"
        "optimizer: {learning_rate: 1.0e-3, warmup_steps: 5}\n"
    )
    return root


def start(*arguments):
    """`medllm` as on a laptop, with one device and programs that are worth compiling well."""
    medllm = "-m", "medllm_jax.cli", *map(str, arguments)
    return WarmPython(*medllm, stdout=subprocess.PIPE, environment={"XLA_FLAGS": ""})


def medllm(*arguments):
    """What it printed; it must succeed."""
    process = start(*arguments)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 101))
    return [row["loss"] for row in rows]


def test_killed_half_way_goes_on_to_the_same_losses(work):
    config = "train", "--config", work / "run.yaml"
    process = start(*config)
    deadline = time.monotonic() + 600
    while not (work / "run" / "checkpoints" / "40").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (work / "run" / "checkpoints" / "100").exists()
    medllm(*config)
    medllm(*config, "--run", work / "whole")
    assert losses(work / "run") == losses(work / "whole")
    assert losses(work / "run")[-1] < losses(work / "run")[0] - 1


def test_a_year_of_the_exam_under_both_prompts(work):
    if not (work / "whole").exists():
        medllm("train", "--config", work / "run.yaml", "--run", work / "whole")
    template = work / "short.yaml"  # the real prompts, with completions as short as a tiny model deserves
    shipped = Path(__file__).parents[2] / "medllm_jax" / "evaluation" / "templates" / "plain.yaml"
    text = shipped.read_text(encoding="utf-8")
    template.write_text(text.replace("max_new_tokens: 512", "max_new_tokens: 64"), encoding="utf-8")
    arguments = "--exam", DATA, "--years", "2020", "--template", template, "--batch-size", "32"
    printed = medllm("evaluate", "--run", work / "whole", *arguments, "--output", work / "scores")
    assert "answer_only" in printed and "explain" in printed
    scores = json.loads((work / "scores" / "scores.json").read_text())["conditions"]
    for summary in scores.values():
        assert summary["n"] == 400
        assert summary["correct"] + summary["unparseable"] + summary["wrong_count"] <= 400

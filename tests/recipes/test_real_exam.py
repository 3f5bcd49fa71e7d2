"""Real exam questions as a corpus, a killed run that goes on, and a whole year's exam; where the data is at hand."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medllm_jax.cli import main
from tests.tiny import make_tokenizer, write_json_lines
from tests.tiny_hf import make_hf_folder

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
    convert = [sys.executable, "-m", "tools.convert_hf", "from-hf", str(root / "hf"), str(root / "model")]
    subprocess.run(convert, check=True)
    (root / "run.yaml").write_text(
        f"run: {root}/run\nsteps: 100\n"
        f"data: {{store: {root}/store, batch_size: 8}}\ninit: {{checkpoint: {root}/model}}\n"
        "precision: {params: float32, compute: float32}\ncheckpoint: {every: 20}\n"
        "optimizer: {learning_rate: 1.0e-3, warmup_steps: 5}\n"
    )
    return root


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 101))
    return [row["loss"] for row in rows]


def test_killed_half_way_goes_on_to_the_same_losses(work):
    config = ["train", "--config", str(work / "run.yaml")]
    process = subprocess.Popen([sys.executable, "-m", "medllm_jax.cli", *config], env=os.environ)
    deadline = time.monotonic() + 600
    while not (work / "run" / "checkpoints" / "40").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "run" / "checkpoints" / "100").exists()
    assert main(config) == 0
    assert main([*config, "--run", str(work / "whole")]) == 0
    assert losses(work / "run") == losses(work / "whole")
    assert losses(work / "run")[-1] < losses(work / "run")[0] - 1


def test_a_year_of_the_exam_under_both_prompts(work, capsys):
    if not (work / "whole").exists():
        assert main(["train", "--config", str(work / "run.yaml"), "--run", str(work / "whole")]) == 0
    template = work / "short.yaml"  # the real prompts, with completions as short as a tiny model deserves
    shipped = Path(__file__).parents[2] / "medllm_jax" / "evaluation" / "templates" / "plain.yaml"
    text = shipped.read_text(encoding="utf-8")
    template.write_text(text.replace("max_new_tokens: 512", "max_new_tokens: 64"), encoding="utf-8")
    arguments = ["--exam", str(DATA), "--years", "2020", "--template", str(template), "--batch-size", "32"]
    assert main(["evaluate", "--run", str(work / "whole"), *arguments, "--output", str(work / "scores")]) == 0
    printed = capsys.readouterr().out
    assert "answer_only" in printed and "explain" in printed
    scores = json.loads((work / "scores" / "scores.json").read_text())["conditions"]
    for summary in scores.values():
        assert summary["n"] == 400
        assert summary["correct"] + summary["unparseable"] + summary["wrong_count"] <= 400

"""Two checkouts compute the same numbers: every loss, file and grade of a small recipe, compared bit for bit.

    python -m benchmarks.same_numbers --work WORK --checkout A --checkout B [--python A/.venv/bin/python --python ...]

Each checkout runs, through its own command line, on a tiny world that this script makes without the package: a token
store and a pair store, a conversion from Hugging Face's format, 60 steps of CPT, reference log-probabilities, 60
steps of RPO with LoRA, three exports (CPT, merged adapters, adapters alone), an exam that the RPO model sits, and
scores of predictions. It compares all metrics of each step but timings, the digests of the arrays in all checkpoints
(weights and optimizer state), and the bytes of stores, reference log-probabilities, exported files, samples, grades
and scores. It leaves out texts that people read: model cards and tables.

With one checkout it writes the numbers. With two it compares them, and names what differs: exit code 1. The same
machine gives the same numbers each time; name one checkout twice to see that.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 60
TIMINGS = {"step_seconds", "tokens_per_second", "data_wait", "startup_seconds", "goodput", "host_memory_gib"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("fever", "cough", "発熱", "insulin", "heart", "肺炎", "drug", "test", "高血圧", "liver", "腎臓", "nerve", "咳")
ANSWERS = "abcde"

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "max_window_layers": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 384,
}

CPT = f"""\
run: runs/cpt
steps: {STEPS}
seed: 1
init: {{checkpoint: models/base}}
data: {{store: stores/corpus, batch_size: 4, accumulate: 2}}
precision: {{params: float32, compute: float32}}
objective: {{vocab_chunks: 2}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 5}}
checkpoint: {{every: 40}}
"""
RPO = f"""\
run: runs/rpo
steps: {STEPS}
seed: 2
init: {{checkpoint: runs/cpt}}
adapter: {{rank: 4, alpha: 8, dropout: 0.1, base: bfloat16}}
data: {{store: stores/pairs, batch_size: 4}}
precision: {{params: float32, compute: bfloat16}}
objective: {{name: rpo, beta: 0.1, alpha: 1.0}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 5, weight_decay: 0.0}}
checkpoint: {{every: 40}}
remat: full
"""

CLI, CONVERT = "-m medllm_jax.cli", "-m tools.convert_hf"
COMMANDS = (
    f"{CLI} data cpt --input corpus.jsonl --tokenizer hf --output stores/corpus --sequence-length 128 --workers 1",
    f"{CLI} data pairs --input pairs.jsonl --tokenizer hf --output stores/pairs --sequence-length 128",
    f"{CONVERT} from-hf hf models/base",
    f"{CLI} train --config cpt.yaml",
    f"{CLI} reference --config rpo.yaml",
    f"{CLI} train --config rpo.yaml",
    f"{CONVERT} to-hf runs/cpt exports/cpt --max-shard-size 200KB",
    f"{CONVERT} to-hf runs/rpo exports/rpo",
    f"{CONVERT} to-hf runs/rpo exports/adapter --adapter",
    f"{CLI} evaluate --run runs/rpo --exam exam.jsonl --template plain --batch-size 20 --output results/greedy",
    f"{CLI} evaluate --run runs/cpt --exam exam.jsonl --samples 3 --limit 3 --conditions answer_only "
    "--output results/sampled",
    f"{CLI} score --exam questions --data exam.jsonl --predictions predictions --against second --json "
    "--output results/scored",
)
# What people read, and may be worded otherwise; SHA256SUMS lists them too, with files that are compared themselves.
TEXTS = ("README.md", "NOTICE", "table.md", "SHA256SUMS")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", action="append", required=True, metavar="DIR", help="given once or twice")
    parser.add_argument("--python", action="append", default=[], help="of each checkout (default: its .venv's)")
    parser.add_argument("--work", required=True, help="new folder for what is made")
    options = parser.parse_args()
    checkouts = [Path(checkout).resolve() for checkout in options.checkout]
    pythons = options.python or [str(checkout / ".venv/bin/python") for checkout in checkouts]
    if len(checkouts) > 2 or len(pythons) != len(checkouts):
        parser.error("give one checkout or two, and a --python for each or for none")
    work = Path(options.work).resolve()
    work.mkdir(parents=True)
    found = []
    for number, (checkout, python) in enumerate(zip(checkouts, pythons, strict=True), 1):
        # Both run in a folder of one name: paths are part of some files.
        here = work / "here"
        make_world(here)
        run_recipe(checkout, python, here)
        found.append(numbers_of(here))
        here.rename(work / f"{number}")
        file = work / f"numbers-{number}.json"
        file.write_text(json.dumps(found[-1], indent=1, sort_keys=True) + "\n")
        print(f"{checkout}: {describe(found[-1])}; {file}", flush=True)
    if len(found) == 1:
        return 0
    differing = list(differences(*found))
    for line in differing:
        print(f"DIFFERENT: {line}")
    print(f"{len(differing)} of {len(flat(found[0]))} differ" if differing else "all are the same, bit for bit")
    return 1 if differing else 0


def run_recipe(checkout: Path, python: str, here: Path) -> None:
    """Runs every command in a folder with a checkout's code; what they print goes to files. SystemExit if one fails."""
    # Of several virtual devices none: what a mesh may change is not the question.
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    (here / "printed").mkdir()
    for number, command in enumerate(COMMANDS):
        name = f"{number:02}-{command.split()[2]}"
        start = time.monotonic()
        done = subprocess.run([python, *command.split()], cwd=here, env=environment, capture_output=True)
        (here / "printed" / f"{name}.out").write_bytes(done.stdout)
        (here / "printed" / f"{name}.err").write_bytes(done.stderr)
        print(f"  {checkout.name} {command}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            raise SystemExit(f"{command} failed in {here}:\n{done.stderr.decode(errors='replace')[-3000:]}")


# --- what is compared ---------------------------------------------------------------------------------------------


def numbers_of(here: Path) -> dict[str, Any]:
    """What a recipe computed, as plain values: exact floats, and sha256 of files."""
    numbers: dict[str, Any] = {"steps": {}, "checkpoints": {}, "files": {}}
    for run in ("cpt", "rpo"):
        rows = [json.loads(line) for line in (here / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            raise SystemExit(f"{here}/runs/{run}/metrics.jsonl does not hold each of {STEPS} steps once")
        numbers["steps"][run] = {
            str(row["step"]): {name: value for name, value in row.items() if name not in TIMINGS | {"step"}}
            for row in rows
        }
    for run in ("models/base", "runs/cpt", "runs/rpo"):
        for folder in sorted((here / run / "checkpoints").iterdir()):
            meta = json.loads((folder / "meta" / "_strings.json").read_text())
            numbers["checkpoints"][f"{run}/{folder.name}"] = {
                name: value for name, value in meta.items() if name.startswith("digests.") or name == "base.fingerprint"
            }
    for folder in ("stores", "exports", "results"):
        for file in sorted(path for path in (here / folder).rglob("*") if path.is_file() and path.name not in TEXTS):
            numbers["files"][str(file.relative_to(here))] = digest(file)
    scores = here / "printed" / "11-score.out"
    numbers["files"][str(scores.relative_to(here))] = digest(scores)
    return numbers


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, part in value.items() for name, leaf in flat(part, f"{prefix}/{key}").items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """A line for each value that is not the same in both."""
    first, second = flat(first), flat(second)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            yield f"{name}: {first.get(name)!r}, {second.get(name)!r}"


def describe(numbers: dict[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    last = {run: steps[str(STEPS)]["loss"] for run, steps in numbers["steps"].items()}
    return f"{len(flat(numbers))} numbers, sha256 {total[:16]}, losses of step {STEPS} {last}"


# --- the world ----------------------------------------------------------------------------------------------------


def make_world(here: Path) -> None:
    """A tokenizer, a random checkpoint in Hugging Face's format, a corpus, pairs, an exam, predictions and configs."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    draw = random.Random(0)
    make_checkpoint(here / "hf")
    documents = [{"text": text(draw, draw.randrange(3, 60))} for _ in range(200)]
    # Written as the prompts ask, so that answers can be read of which some are right.
    documents += [
        {"text": f"{prompt_of(asked)} {asked['answer']}\n"}
        for asked in (question(draw, number) for number in range(400))
    ]
    write_lines(here / "corpus.jsonl", documents)
    write_lines(
        here / "pairs.jsonl",
        (
            {
                "prompt": prompt_of(question(draw, number)),
                "chosen": f" {draw.choice(ANSWERS)}\n",
                "rejected": f" {text(draw, draw.randrange(1, 8))}",
            }
            for number in range(120)
        ),
    )
    questions = [question(draw, number) for number in range(40)]
    write_lines(here / "exam.jsonl", questions)
    (here / "predictions").mkdir()
    for system in ("first", "second"):
        rows = []
        for asked in questions:
            letter = asked["answer"] if draw.random() < 0.5 else draw.choice(ANSWERS)
            said = draw.choice((letter, f"答え: {letter}", f"The answer is {letter}.", f"{letter}か、{letter}です", ""))
            rows.append({"id": asked["id"], "text": said, "finish_reason": draw.choice(("stop", "length"))})
        write_lines(here / "predictions" / f"{system}.jsonl", rows)
    (here / "cpt.yaml").write_text(CPT)
    (here / "rpo.yaml").write_text(RPO)


def question(draw: random.Random, number: int) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": text(draw, draw.randrange(1, 4)),
        "choices": draw.sample(WORDS, len(ANSWERS)),
        "answer": draw.choice(ANSWERS),
        "section": draw.choice("AB"),
        "points": draw.choice((1, 3)),
    }


def prompt_of(asked: dict[str, Any]) -> str:
    """A question as the template `plain` puts it, asking for the answer alone."""
    choices = "".join(f"{letter}: {choice}\n" for letter, choice in zip(ANSWERS, asked["choices"], strict=True))
    return f"問題: {asked['question']}\n{choices}答え:"


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)) + "."


def write_lines(file: Path, rows: Any) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_checkpoint(folder: Path) -> None:
    """A random Qwen2 with a byte-level tokenizer trained here, the same each time."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [text(random.Random(3), 40), "The answer is b. 答え: c", "\n".join(f"{letter}:" for letter in ANSWERS)], trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(MODEL, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 2]}))
    save_file(dict(random_weights()), folder / "model.safetensors", metadata={"format": "pt"})


def random_weights() -> Iterator[tuple[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    hidden, width, vocabulary = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    keys = hidden // MODEL["num_attention_heads"] * MODEL["num_key_value_heads"]

    def normal(*shape: int, std: float, mean: float = 0.0) -> np.ndarray:
        return (mean + std * draw.standard_normal(shape)).astype(np.float32)

    yield "model.embed_tokens.weight", normal(vocabulary, hidden, std=0.3)
    for layer in range(MODEL["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, size in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{block}.self_attn.{name}_proj.weight", normal(size, hidden, std=hidden**-0.5)
            yield f"{block}.self_attn.{name}_proj.bias", normal(size, std=0.3)
        yield f"{block}.self_attn.o_proj.weight", normal(hidden, hidden, std=hidden**-0.5)
        yield f"{block}.mlp.gate_proj.weight", normal(width, hidden, std=hidden**-0.5)
        yield f"{block}.mlp.up_proj.weight", normal(width, hidden, std=hidden**-0.5)
        yield f"{block}.mlp.down_proj.weight", normal(hidden, width, std=width**-0.5)
        yield f"{block}.input_layernorm.weight", normal(hidden, std=0.2, mean=1.0)
        yield f"{block}.post_attention_layernorm.weight", normal(hidden, std=0.2, mean=1.0)
    yield "model.norm.weight", normal(hidden, std=0.2, mean=1.0)
    yield "lm_head.weight", normal(vocabulary, hidden, std=0.3)


if __name__ == "__main__":
    sys.exit(main())

"""Sampling on a CPU: our generator beside `generate` of `transformers`, the same weights and prompts, in float32.

    python -m benchmarks.sampling [--rounds 5] [--batch 16] [--prompt 128] [--new 128]

Nothing ends a completion early, so both make the same number of tokens. A last line is of four times as many prompts as
the most at a time, of lengths from a quarter of `--prompt` up, in one order for both. The two take turns, so that a
machine whose speed drifts is fair to both; the ratio of medians is what to read.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}  # the latter as in benchmarks.rpo

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from benchmarks.rpo import Regime, make_model, write_pairs
from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import load_model
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.data.prepare.preference_pairs import read_pairs
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.evaluation.sampling import SamplingParams
from medllm_jax.inference.generator import Generator

_TEMPERATURE = 0.8
_GOAL = 3.0


def ours(run: Path, hf: Path, prompts: list[str], batch: int, new: int) -> Callable[[], int]:
    """Completes all prompts, so many at a time; returns the number of new tokens."""
    model = load_model(open_checkpoint(run), PrecisionConfig(compute="float32"), make_mesh(MeshConfig()))
    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    beyond = [model.config.vocab_size]  # a token that is never drawn
    generator = Generator(model, tokenizer, beyond, batch)
    sampling = SamplingParams(max_new_tokens=new, temperature=_TEMPERATURE)
    return lambda: sum(len(completion.tokens) for completion in generator(prompts, sampling))


def theirs(hf: Path, prompts: list[str], batch: int, new: int) -> Callable[[], int]:
    """The same with transformers."""
    model = Qwen2ForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    model.generation_config.eos_token_id = None
    settings = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

    def complete(some: list[str]) -> int:
        rows = tokenizer(some)["input_ids"]
        width = max(map(len, rows))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        outputs = model.generate(tokens, attention_mask=mask, max_new_tokens=new, **settings)[:, width:]
        tokenizer.batch_decode(outputs)
        return outputs.numel()

    def run() -> int:
        return sum(complete(prompts[start : start + batch]) for start in range(0, len(prompts), batch))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts at a time; default 1 and 16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default 128)")
    parser.add_argument("--new", type=int, default=128, help="tokens to make (default 128)")
    options = parser.parse_args()
    versions = ", ".join(f"{package} {version(package)}" for package in ("jax", "torch", "transformers"))
    print(f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, {versions}")
    print(f"load averages at the start: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        hf, run = make_model(folder)
        most = max(options.batch)
        alike = _prompts(folder / "alike.jsonl", Regime(options.prompt, 2), most)
        unlike = _prompts(folder / "unlike.jsonl", Regime(options.prompt, 16, spread=0.25), 4 * most)
        print(
            "\n| prompts, at a time | ours, tokens/s | transformers, tokens/s | times | CPU s, ours | theirs | times |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        lines = [(str(batch), alike[:batch], batch) for batch in options.batch]
        for label, prompts, batch in [*lines, (f"{len(unlike)} of unlike lengths, {most}", unlike, most)]:
            contenders = {
                "ours": ours(run, hf, prompts, batch, options.new),
                "theirs": theirs(hf, prompts, batch, options.new),
            }
            measure(contenders, label, options.rounds)


def _prompts(file: Path, regime: Regime, number: int) -> list[str]:
    write_pairs(file, regime, number)
    return [pair.sides[0] for pair in read_pairs([str(file)], "error", RejectionCounts())]


def measure(contenders: dict[str, Callable[[], int]], label: str, rounds: int) -> None:
    """Prints a line of the table."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, complete in contenders.items():
            start, cpu = time.perf_counter(), time.process_time()
            tokens = complete()
            if turn:  # the first turn compiles
                speeds[name].append(tokens / (time.perf_counter() - start))
                seconds[name].append(time.process_time() - cpu)
    here, there = (statistics.median(speeds[name]) for name in contenders)
    cpu_here, cpu_there = (statistics.median(seconds[name]) for name in contenders)
    speed = f"{here:,.0f} | {there:,.0f} | {here / there:.2f}"
    cpu = f"{cpu_here:.2f} | {cpu_there:.2f} | {cpu_there / cpu_here:.2f} (goal {_GOAL:g})"
    print(f"| {label} | {speed} | {cpu} |", flush=True)


if __name__ == "__main__":
    main()

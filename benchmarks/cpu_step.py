"""Training step on a CPU: ours beside a plain torch loop on `transformers`, the same model, rows and optimizer.

    python -m benchmarks.cpu_step [--rounds 5] [--rows 8] [--length 512]

The two take turns, so that a machine whose speed drifts is fair to both; the ratio of medians is what to read.
"""

import argparse
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}  # the latter as in benchmarks.rpo

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from medllm_jax.config.schema import DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig, RunConfig
from medllm_jax.data.batch import batch_of
from medllm_jax.data.prefetch import put_batch
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import random_params
from medllm_jax.training.programs import train_program
from medllm_jax.training.resolve import resolve

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def ours(rows: np.ndarray):
    """A function that makes one step, by the program that `medllm train` compiles."""
    config = RunConfig(
        run="none",
        steps=1000,
        data=DataConfig(store="none", batch_size=len(rows)),
        model=ModelConfig(**SHAPE),
        precision=PrecisionConfig(compute="float32"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    mesh = make_mesh(config.mesh)
    program = train_program(resolve(config), mesh)
    state = program.initialise(random_params(program.model, seed=0))
    batch = np.zeros((len(rows), 3, rows.shape[1]), np.int32)
    batch[:, 0], batch[:, 1] = rows, 1

    def run() -> float:
        nonlocal state
        state, metrics = program.step(state, put_batch(batch_of(batch, "cpt"), mesh), {})
        return float(metrics["loss"])

    return run


def theirs(rows: np.ndarray):
    """The same with torch."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.tensor(rows, dtype=torch.long)

    def run() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    rows = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (options.rows, options.length)).astype(np.int32)
    contenders = {"medllm_jax": ours(rows), "torch + transformers": theirs(rows)}
    clocks = {"s a step": time.perf_counter, "CPU-s a step": time.process_time}
    taken: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        for name, run in contenders.items():
            start = [clock() for clock in clocks.values()]
            run()
            if turn:  # the first turn compiles
                taken[name].append([clock() - begun for clock, begun in zip(clocks.values(), start, strict=True)])
    medians = {name: np.median(turns, axis=0) for name, turns in taken.items()}
    print("".join(f"{word:>22}" for word in ("", *clocks, "tokens/s")))
    for name, (wall, cpu) in medians.items():
        print(f"{name:>22}{wall:22.3f}{cpu:22.3f}{options.rows * options.length / wall:22,.0f}")
    ours_, theirs_ = medians.values()
    wall, cpu = (a / b for a, b in zip(ours_, theirs_, strict=True))
    print(f"ours takes {wall:.2f} of their time, {cpu:.2f} of their CPU seconds")


if __name__ == "__main__":
    main()

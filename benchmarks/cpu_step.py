"""Training step on a CPU: ours beside a plain torch loop on `transformers`, the same model, rows and optimizer.

    python -m benchmarks.cpu_step [--rounds 5] [--rows 8] [--length 512]

The two take turns, so that a machine whose speed drifts is fair to both; the ratio of medians is what to read.
"""

import argparse
import functools
import statistics
import time

import jax
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from medllm_jax.checkpoint.train_state import new_state
from medllm_jax.config.schema import MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, PrecisionConfig
from medllm_jax.data.batch import batch_of
from medllm_jax.data.prefetch import put_batch
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import abstract_model, random_params
from medllm_jax.training.losses import objective
from medllm_jax.training.optimizer import make_optimizer, make_schedule
from medllm_jax.training.step import train_step

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
    """A function that makes one step."""
    mesh = make_mesh(MeshConfig())
    model = abstract_model(ModelConfig(**SHAPE), PrecisionConfig(compute="float32"), mesh)
    settings = OptimizerConfig(learning_rate=1e-4)
    optimizer, schedule = make_optimizer(settings, steps=1000), make_schedule(settings, steps=1000)
    state = new_state(random_params(model, seed=0), optimizer, seed=0)
    loss = objective(ObjectiveConfig())
    step = jax.jit(
        functools.partial(train_step, model=model, loss=loss, optimizer=optimizer, schedule=schedule, accumulate=1),
        donate_argnums=0,
    )
    batch = np.zeros((len(rows), 3, rows.shape[1]), np.int32)
    batch[:, 0], batch[:, 1] = rows, 1

    def run() -> float:
        nonlocal state
        state, metrics = step(state, put_batch(batch_of(batch, "cpt"), mesh))
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
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':22}{'s a step':>10}{'tokens/s':>10}")
    for name, median in medians.items():
        print(f"{name:22}{median:10.3f}{options.rows * options.length / median:10,.0f}")
    print(f"ours takes {medians['medllm_jax'] / medians['torch + transformers']:.2f} of their time")


if __name__ == "__main__":
    main()

"""What the benchmark of preference training compares, each run in a process of its own.

    python -m benchmarks.rpo_contenders NAME '{"argument": ...}'

runs one and prints, as JSON on its last line, what it measured. A process imports the packages of its own contender
alone, so that each may come from another environment.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BETA, LEARNING_RATE = 0.1, 1e-6


class _Clock:
    """Notes when steps end."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []

    def note(self) -> None:
        self._ends.append((time.perf_counter(), time.process_time()))

    def pace(self, warm_up: int, pairs: float) -> dict[str, Any]:
        """Of the median step after the warm-up: step, its seconds; seconds and cpu, those of one of its pairs."""
        steps = zip(self._ends[warm_up - 1 :], self._ends[warm_up:], strict=False)
        walls, cpus = zip(*((end[0] - start[0], end[1] - start[1]) for start, end in steps), strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        return {"seconds": wall / pairs, "cpu": cpu / pairs, "step": wall, "pairs": pairs}


# --- ours ------------------------------------------------------------------------------------------------------------


def _config(run: str, store: str, rows: int, steps: int) -> Any:
    from medllm_jax.config.schema import (
        DataConfig,
        InitConfig,
        ObjectiveConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
    )
    from medllm_jax.training.resolve import resolve

    config = RunConfig(
        run=f"{store}-run",
        steps=steps,
        data=DataConfig(store=store, batch_size=rows),
        init=InitConfig(checkpoint=run),
        precision=PrecisionConfig(params="float32", compute="float32"),
        objective=ObjectiveConfig(name="rpo", beta=BETA, alpha=1.0),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
    )
    return resolve(config)


def reference(run: str, store: str, rows: int) -> dict[str, Any]:
    """Caches the reference's log-probabilities beside the pairs, as `medllm reference` does; compiles too."""
    from medllm_jax.training.reference import cache_reference

    start = time.perf_counter()
    pairs = cache_reference(_config(run, store, rows, 1))
    return {"seconds": (time.perf_counter() - start) / pairs, "pairs": pairs}


def ours(run: str, store: str, rows: int, warm_up: int, steps: int) -> dict[str, Any]:
    """The step that `medllm train` compiles, on the batches that it reads."""
    from medllm_jax.checkpoint.fingerprint import model_fingerprint
    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.checkpoint.load_model import initial_weights
    from medllm_jax.data.prefetch import put_batch
    from medllm_jax.data.reference_log_probs import read_references
    from medllm_jax.distributed.sharding import make_mesh
    from medllm_jax.model.abstract import merge_params
    from medllm_jax.training.programs import train_program
    from medllm_jax.training.setup import open_rows, open_stream

    config = _config(run, store, rows, warm_up + steps)
    stored, mesh = open_rows(config, config.data.stores), make_mesh(config.mesh)
    program = train_program(config, mesh)
    params, frozen, _ = initial_weights(program.model, open_checkpoint(run), config.seed)
    scores = read_references(stored, model_fingerprint(merge_params(params, frozen)))
    state = program.initialise(params)
    clock, losses, pairs = _Clock(), [], []
    with open_stream(config, stored, 0, scores) as stream:
        for _ in range(warm_up + steps):
            state, metrics = program.step(state, put_batch(next(stream).arrays, mesh), frozen)
            losses.append(float(metrics["loss"]))
            pairs.append(float(metrics["pairs"]))
            clock.note()
    loss = sum(loss * count for loss, count in zip(losses, pairs, strict=True)) / sum(pairs)
    return clock.pace(warm_up, statistics.mean(pairs[warm_up:])) | {"loss": loss}


def flops(run: str, store: str, layouts: dict[str, tuple[int, int, int]]) -> dict[str, Any]:
    """GFLOPs by XLA's own analysis of the compiled programs: of a step, and of scoring the same rows.

    layouts: name -> rows, tokens a row, and pairs a row. The analysis counts the body of a loop once, however often
    it runs: blocks are unrolled here.
    """
    import functools

    import jax

    from medllm_jax.distributed.sharding import make_mesh
    from medllm_jax.training.programs import abstract_batch, score_program, train_program

    jax.lax.scan = functools.partial(jax.lax.scan, unroll=True)
    found = {}
    for name, (rows, length, pairs) in layouts.items():
        config = _config(run, store, rows, 1)
        mesh = make_mesh(config.mesh)
        program, batch = train_program(config, mesh), abstract_batch(mesh, rows, length, pairs)
        score = score_program(program.model.structure, mesh, pairs, config.objective.vocab_chunks)
        lowered = {
            "step": program.step.lower(program.abstract, batch, {}),
            "score": score.lower(program.abstract.params, batch),
        }
        found[name] = {kind: program.compile().cost_analysis()["flops"] / 1e9 for kind, program in lowered.items()}
    return found


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl(model: str, pairs: str, batch: int, warm_up: int, steps: int, cached: bool, output: str) -> dict[str, Any]:
    """DPO and SFT mixed, by TRL's own trainer from text on: float32, and nothing computed twice to save memory.

    (Its `padding_free` is out of order at 1.16: the trainer says so and pads.)
    """
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    clock = _Clock()

    class Noting(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            clock.note()

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = datasets.load_dataset("json", data_files=pairs, split="train", cache_dir=f"{output}/cache")
    arguments = DPOConfig(
        output_dir=output,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        beta=BETA,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=batch,
        max_steps=warm_up + steps,
        logging_steps=warm_up + steps,
        precompute_ref_log_probs=cached,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Noting()])
    trainer.train()
    return clock.pace(warm_up, batch) | {"loss": float(trainer.state.log_history[0]["loss"])}


# --- Tunix -----------------------------------------------------------------------------------------------------------


def tunix(model: str, pairs: str, batch: int, lengths: tuple[int, int], warm_up: int, steps: int) -> dict[str, Any]:
    """DPO by Tunix's own trainer, its model read from the same file. It has no NLL term beside DPO.

    lengths: that it pads prompts and responses to. The reference is computed in every step, as it always is there.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import AutoTokenizer
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2.params import create_model_from_safe_tensors
    from tunix.sft.dpo.dpo_trainer import DataInput, DPOTrainer, DPOTrainingConfig

    shape = json.loads((Path(model) / "config.json").read_text())
    config = qwen2.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["rms_norm_eps"],
        use_tied_embedding=shape["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    policy, anchor = (create_model_from_safe_tensors(model, config, mesh, jnp.float32) for _ in range(2))
    lines = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    clock = _Clock()

    def batches() -> Iterator[Any]:
        for first in range(0, len(lines), batch):
            part = lines[first : first + batch]
            ended = [[line[side] + tokenizer.eos_token for line in part] for side in ("chosen", "rejected")]
            yield DataInput([line["prompt"] for line in part], *ended)
            clock.note()

    options = DPOTrainingConfig(
        eval_every_n_steps=10**9,
        max_steps=warm_up + steps,
        max_inflight_computations=1,
        beta=BETA,
        max_prompt_length=lengths[0],
        max_response_length=lengths[1],
    )
    optimizer = optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=0.0)
    with mesh:
        DPOTrainer(policy, anchor, optimizer, options, tokenizer).train(batches())
    return clock.pace(warm_up, batch)


CONTENDERS = {function.__name__: function for function in (reference, ours, flops, trl, tunix)}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu"}
    print("\n" + json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))

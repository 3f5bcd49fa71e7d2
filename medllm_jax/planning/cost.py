"""What a run comes to: tokens and epochs, hours and chip-hours, checkpoints in the bucket, the wait at the start.

Arithmetic alone: how long a step takes is told by a plan, or follows from an MFU that the caller assumes.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax

from medllm_jax.checkpoint.train_state import new_state
from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.chips import Topology, chips_of
from medllm_jax.distributed.flops import train_flops
from medllm_jax.distributed.mesh_sizes import mesh_sizes
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import abstract_model, number_of
from medllm_jax.terminal.progress import duration, size_in_words
from medllm_jax.training.optimizer import make_optimizer
from medllm_jax.training.resolve import ResolvedConfig

READ = 1e9  # bytes a second that a host is taken to read from a bucket
_CHIPS_PER_HOST = 4


def seconds_at(mfu: float, config: ResolvedConfig, topology: Topology, sequence_length: int) -> float:
    """Seconds of a training step that reaches an MFU (0 to 1)."""
    needed = train_flops(config.model, config.data.batch_size, sequence_length, config.adapter)
    return needed / (mfu * topology.chip.flops * chips_of(topology) * topology.chip.devices)


def run_cost(
    config: ResolvedConfig,
    topology: Topology,
    *,
    sequence_length: int,
    seconds: float | None = None,
    mfu: float | None = None,
    compile_seconds: float | None = None,
    tokens: int | None = None,
    store_rows: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """What a training run comes to, as plain values, whose keys are in docs/plan.md; null what can't be known.

    Args:
      sequence_length: tokens of a row; padding counts, since it is computed.
      seconds: of a step, where it is known.
      mfu: that a step is assumed to reach, where its seconds are not known.
      compile_seconds: that compiling takes.
      tokens: of the whole run, instead of what the config's steps or epochs read.
      store_rows: rows of the config's stores, all of them.
      price: of a chip-hour.
    """
    if seconds is None and mfu is not None:
        seconds = seconds_at(mfu, config, topology, sequence_length)
    else:
        mfu = None
    in_step = config.data.batch_size * sequence_length
    steps = _steps(config, None if tokens is None else tokens / in_step, store_rows)
    chips = chips_of(topology)
    hours = None if steps is None or seconds is None else steps * seconds / 3600
    chip_hours = None if hours is None else hours * chips
    state, weights = _bytes(config)
    replicas = mesh_sizes(config.mesh, chips * topology.chip.devices)["data"]
    # Each replica of the weights is read whole, by the hosts that hold it.
    read = weights * replicas / max(1, chips // _CHIPS_PER_HOST) / READ if config.init.checkpoint else 0.0
    return {
        "steps": steps,
        "tokens_in_a_step": in_step,
        "tokens": None if steps is None else steps * in_step,
        "epochs": None if steps is None or store_rows is None else steps * config.data.batch_size / store_rows,
        "seconds_in_a_step": seconds,
        "assumed_mfu": mfu,
        "hours": hours,
        "chip_hours": chip_hours,
        "price": None if chip_hours is None or price is None else chip_hours * price,
        "checkpoint_bytes": state,
        "kept": config.checkpoint.keep,
        "kept_bytes": state * config.checkpoint.keep,
        "initial_weights_bytes": weights if config.init.checkpoint else 0,
        "read_seconds": read,
        "compile_seconds": compile_seconds,
    }


def as_lines(cost: dict[str, Any]) -> Iterator[str]:
    """`run_cost` in words."""
    in_step = f"{cost['tokens_in_a_step']:,} tokens"
    if cost["steps"] is None:
        yield f"the run: its steps follow from data.epochs and the store, which was not read; {in_step} a step"
    else:
        epochs = "" if cost["epochs"] is None else f", {cost['epochs']:,.2f} epochs of the store"
        yield f"the run: {cost['steps']:,} steps of {in_step}: {cost['tokens']:,} tokens{epochs}"
    if cost["hours"] is not None:
        price = "" if cost["price"] is None else f"; price {cost['price']:,.0f}"
        step = f"at {cost['seconds_in_a_step']:,.2f} s a step"
        if cost["assumed_mfu"] is not None:
            step += f" (an MFU of {cost['assumed_mfu']:.0%} is assumed; medllm plan estimates it)"
        yield f"time: {cost['hours']:,.1f} hours {step}, {cost['chip_hours']:,.0f} chip-hours{price}"
    one, kept = cost["checkpoint_bytes"], cost["kept_bytes"]
    yield (
        f"checkpoints: {size_in_words(one)} each; the newest {cost['kept']}, {size_in_words(kept)}, are kept in the "
        f"run folder, and {size_in_words(kept + one)} stand there while one more is written"
    )
    waits = []
    if cost["initial_weights_bytes"]:
        read = (
            f"reading {size_in_words(cost['initial_weights_bytes'])} of weights (bfloat16), {READ / 1e9:g} GB/s a host"
        )
        waits.append(f"{duration(cost['read_seconds'])} of {read}")
    compiling = cost["compile_seconds"]
    waits.append("compiling, minutes" if compiling is None else f"{duration(compiling)} of compiling, as it took here")
    yield f"to the first step, once the machines are there: about {' and '.join(waits)}"


def _steps(config: ResolvedConfig, asked: float | None, store_rows: int | None) -> int | None:
    if asked is not None:
        return max(1, math.ceil(asked))
    if config.data.epochs is None:
        return config.steps
    if store_rows is None:
        return None
    return max(1, math.ceil(store_rows * config.data.epochs / config.data.batch_size))


def _bytes(config: ResolvedConfig) -> tuple[int, int]:
    """Bytes of a checkpoint, and of all weights in bfloat16."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
    model = abstract_model(config.model, config.precision, mesh, adapter=config.adapter)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = jax.eval_shape(functools.partial(new_state, optimizer=optimizer, seed=0), model.abstract)
    whole = abstract_model(config.model, config.precision, mesh).abstract
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)), 2 * number_of(whole)

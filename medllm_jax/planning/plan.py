"""Plans a run on TPUs that are not there: compiles its programs for them, and estimates their time.

Nothing is executed and no store or checkpoint is read; the caller gives the length of rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import DataConfig, RunConfig
from medllm_jax.distributed.chips import MARGIN, Chip, Topology, chips_of, ici_bandwidth
from medllm_jax.distributed.flops import decode_flops, forward_flops, prefill_flops, train_flops
from medllm_jax.errors import UserError
from medllm_jax.planning.activations import StepMemory, step_memory
from medllm_jax.planning.advice import advice
from medllm_jax.planning.compiling import Compiled, compile_programs, require_compiler
from medllm_jax.planning.cost import run_cost
from medllm_jax.planning.estimate import (
    ICI_EFFICIENCY,
    KERNEL_EFFICIENCY,
    LATENCY,
    Machine,
    TimeEstimate,
    estimate,
)
from medllm_jax.planning.hlo import parse
from medllm_jax.planning.search import try_settings
from medllm_jax.ranges import NewTokens, PairsPerRow, Price, Ranged, Rows, SequenceLength, Tokens
from medllm_jax.training.resolve import ResolvedConfig, resolve

DECODE_CHUNK = 16  # tokens that one call of the decoding program adds


@dataclasses.dataclass(frozen=True)
class PlanOptions(Ranged):
    """What to plan. sequence_length: tokens of a row, or of a prompt; new_tokens: tokens of a completion; tokens: those
    of the whole run, if other than the config's steps read; store_rows: rows of the config's stores, where they were
    read; price: of a chip-hour."""

    topology: Topology
    program: Literal["train", "reference", "generate"] = "train"
    sequence_length: SequenceLength = 4096
    pairs_per_row: PairsPerRow = 2
    new_tokens: NewTokens = 512
    tokens: Tokens | None = None
    store_rows: Rows | None = None
    price: Price | None = None


def plan(
    config: RunConfig,
    options: PlanOptions,
    *,
    memory_only: bool = False,
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The report as plain values, whose schema is in docs/plan.md; UserError where the config does not fit the mesh.

    memory_only: seconds instead of minutes, and no estimate of time. show: is called with a line at each stage.
    """
    config = resolve(config, elsewhere=True)
    compiled = compile_programs(request_of(config, options), memory_only=memory_only, show=show)
    return report_of(config, options, compiled)


def request_of(config: RunConfig, options: PlanOptions) -> dict[str, Any]:
    """The request to the compiling process (planning/child.py)."""
    return {
        "config": to_plain(config),
        "topology": options.topology.name,
        "slices": options.topology.slices,
        "program": options.program,
        "sequence_length": options.sequence_length,
        "pairs_per_row": options.pairs_per_row,
        "new_tokens": options.new_tokens,
    }


def report_of(config: ResolvedConfig, options: PlanOptions, compiled: list[Compiled]) -> dict[str, Any]:
    """The report of `plan` on compiled programs."""
    devices = len(compiled[0].places)
    report = {
        "topology": options.topology.name,
        "slices": options.topology.slices,
        "devices": devices,
        "chips": devices // options.topology.chip.devices,
        "mesh": compiled[0].mesh,
        "program": options.program,
        "objective": config.objective.name,
        "rows": _rows(config.data, options.program),
        "accumulate": config.data.accumulate,
        "sequence_length": options.sequence_length,
        "remat": config.remat,
        "vocab_chunks": config.objective.vocab_chunks,
        "assumed": _assumed(options.topology),
        "compile_seconds": round(compiled[0].seconds, 1),
        "programs": [_program(config, options, program) for program in compiled],
    }
    if options.program == "train":
        report["run"] = _run(config, options, report)
    return report | {"advice": advice(config, report)}


def _run(config: ResolvedConfig, options: PlanOptions, report: dict[str, Any]) -> dict[str, Any]:
    """What the whole run comes to."""
    (program,) = report["programs"]
    time = program["time"]
    return run_cost(
        config,
        options.topology,
        sequence_length=options.sequence_length,
        seconds=time and time["seconds"],
        compile_seconds=time and report["compile_seconds"],
        tokens=options.tokens,
        store_rows=options.store_rows,
        price=options.price,
    )


def plan_fastest(config: RunConfig, options: PlanOptions, show: Callable[[str], None]) -> dict[str, Any]:
    """The report of the fastest settings that fit, with all that were tried; show: is called with a line for each."""
    if options.program != "train":
        raise UserError(f"--search is for training: --program {options.program} has no settings to try")
    config = resolve(config, elsewhere=True)
    require_compiler()  # else each of what is tried would fail for want of it
    topology = options.topology
    devices = chips_of(topology) * topology.chip.devices
    attempt = functools.partial(plan, options=options)
    found = try_settings(config, attempt, devices, topology.slices, show)
    return found.best | {"search": {"tried": found.tried, "overrides": found.overrides}}


def _rows(data: DataConfig, program: str) -> int:
    """Rows that one call of a program reads: a batch of training, a micro-batch of the others."""
    return data.batch_size if program == "train" else data.batch_size // data.accumulate


def _assumed(topology: Topology) -> dict[str, float]:
    """The rates that times are computed from, of one device; bytes and FLOPs a second."""
    chip = topology.chip
    return {
        "flops": chip.flops,
        "clock": chip.clock,
        "hbm_bandwidth": chip.bandwidth,
        "ici_bandwidth": ici_bandwidth(topology, [size > 1 for size in topology.sizes]) * ICI_EFFICIENCY,
        "dcn_bandwidth": chip.dcn,
        "collective_latency": LATENCY,
        "kernel_efficiency": KERNEL_EFFICIENCY,
    }


def _program(config: ResolvedConfig, options: PlanOptions, compiled: Compiled) -> dict[str, Any]:
    machine = Machine(options.topology, compiled.mesh, compiled.places)
    module = parse(compiled.hlo)
    estimated, rows = estimate(module, machine), _rows(config.data, options.program)
    flops = _flops(config, options, rows, compiled, estimated)
    return {
        "name": compiled.name,
        "refused": compiled.refused,
        "memory": _memory(options, compiled, step_memory(module)),
        "flops": flops,
        "collectives": [c._asdict() for c in estimated.collectives],
        "time": _time(options, rows, compiled, estimated, flops["model"]) if compiled.finished else None,
        "roofline_seconds": None if compiled.finished else estimated.seconds,
    }


def _memory(options: PlanOptions, compiled: Compiled, held: StepMemory) -> dict[str, Any]:
    """Bytes on one device."""
    memory, hbm = compiled.memory, options.topology.chip.hbm
    known = sum(compiled.bytes.values())
    return compiled.bytes | {
        "other_arguments": memory.arguments - known,
        "temporaries": memory.temporaries,
        "gradients": round(held.gradients),
        "activations": round(held.activations),
        "peak": memory.peak,
        "hbm": round(hbm),
        "share": memory.peak / hbm,
        "fits": compiled.refused is None and memory.peak <= hbm,
        "comfortable": compiled.refused is None and memory.peak <= hbm * (1 - MARGIN),
        "largest_temporaries": [{"bytes": size, "arrays": arrays} for size, arrays in memory.largest[:8]],
    }


def _flops(
    config: ResolvedConfig, options: PlanOptions, rows: int, compiled: Compiled, estimated: TimeEstimate
) -> dict[str, float]:
    """FLOPs of one run of a program, on one device: needed by the model, and in the compiled program."""
    length = options.sequence_length
    needed = {
        "train": lambda: train_flops(config.model, rows, length, config.adapter),
        "reference": lambda: forward_flops(config.model, rows, length),
        "prefill": lambda: prefill_flops(config.model, rows, length),
        "decode": lambda: DECODE_CHUNK * decode_flops(config.model, rows, length + options.new_tokens),
    }[compiled.name]()
    return {
        "model": needed / len(compiled.places),
        "compiled": estimated.flops + estimated.kernel_flops,
        "compiled_kernels": estimated.kernel_flops,
        "hbm_bytes": estimated.hbm_bytes,
    }


def _time(options: PlanOptions, rows: int, compiled: Compiled, estimated: TimeEstimate, model: float) -> dict[str, Any]:
    """Seconds of one call, and what they are made of. model: FLOPs of one device that the model needs."""
    chip, devices = options.topology.chip, len(compiled.places)
    tokens = rows * (DECODE_CHUNK if compiled.name == "decode" else options.sequence_length)
    time = {
        "seconds": estimated.seconds,
        "ideal_seconds": model / chip.flops,
        "mfu_estimate": model / chip.flops / estimated.seconds,
        "mfu_without_waits": model / chip.flops / (estimated.seconds - estimated.waits),
        "mfu_if_products_reach": {
            str(share): model / chip.flops / _with_products_at(share, estimated, chip) for share in (0.9, 0.8)
        },
        "waits": estimated.waits,
        "parts": [
            {"phase": phase, "kind": kind, "seconds": seconds}
            for (phase, kind), seconds in sorted(estimated.busy.items(), key=lambda item: -item[1])
        ],
        "loops": [{"source": source, "times": times, "seconds": each} for source, times, each in estimated.loops],
        "without_estimate": estimated.unknown,
        "tokens": tokens,
        "tokens_per_second": tokens / estimated.seconds,
    }
    if options.tokens is not None:
        hours = options.tokens / time["tokens_per_second"] / 3600
        time |= {"asked_tokens": options.tokens, "hours": hours}
        time["chip_hours"] = hours * devices / chip.devices
    return time


def _with_products_at(share: float, estimated: TimeEstimate, chip: Chip) -> float:
    """Seconds if matrix products took what they take at a share of the peak, where the compiler expects less."""
    products = sum(seconds for (_, kind), seconds in estimated.busy.items() if kind == "matrix products")
    return estimated.seconds + max(estimated.flops / (share * chip.flops) - products, 0.0)

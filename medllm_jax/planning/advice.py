"""Says whether a plan fits, and which settings would make it fit, with about how much memory each of them saves."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from medllm_jax.distributed.chips import GIB, MARGIN
from medllm_jax.training.resolve import ResolvedConfig

# Format -> bits of a weight, with the scales of its blocks.
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8.5, "int4": 4.5, "nf4": 4.5}


class _Change(NamedTuple):
    """A change of a setting. saves: bytes of a device, about."""

    saves: float
    text: str


def advice(config: ResolvedConfig, report: dict[str, Any]) -> list[str]:
    """Sentences about a report of `plan`, the verdict first."""
    sentences = [sentence for program in report["programs"] for sentence in _sentences(config, report, program)]
    if report["slices"] > 1:
        sentences.append(
            "the compiler can't be told that the axes of several slices are rings: gathers within a slice appear as "
            "all-reduces of twice the bytes, and times are too long; plan one slice for the time within it"
        )
    return sentences


def _sentences(config: ResolvedConfig, report: dict[str, Any], program: dict[str, Any]) -> Iterator[str]:
    memory, name = program["memory"], program["name"]
    hbm, peak = memory["hbm"], memory["peak"]
    if memory["comfortable"]:
        yield f"{name} fits: {(hbm - peak) / GIB:.1f} of {hbm / GIB:.1f} GiB are left on each device"
        if name == "train" and memory["share"] < 0.6 and config.remat in ("full", "attention", "dots"):
            yield "there is room to recompute less: a lighter remat is faster (--search tries them)"
        return
    if memory["fits"]:
        left = f"{(hbm - peak) / GIB:.1f} GiB are left on each device"
        yield f"{name} fits, but only {left}: {MARGIN:.0%} or more are safer"
    elif peak <= hbm:
        yield f"{name} can't be compiled for these devices: see what the compiler says"
    else:
        yield f"{name} does not fit: it needs {(peak - hbm) / GIB:.1f} GiB more than a device has"
    excess = peak - (1 - MARGIN) * hbm
    if excess <= 0:
        return
    changes = [change for change in _changes(config, report, program) if change.saves > hbm / 100]
    for saves, text in changes:
        yield f"{text} saves about {saves / GIB:.1f} GiB{', which is enough' if saves >= excess else ''}"
    if not any(saves >= excess for saves, _ in changes):
        yield f"{excess / GIB:.1f} GiB less would fit with room, for which none of these is enough alone"
    if name == "train":
        yield "--search tries remat, rows at a time, mesh and vocab_chunks, and prints the fastest that fit"


def _changes(config: ResolvedConfig, report: dict[str, Any], program: dict[str, Any]) -> Iterator[_Change]:
    """The changes that make a program smaller; those that leave the results of a run as they are come first."""
    memory, mesh, training = program["memory"], report["mesh"], program["name"] == "train"
    at_once = report["rows"] // (report["accumulate"] if training else 1)
    rows = at_once // (mesh["data"] * mesh["fsdp"])
    tokens = rows * report["sequence_length"]
    held = memory["activations"] if training else memory["temporaries"] + memory.get("cache", 0)
    if rows > 1:
        yield _Change(held / 2, f"twice the data.accumulate (a device computes {rows} rows at a time)")
    elif mesh["tensor"] == 1:
        yield _Change(held / 2, "mesh.tensor 2 with twice the data.accumulate (slower)")
    if program["name"] in ("train", "reference") and config.objective.vocab_chunks == 1:
        logits = (1 + training) * tokens * config.model.vocab_size * 4 / mesh["tensor"]
        yield _Change(logits * 15 / 16, "objective.vocab_chunks 16")
    if training and config.remat != "full":
        inputs = config.model.num_hidden_layers * tokens * config.model.hidden_size * 2
        yield _Change(held - inputs, "remat full (slower)")
    state, half = memory["peak"] - memory["temporaries"], memory["hbm"] / 2
    if state > half:
        split = mesh["fsdp"] * mesh["tensor"]
        yield _Change(
            state - half,
            f"mesh.fsdp over {math.ceil(state * split / half)} devices (all that stays, {state / GIB:.1f} GiB of each, "
            f"is split over {split} of {report['devices']} now)",
        )
    if training:
        yield from _changes_of_training(config, memory)
    elif config.adapter is None and program["name"] == "reference" and config.precision.params == "float32":
        yield _Change(memory["parameters"] / 2, "precision.params bfloat16")


def _changes_of_training(config: ResolvedConfig, memory: dict[str, Any]) -> Iterator[_Change]:
    adapter, batch = config.adapter, config.data.batch_size // config.data.accumulate
    if adapter is not None:
        for base in ("int8", "nf4"):
            if _BITS[base] < _BITS[adapter.base]:
                yield _Change(memory["frozen"] * (1 - _BITS[base] / _BITS[adapter.base]), f"adapter.base {base}")
        return
    if config.data.accumulate > 1:
        yield _Change(memory["gradients"] / 2, f"data.accumulate 1 and data.batch_size {batch} (no sums of gradients)")
    if config.optimizer.state_dtype == "float32":
        yield _Change(memory["optimizer"] / 2, "optimizer.state_dtype bfloat16 (coarser moments)")
    if config.precision.params == "float32":
        yield _Change(memory["parameters"] / 2, "precision.params bfloat16 (loses small updates)")
    whole = memory["parameters"] + memory["optimizer"] + memory["gradients"]
    base = memory["parameters"] * _BITS["nf4"] / _BITS[config.precision.params]
    yield _Change(whole - base, "training adapters on a base in nf4 instead (docs/adapters.md)")

"""Whether a plan fits, in words, and what would change that, by rule and with the numbers."""

import math
from collections.abc import Iterator
from typing import Any

from medllm_jax.config import RunConfig
from medllm_jax.planning.chips import GIB


def advice(config: RunConfig, report: dict[str, Any]) -> list[str]:
    """Sentences about a report of `plan`, the verdict first."""
    sentences = [sentence for program in report["programs"] for sentence in _sentences(config, report, program)]
    if report["slices"] > 1:
        sentences.append(
            "of several slices the compiler can't be told that their axes are rings: gathers within a slice appear as "
            "all-reduces of twice the bytes, and times are too long; plan one slice for the time within it"
        )
    return sentences


def _sentences(config: RunConfig, report: dict[str, Any], program: dict[str, Any]) -> Iterator[str]:
    memory, name = program["memory"], program["name"]
    hbm, peak, temporaries = memory["hbm"], memory["peak"], memory["temporaries"]
    state = peak - temporaries
    if memory["comfortable"]:
        yield f"{name} fits: {(hbm - peak) / GIB:.1f} of {hbm / GIB:.1f} GiB are left on each device"
    elif memory["fits"]:
        yield f"{name} fits, but only {(hbm - peak) / GIB:.1f} GiB are left on each device: 8 % or more are safer"
    elif peak <= hbm:
        yield f"{name} can't be compiled for these devices: see what the compiler says"
    else:
        yield f"{name} does not fit: it needs {(peak - hbm) / GIB:.1f} GiB more than a device has"
    if name != "train":
        return
    if memory["share"] < 0.6 and config.remat in ("full", "attention", "dots"):
        yield "there is room to recompute less: a lighter remat is faster (--search tries them)"
    if memory["comfortable"]:
        return
    yield from _smaller(config, report, program, state)


def _smaller(config: RunConfig, report: dict[str, Any], program: dict[str, Any], state: int) -> Iterator[str]:
    """What makes a training step smaller, each with what it saves by a count of bytes."""
    memory, mesh, model = program["memory"], report["mesh"], config.model
    hbm, devices = memory["hbm"], report["devices"]
    split = mesh["fsdp"] * mesh["tensor"]
    rows = report["rows"] // report["accumulate"] // (mesh["data"] * mesh["fsdp"])
    tokens = rows * report["sequence_length"]
    if state > hbm / 2:
        needed = math.ceil(state * split / (hbm / 2))
        yield (
            f"weights and optimizer alone take {state / GIB:.1f} GiB of a device: half of one is enough if they are "
            f"split over {needed} devices or more (mesh.fsdp; now {split} of {devices})"
        )
    if config.adapter is None and config.optimizer.state_dtype == "float32":
        yield f"optimizer.state_dtype bfloat16 saves {memory['optimizer'] / 2 / GIB:.1f} GiB, with coarser moments"
    if config.adapter is None and config.precision.params == "float32":
        yield f"precision.params bfloat16 saves {memory['parameters'] / 2 / GIB:.1f} GiB, and loses small updates"
    if rows > 1:
        yield f"a device computes {rows} rows at a time: twice the data.accumulate halves what they hold"
    elif mesh["tensor"] == 1:
        yield "a device computes one row at a time: mesh.tensor 2 halves what it holds, and costs time"
    if config.remat != "full":
        kept = model.num_hidden_layers * tokens * model.hidden_size * 2 / mesh["tensor"]
        yield f"remat full keeps {kept / GIB:.1f} GiB of the layers' activations and nothing else of them"
    if config.objective.vocab_chunks == 1:
        logits = tokens * model.vocab_size * 4 / mesh["tensor"]
        yield f"logits and their gradient take {2 * logits / GIB:.1f} GiB: objective.vocab_chunks 16 makes them a 16th"
    if config.data.accumulate > 1:
        yield f"sums of gradients take {memory['parameters'] / GIB:.1f} GiB: data.accumulate 1 needs none"

"""Tries settings that change a run's memory and time but not its results: memory first, then the time of the best."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from medllm_jax.config.schema import MeshConfig
from medllm_jax.errors import UserError
from medllm_jax.training.resolve import ResolvedConfig

# From the fastest to the smallest (`ResolvedConfig.remat`); `dots` is for adapters.
REMATS = ("elementwise", "attention_mlp", "attention_gate", "attention", "full")
_CHUNKS = (1, 8, 16)
_TENSORS = (1, 2)
_COMPILED_TO_THE_END = 2

Plan = Callable[..., dict[str, Any]]  # (config, memory_only=) -> report


class Found(NamedTuple):
    """tried: rows of the table; best: the report of the fastest; overrides: its settings, dotted key -> value."""

    tried: list[dict[str, Any]]
    best: dict[str, Any]
    overrides: dict[str, Any]


def try_settings(config: ResolvedConfig, plan: Plan, devices: int, slices: int, show: Callable[[str], None]) -> Found:
    """Tries remat, rows at a time, mesh and vocab_chunks around a config; UserError where nothing fits."""
    tried: list[dict[str, Any]] = []
    refusals: list[UserError] = []

    def measure(candidate: ResolvedConfig) -> dict[str, Any] | None:
        settings = settings_of(candidate)
        try:
            report = plan(candidate, memory_only=True)
        except UserError as error:
            show(f"{_text(settings)}: {error}")
            refusals.append(error)
            return None
        program = report["programs"][0]
        row = {
            "settings": settings,
            "gib": program["memory"]["peak"] / 2**30,
            "comfortable": program["memory"]["comfortable"],
            "tokens_per_second_at_most": report["rows"] * report["sequence_length"] / program["roofline_seconds"],
            "seconds": None,
            "mfu_estimate": None,
        }
        tried.append(row)
        show(f"{_text(settings)}: {row['gib']:.1f} GiB")
        return row | {"config": candidate}

    fitting = list(_lightest_that_fit(config, devices, slices, measure))
    if refusals and not tried:
        raise refusals[0]
    if not fitting:
        raise UserError("nothing that was tried fits: a larger topology is needed, or bfloat16 precision.params")
    fitting.sort(key=lambda row: -row["tokens_per_second_at_most"])
    for chunks in _CHUNKS:
        best = fitting[0]["config"]
        if chunks != best.objective.vocab_chunks and best.model.vocab_size % chunks == 0:
            row = measure(dataclasses.replace(best, objective=dataclasses.replace(best.objective, vocab_chunks=chunks)))
            if row and row["comfortable"]:
                fitting.append(row)
    fitting.sort(key=lambda row: -row["tokens_per_second_at_most"])

    reports = []
    for row in fitting[:_COMPILED_TO_THE_END]:
        report = plan(row["config"], memory_only=False)
        time = report["programs"][0]["time"]
        entry = next(entry for entry in tried if entry["settings"] == row["settings"])
        entry |= {"seconds": time["seconds"], "mfu_estimate": time["mfu_estimate"]}
        show(f"{_text(row['settings'])}: {time['tokens_per_second']:,.0f} tokens/s, MFU {time['mfu_estimate']:.1%}")
        reports.append((time["tokens_per_second"], row["settings"], report))
    _, overrides, report = max(reports, key=lambda entry: entry[0])
    return Found(tried, report, overrides)


def _lightest_that_fit(
    config: ResolvedConfig, devices: int, slices: int, measure: Callable
) -> Iterator[dict[str, Any]]:
    """For each mesh and number of rows at a time, the remat that recomputes least among those that fit."""
    for tensor in _TENSORS:
        fsdp = devices // slices // tensor
        if config.model.num_key_value_heads % tensor or config.model.hidden_size % fsdp:
            continue
        mesh = MeshConfig(data=slices, fsdp=fsdp, tensor=tensor)
        first = 0  # more rows at a time fit with no lighter remat than fewer did
        for accumulate in _accumulations(config, slices * fsdp):
            data = dataclasses.replace(config.data, accumulate=accumulate)
            for number in range(first, len(REMATS)):
                row = measure(dataclasses.replace(config, mesh=mesh, data=data, remat=REMATS[number]))
                if row and row["comfortable"]:
                    first = number
                    yield row
                    break
            else:
                break


def _accumulations(config: ResolvedConfig, parts: int) -> list[int]:
    """Numbers of micro-batches that give each device 1, 2 or 4 rows at a time."""
    wanted = [config.data.batch_size / (parts * rows) for rows in (1, 2, 4)]
    found = [int(accumulate) for accumulate in wanted if accumulate >= 1 and accumulate == int(accumulate)]
    if not found:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is no multiple of data x fsdp = {parts}: "
            "give a --data.batch_size that is"
        )
    return found


def settings_of(candidate: ResolvedConfig) -> dict[str, Any]:
    """The settings that the search sets, dotted, as the candidate has them."""
    return {
        "mesh.data": candidate.mesh.data,
        "mesh.fsdp": candidate.mesh.fsdp,
        "mesh.tensor": candidate.mesh.tensor,
        "data.accumulate": candidate.data.accumulate,
        "remat": candidate.remat,
        "objective.vocab_chunks": candidate.objective.vocab_chunks,
    }


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in settings.items())

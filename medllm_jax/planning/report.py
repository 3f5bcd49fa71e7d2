"""A plan as text."""

from collections.abc import Iterator, Sequence
from typing import Any

from medllm_jax.distributed.chips import GIB
from medllm_jax.distributed.mesh_sizes import mesh_text
from medllm_jax.planning.cost import as_lines

_KINDS = ("matrix products", "kernels", "everything else")


def as_text(plan: dict[str, Any]) -> str:
    """The report of a plan, for people."""
    return "\n".join(_lines(plan))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
    chips = f"{plan['chips']} chips, mesh {mesh_text(plan['mesh'])}"
    yield f"{plan['program']} ({plan['objective']}) on {slices}{plan['topology']}: {chips}"
    yield (
        f"{plan['rows']} rows of {plan['sequence_length']} tokens in {plan['accumulate']} micro-batches, "
        f"remat {plan['remat']}, vocab_chunks {plan['vocab_chunks']}; compiled in {plan['compile_seconds']:.0f} s"
    )
    for program in plan["programs"]:
        yield ""
        yield from _memory(program)
        yield ""
        if program["time"]:
            yield from _time(program)
            yield ""
        yield from _collectives(program)
    yield ""
    if "run" in plan:
        yield from as_lines(plan["run"])
        yield ""
    yield from plan["advice"]
    if "search" in plan:
        yield ""
        yield from _search(plan["search"])
    if any(program["time"] for program in plan["programs"]):
        yield ""
        yield _rates_of(plan["assumed"])
        yield "Times are estimates, by the compiler and by hand; nothing has run. What they leave out: docs/plan.md"


def _rates_of(assumed: dict[str, float]) -> str:
    giga = {name: f"{value / 1e9:,.4g}" for name, value in assumed.items()}
    return (
        f"Rates: {assumed['flops'] / 1e12:,.0f} TFLOP/s at {giga['clock']} GHz, {giga['hbm_bandwidth']} GB/s of "
        f"HBM, {giga['ici_bandwidth']} GB/s between the chips of a slice and {giga['dcn_bandwidth']} between slices, "
        f"kernels at {assumed['kernel_efficiency']:.0%} of the peak."
    )


def _search(search: dict[str, Any]) -> Iterator[str]:
    names = list(search["overrides"])
    rows = [
        (
            *(str(row["settings"][name]) for name in names),
            f"{row['gib']:.1f}",
            "yes" if row["comfortable"] else "no",
            f"{row['seconds']:.3f}" if row["seconds"] else "",
            f"{row['mfu_estimate']:.1%}" if row["seconds"] else "",
        )
        for row in search["tried"]
    ]
    yield from table((*names, "GiB", "fits", "seconds", "MFU (estimate)"), rows)
    yield "the fastest, as YAML:"
    sections: dict[str, list[str]] = {}
    for name, value in search["overrides"].items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(f"{key}: {value}")
    for section, settings in sections.items():
        yield f"  {section}: {{{', '.join(settings)}}}" if section else f"  {settings[0]}"


def _memory(program: dict[str, Any]) -> Iterator[str]:
    memory = program["memory"]
    groups = [
        name for name in ("parameters", "frozen", "optimizer", "batch", "cache", "other_arguments") if memory.get(name)
    ]
    yield from table(
        (f"memory of {program['name']}", "GiB a device"),
        [
            *((name.replace("_", " "), gib(memory[name])) for name in groups),
            *_temporaries(memory),
            ("total", gib(memory["peak"])),
            ("of its HBM", f"{gib(memory['hbm'])}  ({memory['share']:.1%})"),
        ],
    )
    yield "the largest temporaries (arrays that share a place in turn):"
    for entry in memory["largest_temporaries"][:5]:
        yield f"  {gib(entry['bytes'])}  {entry['arrays']}"
    if program["refused"]:
        yield f"the compiler: {program['refused'].splitlines()[0]}"


def _temporaries(memory: dict[str, Any]) -> list[tuple[str, str]]:
    known = [(name, memory[name]) for name in ("gradients", "activations") if memory[name]]
    rest = max(memory["temporaries"] - sum(size for _, size in known), 0)
    return [(name, gib(size)) for name, size in (*known, ("temporaries", rest))]


def _time(program: dict[str, Any]) -> Iterator[str]:
    time, flops = program["time"], program["flops"]
    phases = list(dict.fromkeys(part["phase"] for part in time["parts"]))
    seconds = {(part["phase"], part["kind"]): part["seconds"] for part in time["parts"]}
    rows = [
        (phase, *(f"{seconds.get((phase, kind), 0):.3f}" for kind in _KINDS), f"{_sum(seconds, phase):.3f}")
        for phase in phases
    ]
    rows.append(("waiting for collectives", "", "", "", f"{time['waits']:.3f}"))
    rows.append(("total", "", "", "", f"{time['seconds']:.3f}"))
    yield from table((f"seconds of {program['name']} (estimate)", *_KINDS, "all"), rows)
    yield (
        f"a device's FLOPs: {flops['model']:.3e} needed by the model, {flops['compiled']:.3e} in the program, "
        f"of them {flops['compiled_kernels']:.2e} in attention kernels; its HBM traffic: {flops['hbm_bytes']:.2e} bytes"
    )
    yield (
        f"MFU {time['mfu_estimate']:.1%} (estimate; {time['mfu_without_waits']:.1%} if no collective were waited for), "
        f"{time['tokens_per_second']:,.0f} tokens/s"
    )
    ifs = [f"{mfu:.1%} at {float(share):.0%}" for share, mfu in time["mfu_if_products_reach"].items()]
    yield f"if matrix products reach less of the peak than the compiler expects: {', '.join(ifs)}"
    if time["without_estimate"]:
        names = ", ".join(f"{count} {name}" for name, count in time["without_estimate"].items())
        yield f"without a compiler's estimate, timed by their bytes: {names}"
    if "hours" in time and program["name"] != "train":  # whose whole run has lines of its own
        yield f"{time['asked_tokens']:,} tokens: {time['hours']:,.1f} hours, {time['chip_hours']:,.0f} chip-hours"


def _sum(seconds: dict[tuple[str, str], float], phase: str) -> float:
    return sum(value for (of, _), value in seconds.items() if of == phase)


def _collectives(program: dict[str, Any]) -> Iterator[str]:
    rows = [
        (
            c["kind"],
            "+".join(c["axes"]) + (" (DCN)" if c["over"] == "dcn" else ""),
            f"{c['bytes'] / 2**20:,.1f}",
            f"{c['times']:,}",
            f"{c['bytes'] * c['times'] / GIB:,.1f}",
            "beside other work" if c["asynchronous"] else "waited for",
            "in a loop" if c["in_loop"] else "once",
            *([f"{c['waited']:.3f}"] if program["time"] else []),
        )
        for c in merged(program["collectives"])
    ]
    heads = ["collectives", "over", "MiB a device", "times", "GiB", "how", "where"]
    heads += ["exposed s"] if program["time"] else []
    yield from table(heads, rows) if rows else ["no collectives"]


def merged(collectives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges collectives that differ in their source alone."""
    by_key: dict[tuple, dict[str, Any]] = {}
    for c in collectives:
        key = tuple(str(value) for name, value in c.items() if name not in ("source", "times", "waited"))
        entry = by_key.setdefault(key, c | {"times": 0, "waited": 0.0})
        entry["times"] += c["times"]
        entry["waited"] += c["waited"]
    return sorted(by_key.values(), key=lambda c: -c["bytes"] * c["times"])


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a plain table: the first column to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(len(heads))]
    for number, row in enumerate((heads, *rows)):
        yield "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        if number == 0:
            yield "  ".join("-" * width for width in widths)

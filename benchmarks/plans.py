"""Every shipped TPU config, planned for the slice that its name says: the table of docs/plan.md.

    python -m benchmarks.plans [NAME...] [--memory-only] [--output plans.json]

Nothing is measured here: the numbers are the compiler's and the planner's (docs/plan.md says what they mean). A config
takes two to five minutes on two cores, with `--memory-only` a few seconds.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from medllm_jax.config.load import load_run_config
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.planning.plan import PlanOptions, plan

CONFIGS = Path(__file__).parents[1] / "configs" / "runs"
GIB = 2**30


class Shipped(NamedTuple):
    """A config and what it is for."""

    file: Path
    topology: str
    slices: int


def shipped() -> list[Shipped]:
    """All run configs that are named after a slice: KIND-MODEL-CHIP-SHAPE[-xSLICES].yaml."""
    found = []
    for file in sorted(CONFIGS.glob("*.yaml")):
        if named := re.search(r"-(v\w+)-(\d+x\d+(?:x\d+)?)(?:-x(\d+))?$", file.stem):
            chip, shape, slices = named.groups()
            found.append(Shipped(file, f"{chip}:{shape}", int(slices or 1)))
    return found


def plan_of(config: Shipped, *, program: str = "train", memory_only: bool = False) -> dict[str, Any]:
    """The report of `medllm plan`; tokens: a thousand million."""
    options = PlanOptions(parse_topology(config.topology, config.slices), program=program, tokens=10**9)
    return plan(load_run_config(config.file), options, memory_only=memory_only)


def row_of(config: Shipped, report: dict[str, Any]) -> list[str]:
    (program,) = report["programs"]
    memory, time = program["memory"], program["time"]
    mesh = report["mesh"]
    at_once = report["rows"] / report["accumulate"] / (mesh["data"] * mesh["fsdp"])
    row = [
        config.file.stem,
        f"{report['rows']} / {at_once:g}",
        report["remat"],
        f"{memory['peak'] / GIB:.1f}",
        f"{1 - memory['share']:.0%}",
    ]
    if time is None:
        return row
    waiting = sum(c["bytes"] * c["times"] for c in program["collectives"] if not c["asynchronous"]) / GIB
    hidden = sum(c["bytes"] * c["times"] for c in program["collectives"] if c["asynchronous"]) / GIB
    return [
        *row,
        f"{time['ideal_seconds']:.2f} / {time['seconds']:.2f}",
        f"{time['waits']:.2f}",
        f"{time['mfu_estimate']:.1%} ({time['mfu_if_products_reach']['0.9']:.1%})",
        f"{hidden:.0f} / {waiting:.2f}",
        f"{time['tokens_per_second'] / report['chips']:,.0f}",
        f"{time['chip_hours']:,.0f}",
    ]


HEADS = [
    "config",
    "rows a step / a chip at once",
    "remat",
    "HBM GiB",
    "free",
    "ideal / step s",
    "exposed s",
    "MFU est. (products at 90 %)",
    "hidden / sync GiB",
    "tokens/s a chip",
    "chip-hours a 10^9 tokens",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="only configs with one of these in their name")
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--output", type=Path, help="file for the whole reports")
    arguments = parser.parse_args()
    reports, width = {}, 5 if arguments.memory_only else len(HEADS)
    print("| " + " | ".join(HEADS[:width]) + " |\n|" + "---|" * width, flush=True)
    for config in shipped():
        if arguments.name and not any(name in config.file.stem for name in arguments.name):
            continue
        report = plan_of(config, memory_only=arguments.memory_only)
        reports[config.file.stem] = report
        print("| " + " | ".join(row_of(config, report)) + " |", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()

"""`python -m launch`: a run on TPUs, by the launcher that is at hand (docs/launch.md).

Exit codes: 0 launched (or printed); 1 the launcher's own command failed; 2 the input is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from launch import ways
from launch.commands import Command, run
from launch.workload import make_workload
from medllm_jax.cli.parsing import Parser, verb
from medllm_jax.errors import UserError

_SHARED = ("name", "topology", "slices", "run", "image", "program", "restarts", "grace", "environment")


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches, or prints what would be done; returns the exit code."""
    try:
        commands, dry_run = prepare(sys.argv[1:] if arguments is None else arguments)
        if not dry_run:
            return run(commands)
        print("\n".join(map(str, commands)))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def prepare(arguments: Sequence[str]) -> tuple[list[Command], bool]:
    """The commands that the arguments ask for, and whether only to print them. UserError where they are wrong."""
    options, overrides = parse(arguments)
    values = vars(options)
    shared = {name: values[name] for name in _SHARED}
    work = make_workload(options.config, overrides, name_limit=28 if options.verb is ways.gcluster else 40, **shared)
    own = {name: values[name] for name in options.own}
    return options.verb(work, **own), options.dry_run


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the overrides of the config, which follow `--`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options, rest = _parser().parse_known_args(arguments[:end])
    if rest:
        options.parser.unknown(rest)
    return options, list(arguments[end + 1 :])


def _parser() -> Parser:
    parser = Parser(prog="python -m launch", allow_abbrev=False, description=__doc__.splitlines()[0])
    all_ways = parser.add_subparsers(title="ways", required=True, metavar="{gke,xpk,gcluster,tpu-vm}")
    queue, priority = ("queue", "Kueue's LocalQueue"), ("priority", "PriorityClass of the pods")
    account = ("service_account", "of Kubernetes, which may read and write the bucket")
    reservation = ("reservation", "name of the reservation to take the slices from")

    text = "a JobSet on a GKE cluster, by kubectl"
    sub = _way(all_ways, "gke", ways.gke, text, queue, priority, account, reservation)
    _own(sub, "namespace", "of the cluster (default %(default)s)", default="default")
    _own(sub, "context", "of kubectl (default: the current one)")
    _own(sub, "secret", "a Secret of the cluster; its entries become environment variables")

    sub = _way(all_ways, "xpk", ways.xpk, "xpk workload create", reservation)
    _own(sub, "cluster", "that xpk made", required=True)
    _own(sub, "project", "of Google Cloud (default: that of gcloud)")
    _own(sub, "zone", "of the cluster (default: that of gcloud)")
    levels = ("very-low", "low", "medium", "high", "very-high")
    _own(sub, "priority", "xpk's (default %(default)s)", choices=levels, default="medium")

    text = "gcluster job submit, of Google's Cluster Toolkit (an alpha feature of it)"
    sub = _way(all_ways, "gcluster", ways.gcluster, text, queue, priority, account, reservation)
    for name, meaning in (("cluster", "of GKE"), ("project", "of Google Cloud"), ("location", "region or zone")):
        _own(sub, name, meaning, required=True)

    text = "TPU VMs of a queued resource, by gcloud (the older path)"
    sub = _way(all_ways, "tpu-vm", ways.tpu_vm, text, ("service_account", "of Google Cloud, which the VMs act as"))
    _own(sub, "project", "of Google Cloud", required=True)
    _own(sub, "zone", "with quota for the chips", required=True)
    _own(sub, "runtime_version", "software of the VMs (default: by generation)")
    _own(sub, "reserved", "take the slices from a reservation", action="store_true")
    return parser


def _way(parent: Any, name: str, function: Callable[..., list[Command]], text: str, *own: tuple[str, str]) -> Parser:
    """A way with the options that all have, and its own."""
    usage = f"python -m launch {name} --config FILE.yaml --topology NAME --run gs://... --image IMAGE [option ...] "
    sub = verb(parent, name, function, text, usage=usage + "[-- --section.key value ...]")
    add = sub.add_argument
    add("--config", required=True, help="run config, YAML (see configs/)")
    add("--topology", required=True, help="one slice, in chips, like v5p:4x4x4")
    add("--slices", type=int, default=1, help="so many of them, along mesh.data (default 1)")
    add("--run", required=True, help="run folder, gs://...; a run that is there goes on")
    add("--image", required=True, help="container image, from launch/Dockerfile")
    add("--name", help="of the workload (default: the run folder's)")
    add("--program", choices=("train", "reference"), default="train", help="verb of medllm (default train)")
    restarts = "after failures, at most so many; preempted runs are restarted besides (default %(default)s)"
    add("--max-restarts", dest="restarts", type=int, default=10, metavar="N", help=restarts)
    grace = "between the notice to end and the kill (default %(default)s)"
    add("--grace-seconds", dest="grace", type=int, default=300, metavar="N", help=grace)
    variable = "environment variable of the run; repeatable"
    add("--env", dest="environment", action="append", default=[], metavar="NAME=VALUE", help=variable)
    add("--dry-run", action="store_true", help="print what would run, and run nothing")
    sub.set_defaults(own=[])
    _own(sub, "spot", "take Spot capacity", action="store_true")
    for option, meaning in own:
        _own(sub, option, meaning)
    return sub


def _own(sub: Parser, name: str, meaning: str, **more: Any) -> None:
    """An option that is passed to the way."""
    sub.add_argument(f"--{name.replace('_', '-')}", help=meaning, **more)
    sub.get_default("own").append(name)


if __name__ == "__main__":
    sys.exit(main())

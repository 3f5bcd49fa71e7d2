"""`medllm launch gke | xpk | gcluster | tpu-vm`: a run on TPUs, by the launcher that is at hand (docs/launch.md).

Exit codes: 0 launched (or printed); 1 the launcher's own command failed; 2 the input is wrong.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from medllm_jax.launching import backends
from medllm_jax.launching.commands import Command, run
from medllm_jax.launching.workload import check_text, make_workload
from medllm_jax.ranges import GraceSeconds, Restarts, Slices
from medllm_jax.terminal.parser import Parser, group, number, verb

_SHARED = ("name", "topology", "slices", "run", "image", "program", "restarts", "grace", "environment")


def add(verbs: Any) -> None:
    """The verbs."""
    parser = group(verbs, "launch", "launch a run on TPUs with the launcher that you have (see docs/launch.md)")
    all_ways = parser.add_subparsers(title="backends", required=True, metavar="{gke,xpk,gcluster,tpu-vm}")
    queue, priority = ("queue", "Kueue's LocalQueue"), ("priority", "PriorityClass of the pods")
    account = ("service_account", "of Kubernetes, which may read and write the bucket")
    reservation = ("reservation", "name of the reservation to take the slices from")

    text = "create a JobSet on a GKE cluster with kubectl"
    sub = _way(all_ways, "gke", backends.gke, text, queue, priority, account, reservation)
    _own(sub, "namespace", "of the cluster (default %(default)s)", default="default")
    _own(sub, "context", "context of kubectl (default: the current one)")
    _own(sub, "secret", "a Secret of the cluster; its entries become environment variables")

    sub = _way(all_ways, "xpk", backends.xpk, "run xpk workload create", reservation)
    _own(sub, "cluster", "that xpk made", required=True)
    _own(sub, "project", "of Google Cloud (default: that of gcloud)")
    _own(sub, "zone", "of the cluster (default: that of gcloud)")
    levels = ("very-low", "low", "medium", "high", "very-high")
    _own(sub, "priority", "xpk's (default %(default)s)", choices=levels, default="medium")

    text = "run gcluster job submit of Google's Cluster Toolkit (an alpha feature of it)"
    sub = _way(all_ways, "gcluster", backends.gcluster, text, queue, priority, account, reservation)
    for name, meaning in (("cluster", "of GKE"), ("project", "of Google Cloud"), ("location", "region or zone")):
        _own(sub, name, meaning, required=True)

    text = "create TPU VMs of a queued resource with gcloud (the older path)"
    sub = _way(all_ways, "tpu-vm", backends.tpu_vm, text, ("service_account", "of Google Cloud, which the VMs act as"))
    _own(sub, "project", "of Google Cloud", required=True)
    _own(sub, "zone", "with quota for the chips", required=True)
    _own(sub, "runtime_version", "software of the VMs (default: by generation)")
    _own(sub, "reserved", "take the slices from a reservation", action="store_true")


def _launch(options: argparse.Namespace) -> int:
    commands = prepare(options)
    if not options.dry_run:
        return run(commands)
    print("\n".join(map(str, commands)))
    return 0


def prepare(options: argparse.Namespace) -> list[Command]:
    """The commands that options ask for; UserError where they are wrong."""
    values = vars(options)
    for name, value in values.items():
        if isinstance(value, str):
            check_text(f"--{name.replace('_', '-')}", value)
    limit = 28 if options.backend is backends.gcluster else 40
    work = make_workload(options.config, options.settings, name_limit=limit, **{name: values[name] for name in _SHARED})
    return options.backend(work, **{name: values[name] for name in options.own})


def _way(parent: Any, name: str, function: Callable[..., list[Command]], text: str, *own: tuple[str, str]) -> Parser:
    """A way with the options that all have, and its own."""
    usage = f"medllm launch {name} --config FILE.yaml --topology NAME --run gs://... --image IMAGE [option ...] "
    usage += "[-- --section.key value ...]"
    sub = verb(parent, name, _launch, text, settings="after --", usage=usage)
    sub.set_defaults(backend=function)
    add = sub.add_argument
    add("--config", required=True, help="run config: a YAML file, or the name of a shipped config such as cpt-tiny")
    add("--topology", required=True, help="shape of one slice in chips, like v5p:4x4x4")
    add("--slices", type=number(Slices), default=1, help="number of slices, along mesh.data (default 1)")
    add("--run", required=True, help="run folder, gs://...; an existing run is resumed")
    add("--image", required=True, help="container image, from launch/Dockerfile")
    add("--name", help="name of the workload (default: from the run folder)")
    add("--program", choices=("train", "reference"), default="train", help="verb of medllm (default train)")
    restarts = "restarts after failures; restarts after preemptions do not count (default %(default)s)"
    add("--max-restarts", dest="restarts", type=number(Restarts), default=10, metavar="N", help=restarts)
    grace = "seconds between the notice to end and the kill (default %(default)s)"
    add("--grace-seconds", dest="grace", type=number(GraceSeconds), default=300, metavar="N", help=grace)
    variable = "environment variable of the run; repeatable"
    add("--env", dest="environment", action="append", default=[], metavar="NAME=VALUE", help=variable)
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    sub.set_defaults(own=[])
    _own(sub, "spot", "take Spot capacity", action="store_true")
    for option, meaning in own:
        _own(sub, option, meaning)
    return sub


def _own(sub: Parser, name: str, meaning: str, **more: Any) -> None:
    """An option that is passed to the way."""
    sub.add_argument(f"--{name.replace('_', '-')}", help=meaning, **more)
    sub.get_default("own").append(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """`medllm launch ARGUMENTS`; returns the exit code."""
    from medllm_jax.cli import main as medllm

    return medllm(arguments, group="launch")

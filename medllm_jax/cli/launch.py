"""`medllm launch gke | xpk | gcluster | tpu-vm`: a run on TPUs, by the launcher that is at hand (docs/launch.md).

Exit codes: 0 launched (or printed); 1 the launcher's own command failed; 2 the input is wrong.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from medllm_jax.cli import arguments
from medllm_jax.errors import RunError, UserError
from medllm_jax.launching import backends
from medllm_jax.launching.checks import Finding, checks, look, placeholders
from medllm_jax.launching.commands import Command, run
from medllm_jax.launching.watch import how_to_watch
from medllm_jax.launching.workload import Workload, check_text, make_workload
from medllm_jax.ranges import GraceSeconds, Range, Restarts, SequenceLength, Slices
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
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device of this machine is asked
    work, where = _workload(options)
    commands = options.backend(work, **where)
    left = placeholders(where, work)
    watch = [f"{title}: {command}" for title, command in how_to_watch(options.way, work, where)]
    if options.dry_run:
        print("\n".join(map(str, commands)))
        beside = [*_cost(options, work), *watch, *(f"before it is launched, put yours in place of {it}" for it in left)]
        print("".join(f"# {line}\n" for line in beside), end="")
        return 0
    if left:
        raise UserError(f"{left[0]} stands for something of yours: put that in its place")
    if options.check:
        return _check(options, work, where)
    code = run(commands)
    if not code:
        print("\n".join(watch))
    return code


def _cost(options: argparse.Namespace, work: Workload) -> list[str]:
    """What a training run comes to, in words; without a word of what can't be known from here."""
    from medllm_jax.training.resolve import resolve

    if work.program != "train":
        return []
    if work.config.model is None:
        return ["what it comes to: the model's shape is where init.checkpoint is, which --check reads"]
    return _cost_of(options, work, resolve(work.config, elsewhere=True), options.sequence_length)


def _cost_of(
    options: argparse.Namespace, work: Workload, config: Any, length: int, store_rows: int | None = None
) -> list[str]:
    """length: tokens of a row."""
    from medllm_jax.planning.cost import as_lines, run_cost

    asked = {"sequence_length": length, "mfu": options.mfu, "price": options.price, "store_rows": store_rows}
    return list(as_lines(run_cost(config, work.slices.topology, **asked)))


def _check(options: argparse.Namespace, work: Workload, where: dict[str, Any]) -> int:
    """Looks at what the launch needs, and changes nothing; 1 where something is wrong."""
    found = []
    for finding in (*map(look, checks(options.way, work, where)), *_of_what_is_read(options, work)):
        print(f"{finding.state:8}{finding.text}", flush=True)
        found.append(finding.state)
    print(
        f"{found.count('ok')} are right, {found.count('unknown')} can't be told from here, {found.count('wrong')} wrong"
    )
    return int("wrong" in found)


def _of_what_is_read(options: argparse.Namespace, work: Workload) -> Iterator[Finding]:
    """Stores, run folder and model, read as the run will read them, but by you; and what the run comes to."""
    from medllm_jax.storage import run_folder
    from medllm_jax.storage.faults import as_told
    from medllm_jax.training.resolve import resolve, rows_in_stores

    def tried(what: str, read: Callable[[], Any], told: Callable[[Any], str]) -> tuple[Any, Finding]:
        try:
            found = read()
        except (UserError, RunError) as error:
            return None, Finding("wrong", f"{what}: {error}")
        except Exception as error:  # of clients, of many types
            return None, Finding("unknown", f"{what}: {as_told(error, [what]) or type(error).__name__}")
        return found, Finding("ok", f"{what}: {told(found)}")

    config = work.config
    size = lambda found: f"{found[0]:,} rows of {found[1]:,} tokens"  # noqa: E731
    stored, finding = tried(f"store {', '.join(config.data.stores)}", lambda: rows_in_stores(config), size)
    yield finding
    begun = lambda found: "a new run" if found is None else "a run that goes on"  # noqa: E731
    yield tried(f"run {config.run}", lambda: run_folder.begun_config(config.run), begun)[1]
    shape = lambda found: f"{found.model.num_hidden_layers} layers of {found.model.hidden_size:,}"  # noqa: E731
    resolved, finding = tried(f"model {config.init.checkpoint or 'of the config'}", lambda: resolve(config), shape)
    yield finding
    if stored and resolved and work.program == "train":
        rows, length = stored
        yield from (Finding("ok", line) for line in _cost_of(options, work, resolved, length, rows))


def prepare(options: argparse.Namespace) -> list[Command]:
    """The commands that options ask for; UserError where they are wrong."""
    work, where = _workload(options)
    return options.backend(work, **where)


def _workload(options: argparse.Namespace) -> tuple[Workload, dict[str, Any]]:
    """What is launched, and the options of the backend alone."""
    values = vars(options)
    for name, value in values.items():
        if isinstance(value, str):
            check_text(f"--{name.replace('_', '-')}", value)
    limit = 28 if options.backend is backends.gcluster else 40
    work = make_workload(options.config, options.settings, name_limit=limit, **{name: values[name] for name in _SHARED})
    return work, {name: values[name] for name in options.own}


def _way(parent: Any, name: str, function: Callable[..., list[Command]], text: str, *own: tuple[str, str]) -> Parser:
    """A way with the options that all have, and its own."""
    usage = f"medllm launch {name} --config FILE.yaml --topology NAME --run gs://... --image IMAGE [option ...] "
    usage += "[-- --section.key value ...]"
    sub = verb(parent, name, _launch, text, settings="after --", usage=usage)
    sub.set_defaults(backend=function, way=name)
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
    first = sub.add_mutually_exclusive_group()
    first.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    looks = "look at bucket, role, image, quota, cluster, store and model with commands that change nothing"
    first.add_argument("--check", action="store_true", help=looks)
    arguments.add_price(sub)
    mfu = "MFU that --dry-run and --check take a step to reach (default 0.5)"
    add("--mfu", type=number(Annotated[float, Range(0.01, 1)]), default=0.5, help=mfu)
    length = "tokens of a row of the store, for --dry-run (default 4096)"
    add("--sequence-length", type=number(SequenceLength), default=4096, metavar="N", help=length)
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

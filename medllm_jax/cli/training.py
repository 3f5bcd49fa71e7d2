"""`medllm train | reference | plan | rounds | demo`: what trains, and what would."""

import argparse
import sys
from typing import Any

from medllm_jax.terminal.parser import Parser, verb


def add(verbs: Any) -> None:
    """The verbs."""
    demo = verb(verbs, "demo", _demo, "the whole recipe, tiny, here; nothing is downloaded")
    demo.add_argument("--workdir", default="demo-run", help="folder for everything it makes (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the world, the weights and the order (default 0)")

    settings = "Every setting of the config file can be overridden as --section.key value:\n\n"
    for name, function, text in (
        ("train", _train, "CPT or RPO as a config file says; goes on from its run folder by itself"),
        ("reference", _reference, "reference log-probabilities of an RPO run's pairs, stored beside them"),
        ("plan", _plan, "memory and time that a run would need on TPUs that are not there (see docs/plan.md)"),
    ):
        sub = verb(
            verbs,
            name,
            function,
            text,
            settings="options",
            usage=f"medllm {name} --config FILE.yaml {'--topology NAME ' * (name == 'plan')}[--section.key value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--config", required=True, help="run config, YAML (see configs/)")
        sub.format_help = lambda sub=sub: Parser.format_help(sub) + "\n" + settings + _settings_help()
        if name == "plan":
            _add_plan_arguments(sub)
        if name == "train":
            forced = "go on with a config that computes something else than the one that the run was begun with"
            sub.add_argument("--force", action="store_true", help=forced)

    again = verb(verbs, "rounds", _rounds, "Iterative RPO: sample, pair, train and examine, round after round")
    again.add_argument("--config", required=True, help="YAML of rounds (see docs/rpo.md)")


def _run_config(options: argparse.Namespace) -> Any:
    """The config of a verb that trains; joins the other processes if the run has more than one."""
    from medllm_jax.config.load import load_run_config

    config = load_run_config(options.config, options.settings)
    if config.distributed:
        from medllm_jax.distributed.processes import join

        join(config.watchdog.heartbeat_seconds)
    return config


def _train(options: argparse.Namespace) -> None:
    config = _run_config(options)
    from medllm_jax.training.loop import train

    folder = train(config, force=options.force)
    print(f"trained: {folder}")


def _reference(options: argparse.Namespace) -> None:
    config = _run_config(options)
    from medllm_jax.training.reference import cache_reference

    pairs = cache_reference(config)
    print(f"reference log-probabilities of {pairs} pairs: {', '.join(config.data.stores)}")


def _plan(options: argparse.Namespace) -> None:
    import json

    from medllm_jax.config.load import load_run_config
    from medllm_jax.distributed.chips import parse_topology
    from medllm_jax.planning.plan import PlanOptions, plan, plan_fastest
    from medllm_jax.planning.report import as_text

    topology = parse_topology(options.topology, options.slices)
    config = load_run_config(options.config, options.settings)
    names = ("program", "sequence_length", "pairs_per_row", "new_tokens", "tokens")
    planned = PlanOptions(topology, **{name: getattr(options, name) for name in names})
    if options.search:
        report = plan_fastest(config, planned, show=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        report = plan(config, planned, memory_only=options.memory_only)
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def _rounds(options: argparse.Namespace) -> None:
    from medllm_jax.cli import main
    from medllm_jax.recipes.commands import Runner
    from medllm_jax.recipes.rounds import load_rounds_config, run_rounds

    run_rounds(load_rounds_config(options.config), Runner(main))


def _demo(options: argparse.Namespace) -> None:
    from medllm_jax.cli import main
    from medllm_jax.recipes.commands import Runner
    from medllm_jax.recipes.demo.recipe import run_demo

    run_demo(options.workdir, options.seed, Runner(main))


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="one slice, in chips, like v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="so many of them, along mesh.data (default 1)")
    parser.add_argument(
        "--program", choices=("train", "reference", "generate"), default="train", help="what runs (default train)"
    )
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens of a row, or prompt (default 4096)")
    parser.add_argument("--pairs-per-row", type=int, default=2, help="of preference rows (default 2)")
    parser.add_argument("--new-tokens", type=int, default=512, help="of a completion (default 512)")
    parser.add_argument("--tokens", type=int, help="of the whole run: adds hours and chip-hours")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--search", action="store_true", help="try remat, rows at a time, mesh and vocab_chunks")
    how.add_argument("--memory-only", action="store_true", help="seconds instead of minutes, and no times")
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def _settings_help() -> str:
    from medllm_jax.config.load import describe

    return describe() + "\n"

"""`medllm train | reference | plan | rounds | demo`: what trains, and what would."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medllm_jax.cli import arguments
from medllm_jax.errors import UserError
from medllm_jax.ranges import NewTokens, PairsPerRow, Seed, SequenceLength, Slices, Tokens
from medllm_jax.terminal.parser import Parser, number, verb


def add(verbs: Any) -> None:
    """The verbs."""
    demo = verb(verbs, "demo", _demo, "run the whole recipe, tiny, on this machine; nothing is downloaded")
    demo.add_argument("--workdir", help="folder for everything it makes (default demo-run, or study-run)")
    demo.add_argument("--seed", type=number(Seed), help="seed of the world, the weights and the data order (default 0)")
    only = demo.add_mutually_exclusive_group()
    only.add_argument(
        "--study", action="store_true", help="several seeds with ablations, judged against the paper (docs/study.md)"
    )
    only.add_argument("--results", metavar="FOLDER", help="run nothing: write the page of a study's results")
    demo.add_argument(
        "--seeds", type=number(Seed), nargs="+", metavar="N", help="seeds of the study (default 0 1 2 3 4)"
    )

    settings = "Every setting of the config file can be overridden as --section.key value:\n\n"
    for name, function, text in (
        ("train", _train, "train as a config describes (CPT, SFT or RPO); resumes from its run folder by itself"),
        (
            "reference",
            _reference,
            "compute reference log-probabilities of an RPO run's pairs and store them beside the pairs",
        ),
        ("plan", _plan, "predict the memory and time of a run on TPUs, without the TPUs (see docs/plan.md)"),
    ):
        sub = verb(
            verbs,
            name,
            _or_print_config(function),
            text,
            settings="options",
            usage=f"medllm {name} --config FILE.yaml {'--topology NAME ' * (name == 'plan')}[--section.key value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--config", required=True, help="run config: a YAML file, or the name of a shipped config such as cpt-tiny"
        )
        sub.format_help = lambda sub=sub: Parser.format_help(sub) + "\n" + settings + _settings_help()
        shown = "print the config with all its values and where each comes from, and do nothing"
        sub.add_argument("--print-config", action="store_true", help=shown)
        if name == "plan":
            _add_plan_arguments(sub)
        if name == "train":
            forced = "resume although the config computes something else than the one that the run started with"
            sub.add_argument("--force", action="store_true", help=forced)

    again = verb(verbs, "rounds", _rounds, "run Iterative RPO: sample, pair, train and evaluate, round after round")
    again.add_argument(
        "--config", required=True, help="rounds config: a YAML file, or the name of a shipped one (see docs/rpo.md)"
    )


def _or_print_config(act: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A verb that prints its config instead of doing anything, where --print-config asks for that."""

    def run(options: argparse.Namespace) -> None:
        if not options.print_config:
            act(options)
            return
        from medllm_jax.config.load import run_config_with_origins

        print(run_config_with_origins(options.config, options.settings), end="")

    return run


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
    print(f"training {config.run} by {config.objective.name}: reading the store and the model", flush=True)
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
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device of this machine is asked

    from medllm_jax.config.load import load_run_config
    from medllm_jax.distributed.chips import parse_topology
    from medllm_jax.planning.plan import PlanOptions, plan, plan_fastest
    from medllm_jax.planning.report import as_text

    topology = parse_topology(options.topology, options.slices)
    config = load_run_config(options.config, options.settings)
    names = ("program", "sequence_length", "pairs_per_row", "new_tokens", "tokens", "price")
    asked = {name: getattr(options, name) for name in names}
    if options.read_store:
        from medllm_jax.training.resolve import rows_in_stores

        asked["store_rows"], asked["sequence_length"] = rows_in_stores(config)
    planned = PlanOptions(topology, **asked)
    show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if options.search:
        report = plan_fastest(config, planned, show=show)
    else:
        report = plan(config, planned, memory_only=options.memory_only, show=show)
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
    from medllm_jax.recipes.study.page import write_page
    from medllm_jax.recipes.study.run import run_study

    if options.seed is not None and (options.study or options.results):
        raise UserError("--seed is of the demo: give --seeds for the study")
    if options.seeds is not None and not options.study:
        raise UserError("--seeds is of the study: give --study with it, or --seed for the demo")
    if options.results and options.workdir:
        raise UserError("--workdir is of what is run: --results FOLDER writes the page beside that folder")
    if options.results:
        print(write_page(Path(options.results)))
    elif options.study:
        run_study(options.workdir or "study-run", options.seeds or range(5), Runner(main))
    else:
        run_demo(options.workdir or "demo-run", options.seed or 0, Runner(main))


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, help="shape of one slice in chips, like v5p:4x4x4")
    for option, kind, default, text in (
        ("--slices", Slices, 1, "number of slices, along mesh.data"),
        ("--sequence-length", SequenceLength, 4096, "tokens of a row, or of a prompt"),
        ("--pairs-per-row", PairsPerRow, 2, "pairs in a preference row"),
        ("--new-tokens", NewTokens, 512, "tokens of a completion"),
    ):
        parser.add_argument(option, type=number(kind), default=default, help=f"{text} (default {default})")
    parser.add_argument(
        "--program", choices=("train", "reference", "generate"), default="train", help="program to plan (default train)"
    )
    run = "tokens of the whole run (default: what the steps of the config read)"
    parser.add_argument("--tokens", type=number(Tokens), help=run)
    arguments.add_price(parser)
    store = "read from the config's store how many rows there are and how long they are, for epochs"
    parser.add_argument("--read-store", action="store_true", help=store)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--search", action="store_true", help="search over remat, rows at a time, mesh and vocab_chunks")
    how.add_argument(
        "--memory-only", action="store_true", help="predict memory alone: takes seconds instead of minutes"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _settings_help() -> str:
    from medllm_jax.config.load import describe

    return describe() + "\n"

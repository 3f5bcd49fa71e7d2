"""`medllm`: one verb a subcommand. What a verb needs is imported inside it, so that `--help` is quick.

Exit codes: 0 done; 1 failure; 2 the input or the config is wrong.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any

from medllm_jax.errors import UserError


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the likely option where one is unknown."""

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def unknown(self, arguments: Sequence[str]) -> None:
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(arguments[0].partition("=")[0], options, n=1)
        hint = f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
        raise UserError(f"{self.prog}: unknown argument {arguments[0]}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    try:
        parser = _make_parser()
        options, rest = parser.parse_known_args(arguments)
        if rest and not options.takes_settings:
            options.parser.unknown(rest)
        options.settings = rest
        return options.verb(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# --- verbs -------------------------------------------------------------------------------------------------------


def _run_config(options: argparse.Namespace) -> Any:
    """The config of a verb that trains; joins the other processes if the run has more than one."""
    from medllm_jax.settings import load_run_config

    config = load_run_config(options.config, options.settings)
    if config.distributed:
        import jax

        jax.distributed.initialize()
    return config


def _train(options: argparse.Namespace) -> None:
    config = _run_config(options)
    from medllm_jax.train import train

    folder = train(config)
    print(f"trained: {folder}")


def _reference(options: argparse.Namespace) -> None:
    config = _run_config(options)
    from medllm_jax.reference import cache_reference

    pairs = cache_reference(config)
    print(f"reference log-probabilities of {pairs} pairs: {config.data.store}")


def _data_cpt(options: argparse.Namespace) -> None:
    from medllm_jax.data.corpus import prepare_corpus

    with _counting("documents") as progress:
        metadata = prepare_corpus(
            options.input,
            options.tokenizer,
            options.output,
            options.sequence_length,
            packing=options.packing,
            on_bad=options.on_bad,
            append_eos=not options.no_eos,
            overwrite=options.overwrite,
            progress=progress,
        )
    _report_store(options.output, metadata, "documents")


def _data_pairs(options: argparse.Namespace) -> None:
    from medllm_jax.data.preferences import prepare_pairs

    with _counting("pairs") as progress:
        metadata = prepare_pairs(
            options.input,
            options.tokenizer,
            options.output,
            options.sequence_length,
            pairs_per_row=options.pairs_per_row,
            max_prompt_tokens=options.max_prompt_tokens,
            on_bad=options.on_bad,
            on_long=options.on_long,
            overwrite=options.overwrite,
            progress=progress,
        )
    _report_store(options.output, metadata, "pairs")


def _pairs(options: argparse.Namespace) -> None:
    import json

    from etils import epath

    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.generate import Sampling
    from medllm_jax.metrics import Console
    from medllm_jax.pairs import PairOptions, make_pairs

    exam, template = load_exam(options.exam, years=options.years), load_template(options.template)
    wanted = PairOptions(options.samples, options.most, options.strategy)
    output = epath.Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} exists: give another output, or --overwrite")
    generator = _generator(options)

    def complete(prompts: list[str], *, max_new_tokens: int, stop: tuple[str, ...]):
        sampling = Sampling(max_new_tokens, options.temperature, options.top_p, stop, options.seed)
        return generator(prompts, sampling)

    with Console("pairs", len(exam.questions) * len(options.conditions), unit="prompt") as console:
        show = lambda done: console.update(done, every_seconds=10)  # noqa: E731
        rows, counts = make_pairs(exam, template, options.conditions, complete, wanted, show)
    print(", ".join(f"{name}: {count}" for name, count in counts.items() if name != "pairs"))
    if not rows:
        raise UserError(f"no pair came out of {exam.name}: see the counts above; more samples, or a higher temperature")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output}: {len(rows)} pairs")


def _evaluate(options: argparse.Namespace) -> None:
    from etils import epath

    from medllm_jax.checkpoint import latest_step
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.run import evaluate, format_table
    from medllm_jax.generate import Sampling
    from medllm_jax.metrics import Console

    exam, template = load_exam(options.exam, years=options.years), load_template(options.template)
    step = latest_step(options.run)
    output = options.output or epath.Path(options.run) / "evaluation" / f"{exam.name}-{template.name}-step{step}"
    generator = _generator(options)

    def complete(prompts: list[str], *, max_new_tokens: int, stop: tuple[str, ...]):
        return generator(prompts, Sampling(max_new_tokens, stop=stop))

    with Console(f"exam {exam.name}", len(exam.questions) * len(options.conditions), unit="question") as console:
        summaries = evaluate(
            exam,
            template,
            options.conditions,
            complete,
            output,
            model=f"{options.run}@{step}",
            progress=lambda done: console.update(done, every_seconds=10),
        )
    print(format_table(summaries))
    print(f"outputs, grades and scores: {output}")


def _demo(options: argparse.Namespace) -> None:
    from medllm_jax.demo.recipe import run_demo

    run_demo(options.workdir, options.seed)


def _generator(options: argparse.Namespace) -> Any:
    import jax

    from medllm_jax.config import PrecisionConfig
    from medllm_jax.generate import Generator

    # A CPU computes bfloat16 by converting it, which is slower and no smaller.
    compute = options.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    precision = PrecisionConfig(params=options.params_dtype or compute, compute=compute)
    return Generator.from_run(
        options.run, batch_size=options.batch_size, mesh=_mesh_of(options.mesh), precision=precision
    )


def _mesh_of(text: str) -> Any:
    from medllm_jax.config import MeshConfig
    from medllm_jax.settings import build

    sizes = dict(part.partition("=")[::2] for part in text.split(",") if part)
    return build(MeshConfig, {axis: int(size) if _is_int(size) else size for axis, size in sizes.items()}, "--mesh")


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdigit()


def _counting(what: str):
    """A context whose value shows a growing count now and then: (items, tokens) -> None."""
    import contextlib
    import time

    @contextlib.contextmanager
    def counting():
        last = time.monotonic()

        def show(items: int, tokens: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 5:
                last = time.monotonic()
                print(f"{items:,} {what}, {tokens:,} tokens", flush=True)

        yield show

    return counting()


def _report_store(output: str, metadata: Any, what: str) -> None:
    print(
        f"{output}: {metadata.examples:,} {what} in {metadata.rows:,} rows of {metadata.sequence_length}, "
        f"{metadata.tokens:,} tokens, {metadata.fill:.1%} full"
    )
    for reason, entry in metadata.dropped.items():
        places = ", ".join(entry["first"])
        print(f"left out: {entry['count']} ({reason}), first at {places}")


# --- arguments ---------------------------------------------------------------------------------------------------


def _make_parser() -> _Parser:
    from medllm_jax import __version__

    about = "Qwen2.5 to a medical model: CPT, RPO and the exam, in JAX."
    parser = _Parser(prog="medllm", allow_abbrev=False, description=about)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(parent: Any, name: str, function: Any, text: str, *, takes_settings: bool = False, **more: Any) -> _Parser:
        sub = parent.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
        sub.set_defaults(verb=function, parser=sub, takes_settings=takes_settings)
        return sub

    demo = verb(verbs, "demo", _demo, "the whole recipe, tiny, here; nothing is downloaded")
    demo.add_argument("--workdir", default="demo-run", help="folder for everything it makes (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the world, the weights and the order (default 0)")

    data = verbs.add_parser("data", help="documents or preference pairs to a store of packed rows")
    kinds = data.add_subparsers(title="kinds", required=True, metavar="KIND")
    cpt = verb(kinds, "cpt", _data_cpt, "documents (.jsonl with `text`, .jsonl.gz, .txt) to a token store")
    _add_store_arguments(cpt)
    cpt.add_argument(
        "--packing", choices=("best_fit", "split"), default="best_fit", help="keep documents whole, or cut"
    )
    cpt.add_argument("--no-eos", action="store_true", help="do not end documents with the end-of-sequence token")
    pairs = verb(kinds, "pairs", _data_pairs, "preference rows (`prompt`, `chosen`, `rejected`) to a pair store")
    _add_store_arguments(pairs)
    pairs.add_argument("--pairs-per-row", type=int, help="at most so many pairs in a row (default: as many as fit)")
    pairs.add_argument("--max-prompt-tokens", type=int, help="a pair with a longer prompt is over-long")
    pairs.add_argument("--on-long", choices=("error", "skip"), default="error", help="what to do about over-long pairs")

    make = verb(verbs, "pairs", _pairs, "sample a model on an exam with known answers, grade, make preference rows")
    _add_model_arguments(make)
    _add_exam_arguments(make)
    make.add_argument("--output", required=True, help="preference rows, .jsonl")
    make.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    make.add_argument("--strategy", choices=("gold", "onpolicy", "both"), default="both", help="what is preferred")
    make.add_argument("--samples", type=int, default=8, help="completions of each prompt (default 8)")
    make.add_argument("--most", type=int, default=10, help="pairs of one prompt, at most (default 10)")
    make.add_argument("--temperature", type=float, default=0.8, help="of the samples (default 0.8)")
    make.add_argument("--top-p", type=float, default=1.0, help="of the samples (default 1)")
    make.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")

    settings = "Every setting of the config file can be overridden as --section.key value:\n\n"
    for name, function, text in (
        ("train", _train, "CPT or RPO as a config file says; goes on from its run folder by itself"),
        ("reference", _reference, "reference log-probabilities of an RPO run's pairs, stored beside them"),
    ):
        sub = verb(
            verbs,
            name,
            function,
            text,
            takes_settings=True,
            usage=f"medllm {name} --config FILE.yaml [--section.key value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--config", required=True, help="run config, YAML (see configs/)")
        sub.format_help = lambda sub=sub: _Parser.format_help(sub) + "\n" + settings + _settings_help()

    exam = verb(verbs, "evaluate", _evaluate, "exam accuracy, answer-only and with explanation")
    _add_model_arguments(exam)
    _add_exam_arguments(exam)
    exam.add_argument("--output", help="folder for outputs and scores (default: in the run folder)")
    return parser


def _settings_help() -> str:
    from medllm_jax.settings import describe

    return describe() + "\n"


def _add_store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or globs, local or gs://")
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer")
    parser.add_argument("--output", required=True, help="store folder, local or gs://")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens in a row (default 4096)")
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="what to do about malformed rows")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="run folder (or converted model); its newest checkpoint is used")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts completed at a time (default 8)")
    parser.add_argument("--mesh", default="", help="like data=1,fsdp=-1,tensor=1 (default: fsdp over all devices)")
    parser.add_argument("--params-dtype", choices=("float32", "bfloat16"), help="of the weights (default: as computed)")
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="default bfloat16, on a CPU float32",
    )


def _add_exam_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exam", required=True, help="IgakuQA folder, or multiple-choice .jsonl (see docs/exams.md)")
    parser.add_argument("--years", type=int, nargs="+", help="only these years of the exam")
    parser.add_argument("--template", default="igakuqa", help="prompt template: name or YAML file (default igakuqa)")
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=("answer_only", "explain"),
        default=["answer_only", "explain"],
        help="prompts to put the questions with (default both)",
    )


if __name__ == "__main__":
    sys.exit(main())

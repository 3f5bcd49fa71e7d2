"""`medllm`: one verb a subcommand. What a verb needs is imported inside it, so that `--help` is quick.

Exit codes: 0 done; 1 failure; 2 the input or the config is wrong.
"""

import argparse
import contextlib
import difflib
import shlex
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


# Options of `data cpt` that are settings of its recipe, by the same names (see data/corpus.py).
_RECIPE = (
    "sequence_length", "packing", "append_eos", "on_bad", "normalise", "min_characters", "max_bytes", "duplicates",
    "near_threshold", "pii", "pii_rate", "pii_patterns",
)  # fmt: skip


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
    print(f"reference log-probabilities of {pairs} pairs: {', '.join(config.data.stores)}")


def _plan(options: argparse.Namespace) -> None:
    import json

    from medllm_jax.plan import Question, plan, search
    from medllm_jax.planning.chips import parse_topology
    from medllm_jax.planning.report import as_text
    from medllm_jax.settings import load_run_config

    topology = parse_topology(options.topology, options.slices)
    config = load_run_config(options.config, options.settings)
    names = ("program", "sequence_length", "pairs_per_row", "new_tokens", "tokens")
    question = Question(topology, **{name: getattr(options, name) for name in names})
    if options.search:
        report = search(config, question, show=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        report = plan(config, question, memory_only=options.memory_only)
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def _data_cpt(options: argparse.Namespace) -> None:
    import os

    from medllm_jax.data.corpus import Corpus, Recipe, prepare_corpus
    from medllm_jax.data.stages import in_processes, on_beam
    from medllm_jax.settings import build, read_yaml

    settings = read_yaml(options.config) if options.config else {}
    where = options.config or "the command line"
    listed = settings.pop("corpora", [])
    if not isinstance(listed, list):
        raise UserError(f"{where}: corpora is a list of corpora, each with name and input")
    tokenizer = options.tokenizer or settings.pop("tokenizer", None)
    output = options.output or settings.pop("output", None)
    settings |= {name: value for name, value in vars(options).items() if name in _RECIPE and value is not None}
    recipe = build(Recipe, settings, where)
    if options.input:
        listed = [{"name": "corpus", "input": options.input}]
    corpora = [build(Corpus, corpus, f"{where}: corpora[{number}]") for number, corpus in enumerate(listed)]
    given = {"--input (or corpora in --config)": corpora, "--tokenizer": tokenizer, "--output": output}
    missing = [name for name, value in given.items() if not value]
    if missing:
        options.parser.error(f"the following arguments are required: {', '.join(missing)}")

    with contextlib.ExitStack() as stack:
        if options.engine == "beam":
            engine = on_beam(shlex.split(options.beam_options))
        else:
            engine = stack.enter_context(in_processes(options.workers or os.cpu_count() or 1))
        show = stack.enter_context(_stages())
        metadata = prepare_corpus(
            corpora, tokenizer, output, recipe, overwrite=options.overwrite, engine=engine, progress=show
        )
    _report_store(output, metadata, "documents")
    print(f"the whole report: medllm data show {output}")


def _data_pairs(options: argparse.Namespace) -> None:
    from medllm_jax.data.gate import Gate
    from medllm_jax.data.preferences import prepare_pairs

    with _counting("pairs") as progress:
        metadata = prepare_pairs(
            options.input,
            options.tokenizer,
            options.output,
            options.sequence_length,
            pairs_per_row=options.pairs_per_row,
            max_prompt_tokens=options.max_prompt_tokens,
            prompts=options.prompts,
            on_bad=options.on_bad,
            on_long=options.on_long,
            gate=Gate(options.pii, options.pii_rate, tuple(options.pii_patterns)),
            overwrite=options.overwrite,
            progress=progress,
        )
    _report_store(options.output, metadata, "pairs")


def _data_sft(options: argparse.Namespace) -> None:
    from medllm_jax.data.gate import Gate
    from medllm_jax.data.instructions import prepare_instructions

    with _counting("conversations") as progress:
        metadata = prepare_instructions(
            options.input,
            options.tokenizer,
            options.output,
            options.sequence_length,
            on_bad=options.on_bad,
            on_long=options.on_long,
            gate=Gate(options.pii, options.pii_rate, tuple(options.pii_patterns)),
            overwrite=options.overwrite,
            progress=progress,
        )
    _report_store(options.output, metadata, "conversations")


def _data_show(options: argparse.Namespace) -> None:
    from medllm_jax.data.report import report
    from medllm_jax.data.store import RowStore

    print(report(RowStore.open(options.store).metadata))


def _data_verify(options: argparse.Namespace) -> None:
    from medllm_jax.data.store import RowStore, verify
    from medllm_jax.metrics import Console

    with Console("verify", len(RowStore.open(options.store)), unit="row") as console:
        store = verify(options.store, lambda done: console.update(done, every_seconds=5))
    print(f"{options.store}: {len(store):,} rows are as they were written, {store.metadata.digest}")


def _pairs(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from etils import epath

    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.samples import SampleOptions, sample_exam
    from medllm_jax.metrics import Console
    from medllm_jax.pairs import PairOptions, choose_questions, make_pairs
    from medllm_jax.remote import write_whole

    drawn = SampleOptions(options.samples, options.temperature, options.top_p, options.seed)
    names = ("strategy", "most", "min_characters", "max_characters", "format_failures")
    wanted = PairOptions(**{name: getattr(options, name) for name in names})
    template = load_template(options.template)
    exam = load_exam(options.exam, years=options.years, text_only=options.text_only)
    exam, left_out = choose_questions(exam, list(map(load_exam, options.evaluation_exam)), options.on_overlap)
    output = epath.Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} exists: give another output, or --overwrite (which keeps the samples)")
    kept = epath.Path(options.samples_file or f"{str(output).removesuffix('.jsonl')}.samples.jsonl")

    sampler = _sampler(options, drawn)
    with Console("samples", len(exam.questions) * len(options.conditions), unit="prompt") as console:
        show = lambda done: console.update(done, every_seconds=10)  # noqa: E731
        samples = sample_exam(
            exam, template, options.conditions, kept, sampler, drawn, anew=options.resample, progress=show
        )
    rows, report = make_pairs(exam, template, options.conditions, samples, wanted, examples=options.show_examples)
    made_of = {"exam": exam.name, "template": template.name, "questions": len(exam.questions)}
    made_of |= {"questions_left_out": left_out, "options": dataclasses.asdict(wanted)}
    made_of |= {"samples_of": {"file": str(kept), "where": samples.where, **samples.settings}}
    output.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(made_of | report.as_dict(), ensure_ascii=False, indent=2)
    write_whole(output.with_name(f"{output.name}.report.json"), content + "\n")
    for reason, entry in left_out.items():
        print(f"questions left out: {entry['count']} {reason}")
    for line in report.lines():
        print(line)
    if not rows:
        raise UserError(f"no pair came out of {exam.name}: see the counts above; more samples, or a higher temperature")
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output}: {len(rows)} pairs; samples: {kept}; report: {output}.report.json")


def _sampler(options: argparse.Namespace, drawn: Any) -> Any:
    """The model that is asked, one of the three kinds; None where none is named."""
    from medllm_jax import samplers

    kinds = {"--run": options.run, "--hf": options.hf, "--server": options.server}
    named = [kind for kind, value in kinds.items() if value]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are given: one model is asked at a time")
    if bool(options.server) != bool(options.model):
        raise UserError("a server's model is named by --server URL and --model NAME, both")
    if options.server:
        of_server = {"concurrency": options.concurrency, "chat": options.chat}
        return samplers.named_server_sampler(options.server, options.model, drawn, **of_server)
    of_machine = {"batch_size": options.batch_size, "chat": options.chat}
    if options.hf:
        return samplers.folder_sampler(options.hf, drawn, dtype=options.compute_dtype, **of_machine)
    if not options.run:
        return None

    mesh, precision = _mesh_of(options.mesh), _precision_of(options)
    return samplers.run_sampler(options.run, drawn, mesh=mesh, precision=precision, **of_machine)


def _evaluate(options: argparse.Namespace) -> None:
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.run import evaluate, format_table
    from medllm_jax.evaluation.samples import SampleOptions
    from medllm_jax.metrics import Console

    choice = {"text_only": options.text_only, "prepend_stems": options.prepend_stems, "limit": options.limit}
    exam, template = load_exam(options.exam, options.years, **choice), load_template(options.template)
    temperature = options.temperature if options.samples > 1 else 0.0
    drawn = SampleOptions(options.samples, temperature, options.top_p, options.seed)
    output = options.output or _results_folder(options, exam.name, template.name)
    sampler = _sampler(options, drawn)
    with Console(f"exam {exam.name}", len(exam.questions) * len(options.conditions), unit="question") as console:
        show = lambda done: console.update(done, every_seconds=10)  # noqa: E731
        summaries = evaluate(
            exam, template, options.conditions, sampler, output, drawn, anew=options.resample, progress=show
        )
    print(format_table(summaries))
    print(f"outputs, grades and scores: {output}")


def _score(options: argparse.Namespace) -> None:
    import json

    from etils import epath

    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.predictions import read_predictions
    from medllm_jax.evaluation.score import SystemScore, as_json, comparison_text, text_of
    from medllm_jax.evaluation.statistics import compare

    whole = load_exam(options.data, name=options.exam)
    exam = load_exam(options.data, options.years, name=options.exam, text_only=options.text_only)
    if options.exam == "igakuqa" and any(question.year is None for question in exam.questions):
        raise UserError(f"{options.data} holds other questions than IgakuQA's: give --exam questions")
    predictions = read_predictions(options.predictions, exam, whole, allow_missing=options.allow_missing)
    systems = [SystemScore.of(name, found, exam, options.condition) for name, found in predictions.items()]
    by_name = {system.name: system for system in systems}
    if options.against is not None and (options.against not in by_name or len(systems) < 2):
        raise UserError(f"--against {options.against}: there are predictions of {', '.join(by_name)}; two are compared")
    others = [system for system in systems if options.against not in (None, system.name)]
    first = by_name.get(options.against)
    if options.json:
        compared = {other.name: compare(first.grades[options.tier], other.grades[options.tier]) for other in others}
        print(json.dumps(as_json(systems, compared), indent=1, ensure_ascii=False))
    else:
        print(text_of(systems, options.tier))
        for other in others:
            print("\n" + comparison_text(first, other, options.tier))
    if options.output:
        for system in systems:
            system.write(epath.Path(options.output) / system.name, exam)
        print(
            f"\nresults for `medllm report`: {', '.join(f'{options.output}/{name}' for name in by_name)}",
            file=sys.stderr,
        )


def _data_exam(options: argparse.Namespace) -> None:
    from medllm_jax.evaluation.download import ATTRIBUTION, SOURCE, fetch, igakuqa_files
    from medllm_jax.metrics import Console

    files = igakuqa_files(options.years, baselines=options.with_baselines)
    with Console("fetching", len(files), unit="file") as console:
        show = lambda done: console.update(done, every_seconds=5)  # noqa: E731
        source, overwrite = options.source or SOURCE, options.overwrite
        fetched = fetch(files, source, options.output, ATTRIBUTION, overwrite=overwrite, progress=show)
    print(f"{options.output}: {fetched.fetched} files fetched, {fetched.kept} were there; see its ATTRIBUTION.md")


def _contamination(options: argparse.Namespace) -> None:
    from medllm_jax.contamination import accuracies_apart, contamination, write_contamination
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.metrics import Ticker

    exam = load_exam(options.exam, options.years, text_only=options.text_only)
    how = {"tokenizer": options.tokenizer, "n": options.n, "threshold": options.threshold}
    found = contamination(exam, options.against, **how, progress=Ticker("texts", every_seconds=10))
    share = f"{found['overlapping']} of {found['questions']} questions ({100 * found['share']:.1f}%)"
    least = f"{100 * options.threshold:.0f}% or more of their {options.n}-character stretches"
    print(f"{share}: {least} are in what was read")
    if found["too_short"]:
        print(f"  {found['too_short']} questions are shorter than that, and can't be found")
    for year, count in found["by_year"].items():
        print(f"  {year}: {count}")
    if options.output:
        for condition, which, group in accuracies_apart(options.output, found["ids"]):
            print(f"  {condition}, {which} questions: {group.correct} of {group.n} right ({100 * group.accuracy:.1f}%)")
        print(f"ids and shares: {write_contamination(options.output, found)}")


def _report(options: argparse.Namespace) -> None:
    from medllm_jax.report.collect import collect
    from medllm_jax.report.page import write_report

    runs, results = collect(options.folder)
    page = write_report(runs, results, options.output, options.example)
    print(f"{page}: {len(runs)} runs, {len(results)} exam results; pictures: {page.parent / 'figures'}")


def _likelihood(options: argparse.Namespace) -> None:
    import json

    from etils import epath

    from medllm_jax.checkpoint import latest_step
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.likelihood import likelihood_of_run
    from medllm_jax.remote import write_whole

    exam = load_exam(options.exam, options.years, text_only=options.text_only)
    template = load_template(options.template)
    step = latest_step(options.run)
    output = epath.Path(options.output or f"{options.run}/evaluation/{exam.name}-{template.name}-step{step}")
    placed = {"mesh": _mesh_of(options.mesh), "precision": _precision_of(options)}
    score = likelihood_of_run(options.run, exam, template, batch_size=options.batch_size, **placed)
    output.mkdir(parents=True, exist_ok=True)
    found = {"exam": exam.name, "template": template.name, "model": f"{options.run}@{step}", "step": step}
    write_whole(output / "likelihood.json", json.dumps(found | score.as_dict(), indent=2, ensure_ascii=False) + "\n")
    shares = f"{100 * score.accuracy:.1f}%; by points {100 * score.weighted_accuracy:.1f}%"
    print(f"the likeliest answer is right: {score.correct} of {score.n} ({shares}); not scored: {score.left_out}")
    print(f"not to be compared with what a model writes; {output / 'likelihood.json'}")


def _results_folder(options: argparse.Namespace, exam: str, template: str) -> Any:
    """Where results of a run stand if nothing else is said: one folder for each way of asking it."""
    from etils import epath

    from medllm_jax.checkpoint import latest_step

    if not options.run:
        raise UserError("--output is missing: the folder for outputs and scores (only a run has a place for them)")
    ways = [exam, template, f"step{latest_step(options.run)}"]
    ways += ["chat"] * options.chat + ["stems"] * options.prepend_stems
    ways += [f"{options.samples}samples"] if options.samples > 1 else []
    return epath.Path(options.run) / "evaluation" / "-".join(ways)


def _rounds(options: argparse.Namespace) -> None:
    from medllm_jax.rounds import load_rounds_config, run_rounds

    run_rounds(load_rounds_config(options.config))


def _demo(options: argparse.Namespace) -> None:
    from medllm_jax.demo.recipe import run_demo

    run_demo(options.workdir, options.seed)


def _precision_of(options: argparse.Namespace) -> Any:
    import jax

    from medllm_jax.config import PrecisionConfig

    # A CPU computes bfloat16 by converting it, which is slower and no smaller.
    compute = options.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return PrecisionConfig(params=options.params_dtype or compute, compute=compute)


def _mesh_of(text: str) -> Any:
    from medllm_jax.config import MeshConfig
    from medllm_jax.settings import build

    sizes = dict(part.partition("=")[::2] for part in text.split(",") if part)
    return build(MeshConfig, {axis: int(size) if _is_int(size) else size for axis, size in sizes.items()}, "--mesh")


def _is_int(text: str) -> bool:
    return text.removeprefix("-").isdigit()


@contextlib.contextmanager
def _counting(what: str):
    """A context whose value shows a growing count now and then."""
    import time

    last = time.monotonic()

    def show(items: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            print(f"{items:,} {what}", flush=True)

    yield show


@contextlib.contextmanager
def _stages():
    """A context whose value shows stage after stage: (stage, done, total) -> None."""
    from medllm_jax.metrics import Console

    console, current = None, None

    def show(stage: str, done: int, total: int) -> None:
        nonlocal console, current
        if stage != current:
            if console is not None:
                console.close()
            console, current = Console(stage, total, done=done, unit="unit"), stage
        console.update(done, every_seconds=5)

    try:
        yield show
    finally:
        if console is not None:
            console.close()


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
    cpt = verb(
        kinds, "cpt", _data_cpt, "documents (.jsonl, .txt, .parquet; .gz, .zst) to a token store (see docs/corpora.md)"
    )
    cpt.add_argument("--config", help="YAML with corpora and their manifests, and any of these settings")
    _add_store_arguments(cpt, required=False)
    cpt.add_argument("--packing", choices=("best_fit", "split"), help="keep documents whole (default), or cut")
    cpt.add_argument(
        "--no-eos",
        dest="append_eos",
        action="store_false",
        default=None,
        help="no end-of-sequence token",
    )
    cpt.add_argument("--normalise", choices=("none", "nfc", "nfkc"), help="Unicode form (default none)")
    cpt.add_argument("--min-characters", type=int, help="leave out shorter documents (default 1)")
    cpt.add_argument("--max-bytes", type=int, help="of one line or text (default 64 MiB)")
    cpt.add_argument("--duplicates", choices=("keep", "exact", "near"), help="which are left out (default exact)")
    cpt.add_argument("--near-threshold", type=float, help="similarity of near duplicates (default 0.8)")
    cpt.add_argument(
        "--engine", choices=("here", "beam"), default="here", help="processes here (default), or Apache Beam"
    )
    cpt.add_argument("--workers", type=int, help="processes (default: one a core)")
    cpt.add_argument("--beam-options", default="", help="in one string, like '--runner=DataflowRunner --project=...'")
    pairs = verb(kinds, "pairs", _data_pairs, "preference rows (`prompt`, `chosen`, `rejected`) to a pair store")
    _add_store_arguments(pairs)
    pairs.add_argument("--pairs-per-row", type=int, help="at most so many pairs in a row (default: as many as fit)")
    pairs.add_argument("--max-prompt-tokens", type=int, help="a pair with a longer prompt is over-long")
    pairs.add_argument(
        "--prompts", choices=("shared", "repeated"), default="shared", help="once for both responses, or for each"
    )
    pairs.add_argument("--on-long", choices=("error", "skip"), default="error", help="what to do about over-long pairs")

    sft = verb(kinds, "sft", _data_sft, "instructions (`prompt`, `response`, or chat `messages`) to a store")
    _add_store_arguments(sft)
    sft.add_argument("--on-long", choices=("error", "skip"), default="error", help="what to do about over-long ones")

    exam = verb(kinds, "exam", _data_exam, "fetch a public exam to judge models by, checked against its checksums")
    exam.add_argument("name", choices=("igakuqa",), help="the Japanese medical licensing exam, 2018 to 2022")
    exam.add_argument("--output", required=True, help="folder, local or gs://")
    exam.add_argument("--years", type=int, nargs="+", help="only these years")
    exam.add_argument("--with-baselines", action="store_true", help="also the published predictions")
    exam.add_argument("--source", metavar="URL", help="a mirror (default: the public repository at the pinned commit)")
    exam.add_argument("--overwrite", action="store_true", help="replace files that differ")

    show = verb(kinds, "show", _data_show, "the report of a store: corpora, manifests, what was left out, statistics")
    show.add_argument("store", help="store folder, local or gs://")
    check = verb(kinds, "verify", _data_verify, "read all of a store against its checksums")
    check.add_argument("store", help="store folder, local or gs://")

    about = "sample a model on an exam with known answers, grade, make preference rows (see docs/pairs.md)"
    make = verb(verbs, "pairs", _pairs, about)
    _add_model_arguments(make)
    _add_exam_arguments(make)
    _add_sample_arguments(make, samples=8)
    _add_pair_arguments(make)

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
            takes_settings=True,
            usage=f"medllm {name} --config FILE.yaml {'--topology NAME ' * (name == 'plan')}[--section.key value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--config", required=True, help="run config, YAML (see configs/)")
        sub.format_help = lambda sub=sub: _Parser.format_help(sub) + "\n" + settings + _settings_help()
        if name == "plan":
            _add_plan_arguments(sub)

    again = verb(verbs, "rounds", _rounds, "Iterative RPO: sample, pair, train and examine, round after round")
    again.add_argument("--config", required=True, help="YAML of rounds (see docs/rpo.md)")

    score = verb(verbs, "score", _score, "scores of predictions that are there already (see docs/exams.md)")
    _add_score_arguments(score)

    exam = verb(verbs, "evaluate", _evaluate, "exam accuracy, answer-only and with explanation")
    _add_model_arguments(exam)
    _add_exam_arguments(exam)
    _add_sample_arguments(exam, samples=1)
    exam.add_argument("--prepend-stems", action="store_true", help="the case before follow-up questions that lack it")
    exam.add_argument("--limit", type=int, help="only the first so many questions")
    exam.add_argument("--output", help="folder for outputs and scores (default: in the run folder)")

    about = "how much of an exam stands in corpora or stores (see docs/contamination.md)"
    overlap = verb(verbs, "contamination", _contamination, about)
    overlap.add_argument("--exam", required=True, help="IgakuQA folder, or multiple-choice .jsonl")
    overlap.add_argument("--years", type=int, nargs="+", help="only these years of the exam")
    overlap.add_argument("--text-only", action="store_true", help="only questions that need no picture")
    sources = "stores, or files, folders and globs of documents, pairs, instructions; local or gs://"
    overlap.add_argument("--against", nargs="+", required=True, metavar="PATH", help=sources)
    overlap.add_argument("--tokenizer", metavar="DIR", help="that the stores were made with")
    overlap.add_argument("--n", type=int, default=13, help="characters of a stretch (default 13)")
    share = "share of a question's stretches from which on it counts (default 0.5)"
    overlap.add_argument("--threshold", type=float, default=0.5, help=share)
    overlap.add_argument("--output", metavar="DIR", help="exam results to put contamination.json into")

    report = verb(verbs, "report", _report, "runs and exam results as one HTML page with pictures")
    report.add_argument("folder", nargs="+", help="run folders, or folders of exam results, local or gs://")
    report.add_argument("--output", default="report", help="folder for report.html and figures/ (default report)")
    shown = "question whose outputs are shown; may be given again (no output is shown otherwise)"
    report.add_argument("--example", action="append", default=[], metavar="ID", help=shown)

    about = "how often the likeliest letters are right: a quick look at a model, no exam score"
    look = verb(verbs, "likelihood", _likelihood, about)
    look.add_argument("--run", required=True, help="run folder (or converted model); its newest checkpoint is used")
    _add_machine_arguments(look)
    _add_question_arguments(look)
    look.add_argument("--output", help="folder for likelihood.json (default: in the run folder)")
    return parser


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
    parser.add_argument("--search", action="store_true", help="try remat, rows at a time, mesh and vocab_chunks")
    parser.add_argument("--memory-only", action="store_true", help="seconds instead of minutes, and no times")
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def _settings_help() -> str:
    from medllm_jax.settings import describe

    return describe() + "\n"


def _add_store_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """required: what is not given is not to be found in a config file either."""
    default = (lambda value: value) if required else (lambda value: None)
    parser.add_argument("--input", nargs="+", required=required, help="files, folders or globs, local or gs://")
    parser.add_argument("--tokenizer", required=required, help="folder with the model's tokenizer, or a .model file")
    parser.add_argument("--output", required=required, help="store folder, local or gs://")
    parser.add_argument("--sequence-length", type=int, default=default(4096), help="tokens in a row (default 4096)")
    bad = "what to do about malformed rows (default error)"
    parser.add_argument("--on-bad", choices=("error", "skip"), default=default("error"), help=bad)
    pii = "personal data: stop where it is found (default), mask it, or only report it (see docs/personal-data.md)"
    parser.add_argument("--pii", choices=("fail", "mask", "report"), default=default("fail"), help=pii)
    rate = "share of documents with findings up to which `fail` goes on (default 0)"
    parser.add_argument("--pii-rate", type=float, default=default(0.0), help=rate)
    parser.add_argument("--pii-patterns", nargs="+", default=default([]), help="YAML files with more patterns")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run folder (or converted model); its newest checkpoint is asked, by JAX")
    parser.add_argument("--hf", metavar="DIR", help="or a model in Hugging Face format, by transformers and torch")
    parser.add_argument("--server", metavar="URL", help="or an OpenAI-compatible server, like vLLM's")
    parser.add_argument("--model", metavar="NAME", help="of the model on the server; stands for its weights")
    parser.add_argument("--chat", action="store_true", help="prompts as chat messages, by the model's chat template")
    parser.add_argument("--concurrency", type=int, default=16, help="requests to the server at a time (default 16)")
    _add_machine_arguments(parser)


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8, help="prompts completed at a time (default 8)")
    parser.add_argument("--mesh", default="", help="like data=1,fsdp=-1,tensor=1 (default: fsdp over all devices)")
    parser.add_argument("--params-dtype", choices=("float32", "bfloat16"), help="of the weights (default: as computed)")
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="default bfloat16, on a CPU float32",
    )


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    other = "exam that the model will be judged by, in whole; may be given again"
    parser.add_argument("--evaluation-exam", action="append", default=[], metavar="PATH", help=other)
    overlap = "what to do about questions that it asks too (default refuse)"
    parser.add_argument("--on-overlap", choices=("refuse", "drop"), default="refuse", help=overlap)

    parser.add_argument("--output", required=True, help="preference rows, .jsonl; OUTPUT.report.json stands beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there; samples stay")
    kept = "where the samples are kept, and gone on from (default: beside the output)"
    parser.add_argument("--samples-file", metavar="PATH", help=kept)
    parser.add_argument("--strategy", choices=("gold", "onpolicy", "both"), default="both", help="what is preferred")
    parser.add_argument("--most", type=int, default=10, help="pairs of one prompt, at most (default 10)")
    parser.add_argument("--min-characters", type=int, default=1, help="shorter samples are left out (default 1)")
    parser.add_argument("--max-characters", type=int, help="longer samples are left out (default: none)")
    failures = "samples in which no answer can be read: rejected like wrong ones (default), or left out"
    parser.add_argument("--format-failures", choices=("reject", "drop"), default="reject", help=failures)
    shown = "texts by reason in the report, never on the terminal (default 0)"
    parser.add_argument("--show-examples", type=int, default=0, metavar="N", help=shown)


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "IgakuQA with its parts and thresholds (default), or any multiple-choice .jsonl"
    parser.add_argument("--exam", choices=("igakuqa", "questions"), default="igakuqa", help=kinds)
    parser.add_argument("--data", required=True, metavar="DIR", help="the exam's folder or file, local or gs://")
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help="files, folders or patterns")
    parser.add_argument("--years", type=int, nargs="+", help="only these years of the exam")
    parser.add_argument("--text-only", action="store_true", help="only questions that need no picture")
    tier = "which rule the details are of (default strict); points are shown of all three"
    parser.add_argument("--tier", choices=("official", "strict", "lenient"), default="strict", help=tier)
    condition = "what the prompt asked for (default answer_only)"
    parser.add_argument("--condition", choices=("answer_only", "explain"), default="answer_only", help=condition)
    parser.add_argument("--against", metavar="SYSTEM", help="compare the others with this one, question by question")
    parser.add_argument("--allow-missing", action="store_true", help="count questions without a prediction as wrong")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    parser.add_argument("--output", metavar="DIR", help="also write results, one folder a system, for `medllm report`")


def _add_sample_arguments(parser: argparse.ArgumentParser, *, samples: int) -> None:
    several = "completions of each prompt" + ("; of several the majority's answer counts" if samples == 1 else "")
    parser.add_argument("--samples", type=int, default=samples, help=f"{several} (default {samples})")
    drawn = "of the samples" if samples > 1 else "of several; one is greedy"
    parser.add_argument("--temperature", type=float, default=0.8, help=f"{drawn} (default 0.8)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the samples (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument("--resample", action="store_true", help="forget the samples that are there")


def _add_question_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exam", required=True, help="IgakuQA folder, or multiple-choice .jsonl (see docs/exams.md)")
    parser.add_argument("--years", type=int, nargs="+", help="only these years of the exam")
    parser.add_argument("--text-only", action="store_true", help="only questions that need no picture")
    parser.add_argument("--template", default="igakuqa", help="prompt template: name or YAML file (default igakuqa)")


def _add_exam_arguments(parser: argparse.ArgumentParser) -> None:
    _add_question_arguments(parser)
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=("answer_only", "explain"),
        default=["answer_only", "explain"],
        help="prompts to put the questions with (default both)",
    )


if __name__ == "__main__":
    sys.exit(main())

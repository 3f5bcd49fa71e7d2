"""`medllm data`: from raw text to stores, and looks at them; exams, fetched."""

import argparse
import contextlib
import dataclasses
import shlex
from typing import Annotated, Any

from medllm_jax.cli import arguments
from medllm_jax.ranges import Characters, MaxBytes, PairsPerRow, Range, SequenceLength, SimilarityThreshold
from medllm_jax.terminal.parser import number, verb

# Options of `data cpt` that are settings of its recipe, by the same names (see data/corpus.py).
_RECIPE = (
    "sequence_length", "packing", "append_eos", "on_bad", "normalise", "min_characters", "max_bytes", "duplicates",
    "near_threshold", "pii", "pii_rate", "pii_patterns",
)  # fmt: skip


def add(verbs: Any) -> None:
    """The verb and its kinds."""
    data = verbs.add_parser(
        "data", help="prepare stores of packed rows from documents, preference pairs or instructions"
    )
    kinds = data.add_subparsers(title="kinds", required=True, metavar="KIND")
    cpt = verb(
        kinds,
        "cpt",
        _data_cpt,
        "pack documents (.jsonl, .txt, .parquet; .gz, .zst, .xz, .bz2) into a token store (see docs/corpora.md)",
    )
    cpt.add_argument("--config", help="YAML with corpora and their manifests, and any of these settings")
    arguments.add_store(cpt, required=False)
    text = "field or column that holds the text (default text; not of .txt)"
    cpt.add_argument("--text-field", metavar="NAME", help=text)
    cpt.add_argument("--packing", choices=("best_fit", "split"), help="keep documents whole (default), or cut")
    cpt.add_argument(
        "--no-eos",
        dest="append_eos",
        action="store_false",
        default=None,
        help="append no end-of-sequence token",
    )
    cpt.add_argument("--normalise", choices=("none", "nfc", "nfkc"), help="Unicode form (default none)")
    cpt.add_argument("--min-characters", type=number(Characters), help="leave out shorter documents (default 1)")
    cpt.add_argument("--max-bytes", type=number(MaxBytes), help="largest size of one line or text (default 64 MiB)")
    cpt.add_argument(
        "--duplicates",
        choices=("keep", "exact", "near"),
        help="leave out exact duplicates (default), near ones too, or none",
    )
    similar = "similarity of near duplicates (default 0.8)"
    cpt.add_argument("--near-threshold", type=number(SimilarityThreshold), help=similar)
    cpt.add_argument(
        "--engine", choices=("here", "beam"), default="here", help="processes here (default), or Apache Beam"
    )
    processes = number(Annotated[int, Range(1, 1024)])
    cpt.add_argument("--workers", type=processes, help="processes (default: one a core)")
    cpt.add_argument("--beam-options", default="", help="in one string, like '--runner=DataflowRunner --project=...'")
    pairs = verb(kinds, "pairs", _data_pairs, "pack preference rows (`prompt`, `chosen`, `rejected`) into a pair store")
    arguments.add_store(pairs)
    arguments.add_forms(pairs, "prompt=question chosen=good rejected=bad")
    fit = "put at most N pairs in a row (default: as many as fit)"
    pairs.add_argument("--pairs-per-row", type=number(PairsPerRow), help=fit)
    long = "a pair with a longer prompt is over-long"
    pairs.add_argument("--max-prompt-tokens", type=number(SequenceLength), help=long)
    pairs.add_argument(
        "--prompts",
        choices=("shared", "repeated"),
        default="shared",
        help="store a prompt once for both responses (default), or once for each",
    )
    pairs.add_argument("--on-long", choices=("error", "skip"), default="error", help="what to do about over-long pairs")

    sft = verb(
        kinds,
        "sft",
        _data_sft,
        "pack instructions (`prompt`+`response`, chat `messages`, Alpaca, ShareGPT, TRL) into a store",
    )
    arguments.add_store(sft)
    arguments.add_forms(sft, "prompt=question response=answer")
    sft.add_argument("--on-long", choices=("error", "skip"), default="error", help="what to do about over-long ones")

    show = verb(
        kinds, "show", _data_show, "show the report of a store: corpora, manifests, what was left out, statistics"
    )
    show.add_argument("store", help="store folder, local or gs://")
    check = verb(kinds, "verify", _data_verify, "check all of a store against its checksums")
    check.add_argument("store", help="store folder, local or gs://")

    exam = verb(kinds, "exam", _data_exam, "download a public exam and check it against its checksums")
    exam.add_argument("name", choices=("igakuqa",), help="the Japanese medical licensing exam, 2018 to 2022")
    exam.add_argument("--output", required=True, help="folder, local or gs://")
    exam.add_argument("--years", type=number(arguments.Years), nargs="+", help="only these years")
    exam.add_argument("--with-baselines", action="store_true", help="also the published predictions")
    exam.add_argument("--source", metavar="URL", help="a mirror (default: the public repository at the pinned commit)")
    exam.add_argument("--overwrite", action="store_true", help="replace files that differ")


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """What a config of `data cpt` names beside its recipe: corpora, each a `Corpus`, and what options name too."""

    corpora: tuple[dict[str, Any], ...] = ()
    tokenizer: str | None = None
    output: str | None = None


def _data_cpt(options: argparse.Namespace) -> None:
    import os

    from medllm_jax.config.schema_reader import build, read_yaml
    from medllm_jax.data.prepare.corpus import STAGES, Corpus, Recipe, prepare_corpus
    from medllm_jax.data.prepare.hub_dataset import SCHEME
    from medllm_jax.data.prepare.jobs import in_processes, on_beam
    from medllm_jax.terminal.progress import Stages

    settings = read_yaml(options.config) if options.config else {}
    where = options.config or "the command line"
    named = {name: settings.pop(name) for name in ("corpora", "tokenizer", "output") if name in settings}
    file = build(_Preparation, named, where)
    tokenizer, output = options.tokenizer or file.tokenizer or "", options.output or file.output or ""
    settings |= {name: value for name, value in vars(options).items() if name in _RECIPE and value is not None}
    recipe = build(Recipe, settings, where)
    listed = ({"name": "corpus", "input": options.input},) if options.input else file.corpora
    if options.text_field:
        listed = [{**corpus, "text_field": options.text_field} for corpus in listed]
    corpora = [build(Corpus, corpus, f"{where}: corpora[{number}]") for number, corpus in enumerate(listed)]
    given = {"--input (or corpora in --config)": corpora, "--tokenizer": tokenizer, "--output": output}
    missing = [name for name, value in given.items() if not value]
    if missing:
        options.parser.error(f"the following arguments are required: {', '.join(missing)}")

    tokenizer = arguments.tokenizer_of(tokenizer)
    with contextlib.ExitStack() as stack:
        if options.engine == "beam":
            if any(SCHEME in str(corpus.input) for corpus in corpora):
                options.parser.error(f"{SCHEME} is read on this machine alone: use --engine here")
            executor = on_beam(shlex.split(options.beam_options))
        else:
            executor = stack.enter_context(in_processes(options.workers or os.cpu_count() or 1))
        show = stack.enter_context(Stages(STAGES))
        metadata = prepare_corpus(
            corpora, tokenizer, output, recipe, overwrite=options.overwrite, executor=executor, progress=show
        )
    _report_store(output, metadata, "documents")
    print(f"the whole report: medllm data show {output}")


def _data_pairs(options: argparse.Namespace) -> None:
    from medllm_jax.data.prepare.pii_gate import PiiGate
    from medllm_jax.data.prepare.preference_pairs import prepare_pairs
    from medllm_jax.terminal.progress import Counter

    metadata = prepare_pairs(
        options.input,
        arguments.tokenizer_of(options.tokenizer),
        options.output,
        options.sequence_length,
        pairs_per_row=options.pairs_per_row,
        max_prompt_tokens=options.max_prompt_tokens,
        prompts=options.prompts,
        on_bad=options.on_bad,
        on_long=options.on_long,
        gate=PiiGate(options.pii, options.pii_rate, tuple(options.pii_patterns)),
        columns=arguments.columns_of(options),
        chat=options.chat,
        overwrite=options.overwrite,
        progress=Counter("pairs packed", every_seconds=5),
    )
    _report_store(options.output, metadata, "pairs")


def _data_sft(options: argparse.Namespace) -> None:
    from medllm_jax.data.prepare.instructions import prepare_instructions
    from medllm_jax.data.prepare.pii_gate import PiiGate
    from medllm_jax.terminal.progress import Counter

    metadata = prepare_instructions(
        options.input,
        arguments.tokenizer_of(options.tokenizer),
        options.output,
        options.sequence_length,
        on_bad=options.on_bad,
        on_long=options.on_long,
        gate=PiiGate(options.pii, options.pii_rate, tuple(options.pii_patterns)),
        columns=arguments.columns_of(options),
        chat=options.chat,
        overwrite=options.overwrite,
        progress=Counter("conversations packed", every_seconds=5),
    )
    _report_store(options.output, metadata, "conversations")


def _data_exam(options: argparse.Namespace) -> None:
    from medllm_jax.evaluation.download import ATTRIBUTION, SOURCE, fetch, igakuqa_files
    from medllm_jax.terminal.progress import Console

    files = igakuqa_files(options.years, baselines=options.with_baselines)
    with Console("fetching", len(files), unit="file") as console:
        show = lambda done: console.update(done, every_seconds=5)  # noqa: E731
        source, overwrite = options.source or SOURCE, options.overwrite
        fetched = fetch(files, source, options.output, ATTRIBUTION, overwrite=overwrite, progress=show)
    print(f"{options.output}: {fetched.fetched} files fetched, {fetched.kept} were there; see its ATTRIBUTION.md")


def _data_show(options: argparse.Namespace) -> None:
    from medllm_jax.data.prepare.store_report import report
    from medllm_jax.data.store import RowStore

    print(report(RowStore.open(options.store).metadata))


def _data_verify(options: argparse.Namespace) -> None:
    from medllm_jax.data.store import RowStore, verify
    from medllm_jax.terminal.progress import Console

    with Console("verify", len(RowStore.open(options.store)), unit="row") as console:
        store = verify(options.store, lambda done: console.update(done, every_seconds=5))
    print(f"{options.store}: {len(store):,} rows are as they were written, {store.metadata.digest}")


def _report_store(output: str, metadata: Any, what: str) -> None:
    print(
        f"{output}: {metadata.examples:,} {what} in {metadata.rows:,} rows of {metadata.sequence_length}, "
        f"{metadata.tokens:,} tokens, {metadata.fill:.1%} full"
    )
    for corpus in metadata.corpora:
        files = corpus.manifest["files"]
        size, name = sum(file["bytes"] for file in files), f" of {corpus.name}" if len(metadata.corpora) > 1 else ""
        print(
            f"input{name}: {len(files):,} files, {size:,} bytes, {corpus.manifest['rows']:,} rows, "
            f"of which {corpus.examples:,} are in the store"
        )
        for reason, entry in corpus.manifest["passed_over"].items():
            print(f"passed over: {entry['count']} ({reason}), first at {', '.join(entry['first'][:3])}")
        found = corpus.manifest.get("personal_data", {"flagged": 0})
        if found["flagged"]:
            done = "masked" if metadata.recipe.get("pii") == "mask" else "left as it is"
            print(f"personal data, {done}: in {found['flagged']:,} of {found['documents']:,} {what} of {corpus.name}")
    for reason, entry in metadata.dropped.items():
        places = ", ".join(entry["first"])
        print(f"left out: {entry['count']} ({reason}), first at {places}")

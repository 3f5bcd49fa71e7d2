"""`medllm pairs | evaluate | score | likelihood | contamination | report`: what asks models, and what came of it."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

from medllm_jax.cli import arguments
from medllm_jax.errors import RunError, UserError
from medllm_jax.ranges import Characters, PairsPerPrompt, Range, SimilarityThreshold
from medllm_jax.terminal.parser import number, verb

_KINDS = ("igakuqa", "questions")  # what --exam was of `score`, beside --data


def add(verbs: Any) -> None:
    """The verbs."""
    about = "sample a model on an exam with known answers, grade the samples, make preference rows (see docs/pairs.md)"
    make = verb(verbs, "pairs", _alone(_pairs), about)
    arguments.add_model(make)
    arguments.add_exam(make)
    arguments.add_samples(make, samples=8)
    _add_pair_arguments(make)

    score = verb(verbs, "score", _score, "score existing predictions (see docs/exams.md)")
    _add_score_arguments(score)

    exam = verb(verbs, "evaluate", _evaluate, "measure exam accuracy, answer-only and with explanation")
    arguments.add_model(exam)
    arguments.add_exam(exam)
    arguments.add_samples(exam, samples=1)
    exam.add_argument(
        "--prepend-stems", action="store_true", help="put the case before follow-up questions that lack it"
    )
    exam.add_argument("--output", help="folder for outputs and scores (default: in the run folder)")

    about = "measure how much of an exam occurs in corpora or stores (see docs/contamination.md)"
    overlap = verb(verbs, "contamination", _contamination, about)
    arguments.add_which_questions(overlap)
    sources = "stores, or files, folders and globs of documents, pairs, instructions; local or gs://"
    overlap.add_argument("--against", nargs="+", required=True, metavar="PATH", help=sources)
    overlap.add_argument("--tokenizer", metavar="DIR", help="tokenizer of the stores: a folder, or a name on the hub")
    ngram = number(Annotated[int, Range(4, 1000)])
    overlap.add_argument("--n", type=ngram, default=13, help="characters of an n-gram (default 13)")
    share = "share of a question's n-grams from which it counts as found (default 0.5)"
    overlap.add_argument("--threshold", type=number(SimilarityThreshold), default=0.5, help=share)
    overlap.add_argument("--output", metavar="DIR", help="exam results to put contamination.json into")

    report = verb(verbs, "report", _report, "write one HTML page with pictures about runs and exam results")
    report.add_argument("folder", nargs="+", help="run folders, or folders of exam results, local or gs://")
    report.add_argument("--output", default="report", help="folder for report.html and figures/ (default report)")
    shown = (
        "show the outputs for this question, or for all, wrong, unreadable, lost, gained; repeatable (default: none)"
    )
    report.add_argument("--example", action="append", default=[], metavar="ID", help=shown)
    asked = "show questions and right answers of this exam beside the examples; repeatable"
    report.add_argument("--exam", action="append", default=[], metavar="PATH", help=asked)

    about = "measure how often the likeliest letters are right: a quick look at a model, not an exam score"
    look = verb(verbs, "likelihood", _likelihood, about)
    look.add_argument("--run", required=True, help="run folder (or converted model); its newest checkpoint is used")
    arguments.add_batch_size(look)
    arguments.add_machine(look)
    arguments.add_questions(look)
    look.add_argument("--output", help="folder for what is written (default: in the run folder, or RESULTS)")
    after = "results of this model: take the likeliest answer after its explanations in them too, question by question"
    look.add_argument("--after", metavar="RESULTS", help=after)


def _alone(act: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A verb that no other program may write the --output of at the same time."""

    def run(options: argparse.Namespace) -> None:
        from medllm_jax.storage.lease import Lease

        with Lease.beside(options.output):
            act(options)

    return run


def _pairs(options: argparse.Namespace) -> None:
    import dataclasses
    import json

    from etils import epath

    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.samples import sample_exam
    from medllm_jax.evaluation.sampling import SamplingParams
    from medllm_jax.preferences.make_pairs import PairOptions, choose_questions, make_pairs
    from medllm_jax.storage.remote import write_whole
    from medllm_jax.terminal.progress import Console

    drawn = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    params = SamplingParams(n=options.samples, **drawn)
    names = ("strategy", "max_pairs_per_prompt", "min_characters", "max_characters", "format_failures")
    wanted = PairOptions(**{name: getattr(options, name) for name in names})
    template = load_template(options.template)
    exam = load_exam(options.exam, options.years, text_only=options.text_only, limit=options.limit)
    judged_by = list(map(load_exam, options.evaluation_exam))
    exam, left_out = choose_questions(exam, judged_by, options.on_overlap)
    output = epath.Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"{output} exists: give another output, or --overwrite (which keeps the samples)")
    kept = epath.Path(options.samples_file or f"{str(output).removesuffix('.jsonl')}.samples.jsonl")

    checkpoint = _opened(options)
    print(f"asking {len(exam.questions):,} questions of {exam.name}, {options.samples} samples each", flush=True)
    sampler = _sampler(options, checkpoint)
    with Console("samples", len(exam.questions) * len(options.conditions), unit="prompt", late=True) as console:
        show = lambda done: console.update(done, every_seconds=10)  # noqa: E731
        samples = sample_exam(
            exam, template, options.conditions, kept, sampler, params, anew=options.resample, progress=show
        )
    rows, report = make_pairs(exam, template, options.conditions, samples, wanted, examples=options.show_examples)
    made_of = {"exam": exam.name, "template": template.name, "questions": len(exam.questions)}
    made_of |= {"evaluation_exams": [judge.name for judge in judged_by], "questions_left_out": left_out}
    made_of["options"] = dataclasses.asdict(wanted)
    made_of |= {"samples_of": {"file": str(kept), "where": samples.where, **samples.settings}}
    output.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(made_of | report.as_dict(), ensure_ascii=False, indent=2)
    write_whole(output.with_name(f"{output.name}.report.json"), content + "\n")
    if not judged_by:
        print("no --evaluation-exam is given: questions that the model will be judged by may be among these")
    for reason, entry in left_out.items():
        print(f"questions left out: {entry['count']} {reason}")
    for line in report.lines():
        print(line)
    if not rows:
        raise UserError(f"no pair came out of {exam.name}: see the counts above; more samples, or a higher temperature")
    write_whole(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{output}: {len(rows)} pairs; samples: {kept}; report: {output}.report.json")


def _evaluate(options: argparse.Namespace) -> None:
    from medllm_jax.evaluation.evaluate import evaluate, format_table
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.sampling import SamplingParams
    from medllm_jax.storage.lease import Lease
    from medllm_jax.terminal.progress import Console

    choice = {"text_only": options.text_only, "prepend_stems": options.prepend_stems, "limit": options.limit}
    exam, template = load_exam(options.exam, options.years, **choice), load_template(options.template)
    temperature = options.temperature if options.samples > 1 else 0.0
    params = SamplingParams(n=options.samples, temperature=temperature, top_p=options.top_p, seed=options.seed)
    checkpoint = _opened(options)
    output = options.output or _results_folder(options, checkpoint, exam.name, template.name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lease(output))  # before a model is loaded for nothing
        print(
            f"asking {len(exam.questions):,} questions of {exam.name}: {' and '.join(options.conditions)}", flush=True
        )
        sampler = _sampler(options, checkpoint)
        total = len(exam.questions) * len(options.conditions)
        console = stack.enter_context(Console(f"exam {exam.name}", total, unit="question", late=True))
        show = lambda done: console.update(done, every_seconds=10)  # noqa: E731
        summaries = evaluate(
            exam, template, options.conditions, sampler, output, params, anew=options.resample, progress=show
        )
    print(format_table(summaries))
    print(f"outputs, grades and scores: {output}")
    if unanswered := sum(summary.problems.get("unanswered", 0) for summary in summaries.values()):
        raise RunError(
            f"{unanswered} answers are missing, and count as wrong: run the same command to ask for them alone"
        )


def _opened(options: argparse.Namespace) -> Any:
    """The newest checkpoint of --run, opened once; None without --run. UserError where several models are named."""
    arguments.check_which_model(options)
    if not options.run:
        return None
    from medllm_jax.checkpoint.handle import open_checkpoint

    return open_checkpoint(options.run)


def _sampler(options: argparse.Namespace, checkpoint: Any) -> Any:
    """The model that is asked, one of the three kinds; None where none is named."""
    from medllm_jax.distributed.mesh_sizes import parse_mesh_sizes
    from medllm_jax.inference import samplers

    if options.server:
        of_server = {"concurrency": options.concurrency, "chat": options.chat}
        return samplers.server_sampler(options.server, options.model, **of_server)
    of_machine = {"batch_size": options.batch_size, "chat": options.chat}
    if options.hf:
        return samplers.folder_sampler(options.hf, dtype=options.compute_dtype, **of_machine)
    if checkpoint is None:
        return None
    mesh, precision = parse_mesh_sizes(options.mesh), arguments.precision_of(options)
    return samplers.checkpoint_sampler(checkpoint, mesh=mesh, precision=precision, **of_machine)


def _results_folder(options: argparse.Namespace, checkpoint: Any, exam: str, template: str) -> Any:
    """Where results of a run stand if nothing else is said: one folder for each way of asking it."""
    from etils import epath

    if checkpoint is None:
        raise UserError("--output is missing: the folder for outputs and scores (only a run has a place for them)")
    ways = [exam, template, f"step{checkpoint.step}"]
    ways += ["chat"] * options.chat + ["stems"] * options.prepend_stems
    ways += [f"{options.samples}samples"] if options.samples > 1 else []
    return epath.Path(options.run) / "evaluation" / "-".join(ways)


def _score(options: argparse.Namespace) -> None:
    import json

    from etils import epath

    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.grading import has_official
    from medllm_jax.evaluation.predictions import read_predictions
    from medllm_jax.evaluation.score_predictions import SystemScore, as_json, comparison_text, text_of
    from medllm_jax.evaluation.significance import compare

    path, name = _scored_exam(options)
    whole = load_exam(path, name=name)
    exam = load_exam(path, options.years, name=name, text_only=options.text_only)
    if name == "igakuqa" and any(question.year is None for question in exam.questions):
        raise UserError(f"{path} holds other questions than IgakuQA's: give it as --exam {path}, without --data")
    if options.tier == "official" and not has_official(exam.questions):
        raise UserError(f"--tier official: {path} has none, only IgakuQA has; give strict or lenient")
    predictions = read_predictions(options.predictions, exam, whole, allow_missing=options.allow_missing)
    systems = [SystemScore.of(name, found, exam, options.condition) for name, found in predictions.items()]
    by_name = {system.name: system for system in systems}
    if options.against is not None and (options.against not in by_name or len(systems) < 2):
        raise UserError(f"--against {options.against}: there are predictions of {', '.join(by_name)}; two are compared")
    # Pairs of the system that the others are compared with, and one of the others.
    first = None if options.against is None else by_name[options.against]
    pairs = [(first, other) for other in systems if first is not None and other is not first]
    if options.json:
        compared = {other.name: compare(one.grades[options.tier], other.grades[options.tier]) for one, other in pairs}
        print(json.dumps(as_json(systems, compared), indent=1, ensure_ascii=False))
    else:
        print(text_of(systems, options.tier))
        for one, other in pairs:
            print("\n" + comparison_text(one, other, options.tier))
    if options.output:
        for system in systems:
            system.write(epath.Path(options.output) / system.name, exam)
        print(
            f"\nresults for `medllm report`: {', '.join(f'{options.output}/{name}' for name in by_name)}",
            file=sys.stderr,
        )


def _scored_exam(options: argparse.Namespace) -> tuple[str, str | None]:
    """Path and name of the exam; the older way to name one was --data PATH, with --exam for its kind and its name."""
    if options.data is None and options.exam is None:
        raise UserError("medllm score: the following arguments are required: --exam")
    if options.data is None:
        return options.exam, None
    if options.exam not in (None, *_KINDS):
        raise UserError(f"--exam {options.exam} and --data {options.data} name two exams: leave --data out")
    return options.data, options.exam or _KINDS[0]


def _likelihood(options: argparse.Namespace) -> None:
    import json

    from etils import epath

    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.distributed.mesh_sizes import parse_mesh_sizes
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.evaluation.grading import write_grades
    from medllm_jax.evaluation.prompts import load_template
    from medllm_jax.evaluation.samples import Samples
    from medllm_jax.inference.likelihood import likeliest_of_checkpoint, likelihood_of_checkpoint
    from medllm_jax.storage.remote import write_whole

    exam = load_exam(options.exam, options.years, text_only=options.text_only, limit=options.limit)
    template = load_template(options.template)
    checkpoint = open_checkpoint(options.run)
    placed = {
        "batch_size": options.batch_size,
        "mesh": parse_mesh_sizes(options.mesh),
        "precision": arguments.precision_of(options),
    }
    if options.after:
        samples = Samples.read(epath.Path(options.after) / "samples.jsonl")
        if samples is None:
            raise UserError(f"--after {options.after}: no samples.jsonl, which `medllm evaluate` writes, is there")
        output = epath.Path(options.output or options.after)
        output.mkdir(parents=True, exist_ok=True)
        for condition, grades in likeliest_of_checkpoint(checkpoint, exam, template, samples, **placed).items():
            write_grades(output / f"likeliest-{condition}.jsonl", grades)
            right = sum(grade.correct for grade in grades)
            print(f"the likeliest answer is right, {condition}: {right} of {len(grades)}")
        print(f"not to be compared with what a model writes; {output}")
        return
    output = epath.Path(options.output or f"{options.run}/evaluation/{exam.name}-{template.name}-step{checkpoint.step}")
    score = likelihood_of_checkpoint(checkpoint, exam, template, **placed)
    output.mkdir(parents=True, exist_ok=True)
    found = {"exam": exam.name, "template": template.name, "model": checkpoint.label, "step": checkpoint.step}
    write_whole(output / "likelihood.json", json.dumps(found | score.as_dict(), indent=2, ensure_ascii=False) + "\n")
    shares = f"{100 * score.accuracy:.1f}%; by points {100 * score.weighted_accuracy:.1f}%"
    print(f"the likeliest answer is right: {score.correct} of {score.n} ({shares}); not scored: {score.left_out}")
    print(f"not to be compared with what a model writes; {output / 'likelihood.json'}")


def _contamination(options: argparse.Namespace) -> None:
    from medllm_jax.contamination.corpora import accuracies_apart, contamination, write_contamination
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.terminal.progress import Counter

    exam = load_exam(options.exam, options.years, text_only=options.text_only)
    tokenizer = options.tokenizer and arguments.tokenizer_of(options.tokenizer)
    how = {"tokenizer": tokenizer, "n": options.n, "threshold": options.threshold}
    counter = Counter("texts", every_seconds=10)
    found = contamination(exam, options.against, **how, progress=lambda where, done: counter(done, where))
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
    from medllm_jax.evaluation.exam import load_exam
    from medllm_jax.report.collect import collect
    from medllm_jax.report.page import write_page

    runs, results = collect(options.folder)
    page = write_page(runs, results, options.output, options.example, [load_exam(path) for path in options.exam])
    print(f"{page}: {len(runs)} runs, {len(results)} exam results; pictures: {page.parent / 'figures'}")


def _add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    other = "exam that the model will be evaluated on; repeatable"
    parser.add_argument("--evaluation-exam", action="append", default=[], metavar="PATH", help=other)
    overlap = "what to do about questions that the evaluation exam asks too (default refuse)"
    parser.add_argument("--on-overlap", choices=("refuse", "drop"), default="refuse", help=overlap)

    parser.add_argument("--output", required=True, help="preference rows, .jsonl; OUTPUT.report.json stands beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there; samples stay")
    kept = "file to keep the samples in and resume from (default: beside the output)"
    parser.add_argument("--samples-file", metavar="PATH", help=kept)
    parser.add_argument(
        "--strategy",
        choices=("gold", "onpolicy", "both"),
        default="both",
        help="what a pair prefers over a wrong sample (default both)",
    )
    most = {"dest": "max_pairs_per_prompt", "type": number(PairsPerPrompt), "default": 10}
    parser.add_argument(
        "--max-pairs-per-prompt", **most, metavar="N", help="make at most N pairs of one prompt (default 10)"
    )
    parser.add_argument("--most", **most, help=argparse.SUPPRESS)  # the option's older name
    length = number(Characters)
    parser.add_argument("--min-characters", type=length, default=1, help="leave out shorter samples (default 1)")
    parser.add_argument("--max-characters", type=length, help="leave out longer samples (default: no limit)")
    failures = "reject samples without a readable answer like wrong ones (default), or drop them"
    parser.add_argument("--format-failures", choices=("reject", "drop"), default="reject", help=failures)
    shown = "put N example texts a reason into the report, never on the terminal (default 0)"
    examples = number(Annotated[int, Range(0, 100_000)])
    parser.add_argument("--show-examples", type=examples, default=0, metavar="N", help=shown)


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_which_questions(parser, required=False)
    parser.add_argument("--data", help=argparse.SUPPRESS)  # the exam's older name
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE", help="files, folders or patterns")
    tier = "rule to show details for (default strict); points are shown for all three"
    parser.add_argument("--tier", choices=("official", "strict", "lenient"), default="strict", help=tier)
    condition = "what the prompt asked for (default answer_only)"
    parser.add_argument("--condition", choices=("answer_only", "explain"), default="answer_only", help=condition)
    parser.add_argument("--against", metavar="SYSTEM", help="compare the others with this one, question by question")
    parser.add_argument("--allow-missing", action="store_true", help="count questions without a prediction as wrong")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--output", metavar="DIR", help="also write results, one folder a system, for `medllm report`")

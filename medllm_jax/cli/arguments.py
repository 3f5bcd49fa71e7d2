"""Options that several verbs have, and what some of them mean."""

import argparse
from typing import Annotated, Any

from medllm_jax.errors import UserError
from medllm_jax.ranges import BatchSize, Price, Range, Samples, Seed, SequenceLength, Share, Temperature, TopP
from medllm_jax.terminal.parser import number

_TOKENIZER = "folder with the model's tokenizer, a .model file, or a model's name on the hub (OWNER/NAME[@REVISION])"
_HF = "or a model in Hugging Face format, with transformers and torch: a folder, or a name on the hub"

Years = Annotated[int, Range(1, 9999)]


def add_store(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """required: what is not given is not to be found in a config file either."""
    default = (lambda value: value) if required else (lambda value: None)
    inputs = "files, folders or globs, local or gs://, or a dataset on the hub: hf://datasets/OWNER/NAME"
    parser.add_argument("--input", nargs="+", required=required, help=inputs)
    parser.add_argument("--tokenizer", required=required, help=_TOKENIZER)
    parser.add_argument("--output", required=required, help="store folder, local or gs://")
    length = {"type": number(SequenceLength), "default": default(4096)}
    parser.add_argument("--sequence-length", **length, help="tokens in a row (default 4096)")
    bad = "what to do about malformed rows (default error)"
    parser.add_argument("--on-bad", choices=("error", "skip"), default=default("error"), help=bad)
    pii = "personal data: stop where it is found (default), mask it, or only report it (see docs/personal-data.md)"
    parser.add_argument("--pii", choices=("fail", "mask", "report"), default=default("fail"), help=pii)
    rate = "share of documents with findings that `fail` tolerates (default 0)"
    parser.add_argument("--pii-rate", type=number(Share), default=default(0.0), help=rate)
    parser.add_argument("--pii-patterns", nargs="+", default=default([]), help="YAML files with more patterns")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing store")


def tokenizer_of(text: str) -> str:
    """The folder or file that --tokenizer names, downloaded where it is a name on the hub."""
    from medllm_jax.storage.hub import TOKENIZER, find_folder

    return find_folder(text, TOKENIZER, option="--tokenizer").folder


def add_forms(parser: argparse.ArgumentParser, example: str) -> None:
    """example: fields of a form, each with a name that it may have elsewhere."""
    columns = f"names of the fields in these rows, like {example} (docs/rpo.md has the forms that are read)"
    parser.add_argument("--columns", nargs="+", type=_column, metavar="FIELD=NAME", default=[], help=columns)
    chat = "strings are turns of a chat, written by the tokenizer's chat template (default: plain text)"
    parser.add_argument("--chat", action="store_true", help=chat)


def _column(text: str) -> tuple[str, str]:
    field, equals, name = text.partition("=")
    if not field or not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NAME, such as prompt=question")
    return field, name


def columns_of(options: argparse.Namespace) -> dict[str, str]:
    """--columns: field of a form -> its name in the rows."""
    columns = dict(options.columns)
    if len(columns) < len(options.columns):
        options.parser.error("--columns names a field twice")
    return columns


def add_which_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run folder (or converted model): its newest checkpoint is asked, with JAX")
    parser.add_argument("--hf", metavar="DIR", help=_HF)
    parser.add_argument("--server", metavar="URL", help="or an OpenAI-compatible server, like vLLM's")
    parser.add_argument("--model", metavar="NAME", help="name of the model on the server; identifies its weights")


def check_which_model(options: argparse.Namespace) -> None:
    """UserError where several models are named, or a server without its model."""
    kinds = {"--run": options.run, "--hf": options.hf, "--server": options.server}
    named = [kind for kind, value in kinds.items() if value]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are given: one model is asked at a time")
    if bool(options.server) != bool(options.model):
        raise UserError("a server's model is named by --server URL and --model NAME, both")


def add_model(parser: argparse.ArgumentParser) -> None:
    add_which_model(parser)
    parser.add_argument(
        "--chat", action="store_true", help="send prompts as chat messages, with the model's chat template"
    )
    requests = number(Annotated[int, Range(1, 1024)])
    parser.add_argument(
        "--concurrency", type=requests, default=16, help="concurrent requests to the server (default 16)"
    )
    add_batch_size(parser)
    add_machine(parser)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    prompts = "prompts completed at a time (default 8)"
    parser.add_argument("--batch-size", type=number(BatchSize), default=8, help=prompts)


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh", default="", help="device mesh like data=1,fsdp=-1,tensor=1 (default: fsdp over all devices)"
    )
    parser.add_argument(
        "--params-dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the compute dtype)"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        help="dtype of matrix products (default bfloat16, on a CPU float32)",
    )


def add_price(parser: argparse.ArgumentParser) -> None:
    rate = "price of a chip-hour, in any currency: adds the run's to the report"
    parser.add_argument("--price", type=number(Price), metavar="RATE", help=rate)


def precision_of(options: argparse.Namespace) -> Any:
    import jax

    from medllm_jax.config.schema import PrecisionConfig

    # A CPU computes bfloat16 by converting it, which is slower and no smaller.
    compute = options.compute_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return PrecisionConfig(params=options.params_dtype or compute, compute=compute)


def add_samples(parser: argparse.ArgumentParser, *, samples: int) -> None:
    several = "completions of each prompt" + ("; of several the majority's answer counts" if samples == 1 else "")
    parser.add_argument("--samples", type=number(Samples), default=samples, help=f"{several} (default {samples})")
    drawn = "of the samples" if samples > 1 else "of several; one is greedy"
    parser.add_argument("--temperature", type=number(Temperature), default=0.8, help=f"{drawn} (default 0.8)")
    parser.add_argument(
        "--top-p", type=number(TopP), default=1.0, help="nucleus sampling: probability mass to sample from (default 1)"
    )
    parser.add_argument("--seed", type=number(Seed), default=0, help="seed of the samples (default 0)")
    parser.add_argument("--resample", action="store_true", help="discard existing samples")


def add_which_questions(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    exam = "IgakuQA folder, or multiple-choice .jsonl (see docs/exams.md); local or gs://"
    parser.add_argument("--exam", required=required, metavar="PATH", help=exam)
    parser.add_argument("--years", type=number(Years), nargs="+", help="only these years of the exam")
    parser.add_argument("--text-only", action="store_true", help="only questions that need no picture")


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Of a verb that puts the questions to a model."""
    add_which_questions(parser)
    questions = number(Annotated[int, Range(1, 1_000_000_000)])
    parser.add_argument("--limit", type=questions, metavar="N", help="ask only the first N questions")
    parser.add_argument("--template", default="igakuqa", help="prompt template: name or YAML file (default igakuqa)")


def add_exam(parser: argparse.ArgumentParser) -> None:
    add_questions(parser)
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=("answer_only", "explain"),
        default=["answer_only", "explain"],
        help="conditions to ask the questions under (default both)",
    )

"""Options that several verbs have, and what some of them mean."""

import argparse
from typing import Annotated, Any

from medllm_jax.ranges import BatchSize, Range, Samples, Seed, SequenceLength, Share, Temperature, TopP
from medllm_jax.terminal.parser import number

Years = Annotated[int, Range(1, 9999)]


def add_store(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """required: what is not given is not to be found in a config file either."""
    default = (lambda value: value) if required else (lambda value: None)
    inputs = "files, folders or globs, local or gs://, or a dataset on the hub: hf://datasets/OWNER/NAME"
    parser.add_argument("--input", nargs="+", required=required, help=inputs)
    parser.add_argument("--tokenizer", required=required, help="folder with the model's tokenizer, or a .model file")
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


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run folder (or converted model): evaluate its newest checkpoint with JAX")
    parser.add_argument("--hf", metavar="DIR", help="or a model in Hugging Face format, with transformers and torch")
    parser.add_argument("--server", metavar="URL", help="or an OpenAI-compatible server, like vLLM's")
    parser.add_argument("--model", metavar="NAME", help="name of the model on the server; identifies its weights")
    parser.add_argument(
        "--chat", action="store_true", help="send prompts as chat messages, with the model's chat template"
    )
    requests = number(Annotated[int, Range(1, 1024)])
    parser.add_argument(
        "--concurrency", type=requests, default=16, help="concurrent requests to the server (default 16)"
    )
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    prompts = "prompts completed at a time (default 8)"
    parser.add_argument("--batch-size", type=number(BatchSize), default=8, help=prompts)
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


def add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exam", required=True, help="IgakuQA folder, or multiple-choice .jsonl (see docs/exams.md)")
    parser.add_argument("--years", type=number(Years), nargs="+", help="only these years of the exam")
    parser.add_argument("--text-only", action="store_true", help="only questions that need no picture")
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

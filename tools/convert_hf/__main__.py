"""Qwen2.5 checkpoints between Hugging Face's format and run folders.

Everything runs on the CPU. Exit codes: 0 done, 1 the checkpoints disagree, 2 the input is wrong.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from medllm_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the weights need the host's memory, not a device's
    try:
        return options.verb(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.convert_hf", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="{from-hf,to-hf,verify}")

    verb = verbs.add_parser(
        "from-hf",
        help="a Hugging Face checkpoint as a run folder",
        description="Converts a Hugging Face checkpoint (safetensors, one file or shards with their index) into a run "
        "folder to start training, evaluation or generation from. The weights keep their dtype. The disk of DST "
        "needs room for the model twice meanwhile.",
    )
    verb.add_argument("source", metavar="SRC", help="local folder with config.json, *.safetensors, tokenizer files")
    verb.add_argument("target", metavar="DST", help="new run folder, local or gs://")
    verb.set_defaults(verb=_from_hf)

    verb = verbs.add_parser(
        "to-hf",
        help="a checkpoint of a run folder as a Hugging Face checkpoint",
        description="Writes a checkpoint of a run folder in Hugging Face's format, with config and tokenizer. Holds "
        "one weight, stacked over all blocks, in host memory at a time.",
    )
    verb.add_argument("source", metavar="SRC", help="run folder, local or gs://")
    verb.add_argument("target", metavar="DST", help="new local folder")
    verb.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    verb.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    verb.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size of a file (default: 5GB)")
    verb.add_argument("--overwrite", action="store_true", help="replace DST if it is a Hugging Face folder")
    verb.set_defaults(verb=_to_hf)

    verb = verbs.add_parser(
        "verify",
        help="compare two checkpoints of either kind",
        description="Compares two checkpoints, each a Hugging Face folder or a run folder (its newest checkpoint): "
        "config, bytes, and predictions in float32 (through transformers too, where torch is installed). "
        "Predictions need one whole model in host memory at a time.",
    )
    verb.add_argument("first", metavar="A", help="Hugging Face folder or run folder")
    verb.add_argument("second", metavar="B", help="Hugging Face folder or run folder")
    verb.add_argument("--by", choices=("hash", "logits"), help="compare bytes or predictions only (default: both)")
    verb.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="predict on this text; repeatable")
    verb.add_argument("--random-tokens", type=int, default=64, metavar="N", help="without a prompt: so many (64)")
    verb.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a logit (default: 0.001)")
    verb.set_defaults(verb=_verify)
    return parser


def _from_hf(options: argparse.Namespace) -> int:
    from tools.convert_hf.from_hf import from_hf

    from_hf(options.source, options.target)
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    from tools.convert_hf.to_hf import to_hf

    to_hf(
        options.source,
        options.target,
        step=options.step,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from tools.convert_hf.verify import verify

    if options.random_tokens < 1:
        raise UserError(f"--random-tokens {options.random_tokens}: it must be positive")
    agreed = verify(
        options.first,
        options.second,
        by=(options.by,) if options.by else ("hash", "logits"),
        prompts=options.prompt,
        random_tokens=options.random_tokens,
        tolerance=options.tolerance,
    )
    return 0 if agreed else 1


class _Terminated(BaseException):
    """SIGTERM, as an exception that lets a conversion remove what it left unfinished."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _run() -> int:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return main()
    except (KeyboardInterrupt, _Terminated) as stop:
        print("stopped; what was unfinished is removed", file=sys.stderr, flush=True)
        # At once: threads that still write would bring back what was removed.
        os._exit(130 if isinstance(stop, KeyboardInterrupt) else 143)


if __name__ == "__main__":
    sys.exit(_run())

"""`medllm convert from-hf | to-hf | verify`: Qwen2.5 checkpoints between Hugging Face's format and run folders.

Everything runs on the CPU. Exit codes: 0 done, 1 the checkpoints disagree, 2 the input is wrong.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from medllm_jax.conversion.memory import keep_freed_memory
from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import Range
from medllm_jax.terminal.parser import group, number, verb

_SOURCE = (
    "folder with config.json, *.safetensors, tokenizer, local or gs://; or a model's name on the Hugging Face hub, "
    "OWNER/NAME or OWNER/NAME@REVISION"
)
_DTYPE = "dtype of the weights (default: as stored, but bfloat16 where a model in bfloat16 was trained in float32)"
_SIDE = "Hugging Face folder, a model's name on the hub, or run folder"
DTYPES = ("float32", "bfloat16", "float16")
_MAX_PARTS = 1024  # each part looks for all the others' notes
ADAPTER_BASES = ("float32", "bfloat16", "int8", "int4", "nf4")


def add(verbs: Any) -> None:
    """The verbs."""
    text = "convert checkpoints between Hugging Face's format and run folders, and verify that they are the same model"
    parser = group(verbs, "convert", text)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="{from-hf,to-hf,verify}")
    text = "convert a Hugging Face checkpoint, or a PEFT adapter, into a run folder"
    description = (
        "Converts a Hugging Face checkpoint (safetensors, one file or shards with their index) into a run folder "
        "to start training, evaluation or generation from, slice by slice. The weights keep their dtype. With "
        "--base, SRC is an adapter that PEFT saved, and DST a run of that adapter."
    )
    sub = verb(verbs, "from-hf", _on_the_cpu(_from_hf), text, description=description)
    sub.add_argument("source", metavar="SRC", help=_SOURCE)
    sub.add_argument("target", metavar="DST", help="new run folder, local or gs://")
    sub.add_argument("--resume", action="store_true", help="resume an interrupted conversion")
    sub.add_argument(
        "--mesh", metavar="fsdp=N,tensor=M", help="store weights in the parts that devices of such a mesh will read"
    )
    sub.add_argument("--quantize", choices=("int8", "int4", "nf4"), help="quantise the projections, for QLoRA")
    sub.add_argument("--double-quantization", action="store_true", help="quantise their scales too")
    share = f"convert one of N shares, at most {_MAX_PARTS}; N processes share DST (default: 1/1)"
    sub.add_argument("--part", default="1/1", metavar="I/N", help=share)
    sub.add_argument("--base", metavar="RUN", help="run folder of the model that an adapter of PEFT's belongs to")
    sub.add_argument("--base-storage", choices=ADAPTER_BASES, help="of --base in training (default: as it is stored)")

    _add_allow_non_finite(sub)

    text = "export a checkpoint of a run folder as a Hugging Face checkpoint, or as a PEFT adapter"
    description = (
        "Writes a checkpoint of a run folder in Hugging Face's format, with config, tokenizer, model card, notice "
        "and checksums, slice by slice. Adapters are merged into their base, unless they are exported alone."
    )
    sub = verb(verbs, "to-hf", _on_the_cpu(_to_hf), text, description=description)
    sub.add_argument("source", metavar="SRC", help="run folder, local or gs://")
    sub.add_argument("target", metavar="DST", help="new folder, local or gs://")
    step = number(Annotated[int, Range(0, 1_000_000_000)])
    sub.add_argument("--step", type=step, help="checkpoint to export (default: the newest)")
    sub.add_argument("--dtype", choices=DTYPES, help=_DTYPE)
    sub.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="size of a file (default: 5GB)")
    sub.add_argument("--adapter", action="store_true", help="the adapter alone, as PEFT's files")
    sub.add_argument("--base-name", metavar="NAME", help="what the card calls the base, such as Qwen/Qwen2.5-7B")
    sub.add_argument(
        "--evaluation", action="append", default=[], metavar="DIR", help="exam results for the card; repeatable"
    )
    sub.add_argument("--resume", action="store_true", help="resume an interrupted export")
    overwrite = "replace DST if it is a Hugging Face folder; with --push, also the weights of a repository there"
    sub.add_argument("--overwrite", action="store_true", help=overwrite)
    push = "upload the export to the Hugging Face hub; a repository that is not there is made, private"
    sub.add_argument("--push", metavar="OWNER/NAME", help=push)
    sub.add_argument("--public", action="store_true", help="with --push: make it public")
    _add_allow_non_finite(sub)

    text = "compare two checkpoints of either format"
    description = (
        "Compares two checkpoints, each a Hugging Face folder or a run folder (its newest checkpoint): "
        "config, bytes, and predictions in float32 (through transformers too, where torch is installed). "
        "Predictions need one whole model in host memory at a time."
    )
    sub = verb(verbs, "verify", _on_the_cpu(_verify), text, description=description)
    sub.add_argument("first", metavar="A", help=_SIDE)
    sub.add_argument("second", metavar="B", help=_SIDE)
    sub.add_argument("--by", choices=("hash", "logits"), help="compare bytes or predictions only (default: both)")
    sub.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="predict on this text; repeatable")
    tokens, logits = number(Annotated[int, Range(1, 100_000)]), number(Annotated[float, Range(0, 1000)])
    sub.add_argument("--random-tokens", type=tokens, default=64, metavar="N", help="without a prompt: so many (64)")
    sub.add_argument("--tolerance", type=logits, default=1e-3, help="largest difference of a logit (default: 0.001)")


def _add_allow_non_finite(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--allow-non-finite", action="store_true", help="take NaN and infinite weights as they are, instead of failing"
    )


def _on_the_cpu(convert: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A verb that leaves devices alone, and ends at once when it is told to: threads that work would be waited for."""

    def run(options: argparse.Namespace) -> int:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the weights need the host's memory, not a device's
        keep_freed_memory()
        if not options.from_terminal:
            return convert(options)
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return convert(options)
        except (KeyboardInterrupt, _Terminated) as stop:
            print("stopped", file=sys.stderr, flush=True)
            os._exit(130 if isinstance(stop, KeyboardInterrupt) else 143)

    return run


def _from_hf(options: argparse.Namespace) -> int:
    from medllm_jax.conversion.from_hf import from_hf, from_peft
    from medllm_jax.model.quantize import Storage

    part = _part(options.part)
    if options.base is not None:
        for name in ("quantize", "mesh", "resume"):
            if getattr(options, name):
                raise UserError(f"--{name} has no meaning for an adapter, which is small: leave it out")
        if part != (0, 1):
            raise UserError("--part has no meaning for an adapter, which is small: leave it out")
        from_peft(
            options.source,
            options.target,
            base=options.base,
            storage=options.base_storage,
            double_quantization=options.double_quantization,
            allow_non_finite=options.allow_non_finite,
        )
        return 0
    if options.base_storage is not None:
        raise UserError("--base-storage says how the base of an adapter is stored: give --base too")
    if options.double_quantization and not options.quantize:
        raise UserError("--double-quantization is of quantised weights: give --quantize too")
    from_hf(
        options.source,
        options.target,
        storage=Storage(options.quantize, options.double_quantization) if options.quantize else None,
        mesh=_mesh(options.mesh),
        part=part,
        resume=options.resume,
        allow_non_finite=options.allow_non_finite,
    )
    return 0


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= _MAX_PARTS:
        raise UserError(
            f"--part {quoted(text, str)}: the number of a share and how many there are, such as 1/4, are expected, "
            f"at most {_MAX_PARTS}"
        )
    return int(match[1]) - 1, int(match[2])


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    from medllm_jax.config.schema import MeshConfig
    from medllm_jax.distributed.mesh_sizes import parse_mesh_sizes

    sizes = vars(parse_mesh_sizes(text, MeshConfig(data=1, fsdp=1, tensor=1)))
    if -1 in sizes.values():
        raise UserError(f"--mesh {text}: there are no devices to resolve -1 by; give sizes such as fsdp=16,tensor=4")
    return sizes


def _to_hf(options: argparse.Namespace) -> int:
    from medllm_jax.conversion.push import check_push, push
    from medllm_jax.conversion.to_hf import to_hf

    if options.public and options.push is None:
        raise UserError("--public is of a repository on the hub: give --push OWNER/NAME too")
    if options.push is not None:
        check_push(options.push, options.target, public=options.public, overwrite=options.overwrite)
    to_hf(
        options.source,
        options.target,
        step=options.step,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        adapter=options.adapter,
        base_name=options.base_name,
        evaluations=options.evaluation,
        resume=options.resume,
        overwrite=options.overwrite,
        allow_non_finite=options.allow_non_finite,
    )
    if options.push is not None:
        push(options.target, options.push, public=options.public, overwrite=options.overwrite)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from medllm_jax.conversion.verify import verify

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
    """SIGTERM, as an exception that lets a conversion note what is done."""


def _terminate(*_: object) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """`medllm convert ARGUMENTS`; returns the exit code."""
    from medllm_jax.cli import main as medllm

    return medllm(arguments, group="convert")

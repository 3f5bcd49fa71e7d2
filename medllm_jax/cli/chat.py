"""`medllm chat`: a few turns with a model, to see what it writes."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from medllm_jax.cli import arguments
from medllm_jax.errors import UserError
from medllm_jax.ranges import NewTokens, Seed, Temperature, TopP
from medllm_jax.terminal.parser import number, verb

if TYPE_CHECKING:
    from medllm_jax.evaluation.sampling import Sample, SamplingParams

_KEYS = "Ctrl-D ends, Ctrl-C stops an answer, /new begins a new conversation"


def add(verbs: Any) -> None:
    """The verb."""
    about = "write to a model and read what it answers: a run's, one in Hugging Face format, or a server's"
    chat = verb(verbs, "chat", _chat, about, description=f"{about[0].upper()}{about[1:]}. {_KEYS}.")
    arguments.add_which_model(chat)
    arguments.add_machine(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message of every conversation")
    plain = "let the model continue each text by itself, without a chat template: what a base model can do"
    chat.add_argument("--plain", action="store_true", help=plain)
    tokens = "tokens of an answer, at most (default 512)"
    chat.add_argument("--max-new-tokens", type=number(NewTokens), default=512, metavar="N", help=tokens)
    drawn = "of the answers; 0 takes the likeliest token (default 0)"
    chat.add_argument("--temperature", type=number(Temperature), default=0.0, help=drawn)
    mass = "nucleus sampling: probability mass to sample from (default 1)"
    chat.add_argument("--top-p", type=number(TopP), default=1.0, help=mass)
    chat.add_argument("--seed", type=number(Seed), default=0, help="seed of the answers (default 0)")


def _chat(options: argparse.Namespace) -> None:
    from medllm_jax.evaluation.sampling import SamplingParams

    arguments.check_which_model(options)
    if options.system and options.plain:
        raise UserError("--system is part of a chat, and --plain is none: leave one out")
    drawn = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    params = SamplingParams(**drawn)
    name, sample, chats = _model(options)
    if not (chats or options.plain):
        raise UserError(f"{name} has no chat template: give --plain, and it continues what you write")
    print(f"{name}; for research, not for clinical use. {_KEYS}.", file=sys.stderr)
    _converse(_typed(), sample, params, plain=options.plain, system=options.system)


def _converse(
    typed: Iterable[str], sample: "Sample", params: "SamplingParams", *, plain: bool, system: str | None
) -> None:
    """Prints an answer to each text; in a chat, a text is answered after those before it."""
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    for turn, text in enumerate(typed):
        if text.strip() == "/new":
            messages = list(beginning)
            continue
        prompt = text if plain else [*messages, {"role": "user", "content": text}]
        try:
            ((answer,),) = sample([prompt], [(params.seed + turn) % 2**31], params)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
            continue
        except UserError as error:  # of this prompt: that it is too long, mostly
            hint = "; /new begins a new conversation" if messages != beginning else ""
            print(f"error: {error}{hint}", file=sys.stderr)
            continue
        print(answer.text, flush=True)
        if answer.finish_reason != "stop":
            limit = f"the limit of {params.max_new_tokens} tokens: --max-new-tokens"
            print(f"({limit if answer.finish_reason == 'length' else answer.finish_reason})", file=sys.stderr)
        if isinstance(prompt, list):
            messages = [*prompt, {"role": "assistant", "content": answer.text}]


def _typed() -> Iterator[str]:
    """What is typed, a line a turn, without those that are empty; of a pipe, its lines."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (by being imported, it lets lines be edited)
    with contextlib.suppress(EOFError):
        while True:
            if (line := input("> ")).strip():
                yield line
    print()


def _model(options: argparse.Namespace) -> "tuple[str, Sample, bool]":
    """What the model is called, its `evaluation.sampling.Sample`, and whether it can chat."""
    if options.server:
        from medllm_jax.inference.openai_client import OpenAIClient

        client = OpenAIClient(options.server, options.model, concurrency=1)
        return f"{client.model} at {client.url}", client.sample, True
    if options.hf:
        from medllm_jax.inference.samplers import folder_generator

        label, model = folder_generator(options.hf, batch_size=1, dtype=options.compute_dtype)
        return label, model.sample, model.chats
    if not options.run:
        raise UserError("no model is named: give --run, --hf, or --server with --model")
    import jax

    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.distributed.mesh_sizes import mesh_sizes, parse_mesh_sizes
    from medllm_jax.inference.generator import Generator

    checkpoint = open_checkpoint(options.run)
    mesh = parse_mesh_sizes(options.mesh)
    sizes = mesh_sizes(mesh, jax.device_count())
    generator = Generator.from_checkpoint(
        checkpoint,
        batch_size=sizes["data"] * sizes["fsdp"],  # one prompt, and as many rows as the mesh splits
        mesh=mesh,
        precision=arguments.precision_of(options),
    )
    return checkpoint.label, generator.sample, generator.chats

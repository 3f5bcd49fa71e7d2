"""`medllm completion bash | zsh | tcsh`: what a shell needs to complete verbs, options and settings."""

import argparse
from typing import Any

from medllm_jax.terminal.parser import verb

SHELLS = ("bash", "zsh", "tcsh")
_PATHS = {
    *("after", "against", "base", "checkpoint", "config", "exam", "folder", "gold", "hf", "input", "output", "path"),
    *("predictions", "results", "run", "source", "store", "target", "template", "tokenizer", "workdir"),
}


def add(verbs: Any) -> None:
    """The verb."""
    text = "print a script that completes medllm's verbs, options and settings in a shell"
    description = f'{text}. In bash: eval "$(medllm completion bash)", at the end of ~/.bashrc for every shell.'
    completion = verb(verbs, "completion", _completion, text, description=description)
    completion.add_argument("shell", choices=SHELLS, help="the shell to print it for")


def _completion(options: argparse.Namespace) -> None:
    import shtab

    from medllm_jax.cli import make_parser
    from medllm_jax.config.schema import RunConfig
    from medllm_jax.config.schema_reader import documented_fields

    parser = make_parser()
    for each in _parsers(parser):
        if each.get_default("takes_settings") == "options":
            for key, _, _ in documented_fields(RunConfig):
                each.add_argument(f"--{key}", metavar="VALUE")
        for action in each._actions:
            if action.dest in _PATHS and not action.choices:
                action.complete = shtab.FILE  # pyrefly: ignore[missing-attribute]
    print(shtab.complete(parser, options.shell))


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and all that its verbs have."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = {id(sub): sub for action in groups for sub in action.choices.values()}
    return [parser, *(each for sub in inner.values() for each in _parsers(sub))]

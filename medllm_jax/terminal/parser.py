"""argparse as `medllm` uses it."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from medllm_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the likely option where one is unknown."""

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def unknown(self, arguments: Sequence[str]) -> None:
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(arguments[0].partition("=")[0], options, n=1)
        hint = f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
        raise UserError(f"{self.prog}: unknown argument {arguments[0]}{hint}")


def verb(
    parent: Any,
    name: str,
    function: Callable[[argparse.Namespace], int | None],
    text: str,
    *,
    settings: Literal["", "options", "after --"] = "",
    description: str | None = None,
    **more: Any,
) -> Parser:
    """Adds a subcommand, which calls a function with its options.

    settings: where settings of a config may stand: nowhere, among the options, or after a ``--``.
    """
    sub = parent.add_parser(name, help=text, description=description or text, allow_abbrev=False, **more)
    sub.set_defaults(verb=function, parser=sub, takes_settings=settings)
    return sub


def group(parent: Any, name: str, text: str) -> Parser:
    """Adds a subcommand that has verbs of its own."""
    return parent.add_parser(name, help=text, description=text, allow_abbrev=False)


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb, and as `settings` the overrides of its config; UserError where they are wrong."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:end])
    after = list(arguments[end + 1 :])
    if unknown and options.takes_settings != "options":
        options.parser.unknown(unknown)
    if after and not options.takes_settings:
        options.parser.unknown(after)
    options.settings = [*unknown, *after]
    return options

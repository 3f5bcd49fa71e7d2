"""argparse as `medllm` uses it."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import ranges_in


class number:  # noqa: N801 (used as `int` is: type=number(Seed))
    """The value of an option that is a number of a range: the same type that the setting of its name has.

    kind: like ``Annotated[int, Range(1, 100)]``.
    """

    def __init__(self, kind: Any):
        ((self.kind, self.within),) = ranges_in(kind)

    def __call__(self, text: str) -> float:
        form = r"[-+]?[0-9]{1,30}" if self.kind is int else r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
        value = self.kind(text) if re.fullmatch(form, text) else None
        if value is None or (self.within and value not in self.within):
            expected = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{quoted(text)}: {expected} is expected, {self.within}")
        return value


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the likely option where one is unknown, and whose help names ranges."""

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        action = super().add_argument(*names, **more)
        if isinstance(action.type, number) and action.help != argparse.SUPPRESS:
            action.help = f"{action.help}; {action.type.within}"
        return action

    def error(self, message: str):
        raise UserError(f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)")

    def unknown(self, arguments: Sequence[str]) -> None:
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        near = difflib.get_close_matches(arguments[0].partition("=")[0], options, n=1)
        hint = f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
        raise UserError(f"{self.prog}: unknown argument {quoted(arguments[0], str)}{hint}")


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

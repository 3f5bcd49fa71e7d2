"""argparse as `medllm` uses it."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any

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
    takes_settings: bool = False,
    **more: Any,
) -> Parser:
    """Adds a subcommand, which calls a function with its options. takes_settings: unknown options are a config's."""
    sub = parent.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
    sub.set_defaults(verb=function, parser=sub, takes_settings=takes_settings)
    return sub

"""Settings files that others wrote, such as config.json: judged by what is known, never by what is known to be bad.

A table says of each key either that it is understood, with its type and default, or at which values it changes nothing
of what is computed here. Any other key, and any other value, is an error with its name: what it asks for is not known,
and to leave it out would be to do something else than the file says.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from medllm_jax.errors import UserError, quoted

REQUIRED: Any = object()  # the default of a key that must be there

# Values at which a key changes nothing; or a rule, given the value and all of the file.
Harmless = tuple[Any, ...] | Callable[[Any, Mapping[str, Any]], bool]


def anything(value: Any, beside: Mapping[str, Any]) -> bool:
    """The rule of a key that changes nothing, whatever it says."""
    return True


class Key(NamedTuple):
    """A key that is understood. kind: `int`, `float`, `bool`, `str`, `list` or `dict`. nullable: it may be null."""

    kind: type
    default: Any = REQUIRED
    nullable: bool = False


class ForeignSettings(NamedTuple):
    """The table of one kind of file. hints: what to say of a key beyond its name and value."""

    understood: Mapping[str, Key]
    harmless: Mapping[str, Harmless]
    hints: Mapping[str, str] = {}

    def read(self, content: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Key -> value of all that is understood, with its default where it is absent.

        where: the file. UserError for a key that is missing or has another type, and for one that is not known to
        change nothing.
        """
        for key, value in content.items():
            if key not in self.understood and not self._is_harmless(key, value, content):
                raise UserError(f"{where}: {quoted(key, str)} is {quoted(value)}: {self._right(key)}")
        return {key: self._value(key, content, where) for key in self.understood}

    def _is_harmless(self, key: str, value: Any, content: Mapping[str, Any]) -> bool:
        rule = self.harmless.get(key, ())
        return value in rule if isinstance(rule, tuple) else rule(value, content)

    def _right(self, key: str) -> str:
        if key in self.hints:
            return self.hints[key]
        rule = self.harmless.get(key)
        if rule is None:
            return "this key is not known here, nor whether it changes what is computed; remove it if it does not"
        if isinstance(rule, tuple):
            return f"only {' or '.join(map(repr, rule))} can be converted"
        return "what that asks for is not done here"

    def _value(self, key: str, content: Mapping[str, Any], where: str) -> Any:
        kind, default, nullable = self.understood[key]
        if key not in content:
            if default is REQUIRED:
                raise UserError(f"{where}: {key} is missing: {_WORDS[kind]} is expected")
            return default
        value = content[key]
        if value is None and nullable:
            return None
        if not _is_a(kind, value):
            raise UserError(f"{where}: {key} is {quoted(value)}: {_WORDS[kind]} is expected")
        return kind(value)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _is_a(kind: type, value: Any) -> bool:
    """As JSON has it: true is no number, and 8.0 is a whole one."""
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            return False
        return kind is float or value == int(value)
    return isinstance(value, kind)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False

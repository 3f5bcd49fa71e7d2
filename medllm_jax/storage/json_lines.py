"""JSON lines with errors that name the file and the line."""

import dataclasses
import json
import types
from typing import Any

from etils import epath

from medllm_jax.errors import UserError

_REQUIRED = object()
_WORDS = {str: "a string", list: "a list", bool: "true or false", int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One JSON object and where it stands ("file:line")."""

    fields: dict[str, Any]
    where: str

    def get(self, key: str, expected: type | types.UnionType, default: Any = _REQUIRED) -> Any:
        """The field, which must be of the expected type; without a default it must be there.

        Raises:
          UserError: it is missing or of another type.
        """
        if key not in self.fields:
            if default is _REQUIRED:
                raise self.error(f"the field {key!r} is missing; the row has {', '.join(self.fields) or 'no fields'}")
            return default
        value = self.fields[key]
        kinds = getattr(expected, "__args__", (expected,))
        # bool is a subclass of int, and true is not a count.
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
            raise self.error(f"the field {key!r} is {_short(value)}; {words} was expected")
        return value

    def error(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")


def read_rows(file: epath.PathLike) -> list[Row]:
    """Reads all objects of a JSON lines file; blank lines are allowed.

    Raises:
      UserError: the file is not UTF-8, or a line is not a JSON object.
    """
    file = epath.Path(file)
    try:
        # Not splitlines(): it also splits at U+2028 and other characters that may stand inside a JSON string.
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: byte {e.start} is not UTF-8; save the file as UTF-8") from e
    return [parse_row(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def parse_row(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}); one JSON object a line was expected") from e
    if not isinstance(fields, dict):
        raise UserError(f"{where}: {_short(fields)} is not a JSON object; one object a line was expected")
    return Row(fields, where)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

"""JSON Lines: lines of a stream, the JSON object of each, and errors that name the file and the line.

All readers of JSON Lines use ``read_lines`` and ``parse_object``. ``read_rows`` is for files whose every line must be
an object, ``read_appended_rows`` for those that a program appends to and may leave with a torn line. What reads corpora
(``data/prepare/readers.py``) decides for each bad line whether it is an error or is skipped.
"""

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.json_files import is_deep, is_unicode
from medllm_jax.storage.remote import open_buffered

_REQUIRED = object()
_WORDS: dict[Any, str] = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}

_MOST_BYTES = 2**26  # of a line that must be an object
_MOST_APPENDED_BYTES = 2**24  # of a line that a program appends
_BLOCK = 2**20  # bytes: how much of a line that is too long is read at a time
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape for half of a pair, which most lines lack
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it


class ByteStream(Protocol):
    """A binary stream, as far as lines are read from it."""

    def readline(self, limit: int, /) -> bytes: ...


class Line(NamedTuple):
    """A line of a file: its number, from 1, and its bytes with the line end; None where it is longer than allowed."""

    number: int
    content: bytes | None


class LineError(ValueError):
    """A line that is not a JSON object.

    reason: "not UTF-8", "not valid JSON" or "not a JSON object". The message also quotes or locates the problem; the
    reason quotes nothing of the line.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_lines(
    stream: ByteStream, *, first_line: int = 1, max_stream_bytes: float = math.inf, max_line_bytes: int | None = None
) -> Iterator[Line]:
    """The lines of a binary stream from its position, blank ones too; memory holds one line.

    Lines end at ``\\n`` alone: other characters that split lines, such as U+2028, may stand inside a JSON string.

    first_line: number of the first line. max_stream_bytes: reading ends with the line that reaches so many bytes.
    max_line_bytes: longer lines (with their end) are passed over, and have None as their content.
    """
    position = 0
    number = first_line
    limit = -1 if max_line_bytes is None else max_line_bytes + 1
    while position < max_stream_bytes and (line := stream.readline(limit)):
        position += len(line)
        too_long = max_line_bytes is not None and len(line) > max_line_bytes
        rest = line
        while too_long and rest and not rest.endswith(b"\n"):
            rest = stream.readline(_BLOCK)
            position += len(rest)
        if too_long:
            yield Line(number, None)
        else:
            yield Line(number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line)
        number += 1


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; raises LineError where the line is not one."""
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8", f"byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise LineError("not valid JSON", f"not JSON ({error}); one JSON object a line was expected") from error
    if is_deep(content):
        raise LineError("not valid JSON", "it nests too deep")
    if _SURROGATE.search(line) and not is_unicode(content):
        raise LineError("not valid JSON", "half of a surrogate pair is no text; write the character whole")
    if not isinstance(content, dict):
        raise LineError("not a JSON object", f"{_short(content)} is not a JSON object; one object a line was expected")
    return content


@dataclasses.dataclass(frozen=True)
class Row:
    """One JSON object and its place ("file:line")."""

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


def iterate_rows(file: epath.PathLike) -> Iterator[Row]:
    """The objects of a JSON Lines file, local or gs://, one in memory at a time; blank lines are allowed.

    Raises:
      UserError: a line is not UTF-8, not a JSON object, or has more than 64 MiB.
    """
    with open_buffered(epath.Path(file)) as stream:
        for line in read_lines(stream, max_line_bytes=_MOST_BYTES):
            if line.content is None:
                raise UserError(f"{file}:{line.number}: the line has more than {_MOST_BYTES // 2**20} MiB")
            if not line.content.isspace():
                yield parse_row(line.content, f"{file}:{line.number}")


def read_rows(file: epath.PathLike) -> list[Row]:
    """All objects of a JSON Lines file; see ``iterate_rows``."""
    return list(iterate_rows(file))


class AppendedRows(NamedTuple):
    """What a file holds that a program appends to: its objects, and the numbers of the lines that are none.

    A last line without an end, which a killed program leaves, is neither.
    """

    rows: list[dict[str, Any]]
    damaged: list[int]


def read_appended_rows(file: epath.PathLike, is_row: Callable[[dict[str, Any]], bool] = bool) -> AppendedRows:
    """The objects of a file that a program appends to; none where there is no file.

    is_row: whether an object is what the program writes; by default one that is not empty.
    """
    found, file = AppendedRows([], []), epath.Path(file)
    if not file.exists():
        return found
    with open_buffered(file) as stream:
        for number, content in read_lines(stream, max_line_bytes=_MOST_APPENDED_BYTES):
            if content is not None and content.isspace():
                continue
            try:
                row = parse_object(content or b"")
            except LineError:
                row = None
            if row is not None and is_row(row):
                found.rows.append(row)
            elif content is None or content.endswith(b"\n"):
                found.damaged.append(number)
    return found


def parse_row(line: bytes | str, where: str) -> Row:
    """The object of one line; UserError with its place where the line is not one."""
    try:
        # A lone surrogate, which has no UTF-8, is as good as any other text that is not JSON.
        return Row(parse_object(line.encode("utf-8", "replace") if isinstance(line, str) else line), where)
    except LineError as error:
        raise UserError(f"{where}: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

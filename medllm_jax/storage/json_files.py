"""JSON files that others may have made: read whole or refused, with bounds on what is built from them."""

import json
import math
from typing import Any

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import open_stored

MAX_BYTES = 64 * 2**20  # the largest that are read this way, indexes of weights, have less than one
_MAX_DEPTH = 100


def read_json(path: epath.PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file that is there.

    Raises:
      UserError: it is no file, too large, not strict JSON (RFC 8259), or holds something else than one object.
    """
    file = epath.Path(path)
    return parse_json(read_bounded(file, max_bytes), str(path))


def read_bounded(file: epath.Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file that is there; UserError where it is a folder, or larger than allowed."""
    try:
        with open_stored(file) as stream:
            data = stream.read(max_bytes + 1)
    except IsADirectoryError:
        raise UserError(f"{file} is a folder: a file is expected") from None
    if len(data) > max_bytes:
        raise UserError(f"{file} has more than {max_bytes // 2**20} MiB: that is no file of this kind")
    return data


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """The object of a JSON text; UserError, with its place, where the text is not strict JSON or holds no object."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        content = json.loads(
            text, object_pairs_hook=_each_key_once, parse_constant=_no_constant, parse_float=_finite, strict=True
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON: byte {error.start} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: a JSON object is expected, found {_NAMES.get(type(content), 'a number')}")
    if is_deep(content):
        raise UserError(f"{where}: it nests more than {_MAX_DEPTH} deep")
    if not is_unicode(content):
        raise UserError(f"{where}: half of a surrogate pair is no text")
    return content


def is_deep(content: Any) -> bool:
    """Whether a JSON value nests deeper than sound files do, and than recursion can follow."""
    values = [content]
    for _ in range(_MAX_DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in values if isinstance(each, dict | list)]
        values = [value for each in inner for value in each]
    return bool(values)


def is_unicode(content: Any) -> bool:
    """Whether all text in a JSON value can be written as UTF-8: JSON can escape halves of surrogate pairs."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_NAMES = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number

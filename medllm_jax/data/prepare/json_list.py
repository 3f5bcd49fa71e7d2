"""A .json file as a list of objects, item by item, in bounded memory: how Alpaca's and ShareGPT's files mostly come."""

import re
from collections.abc import Iterator
from io import BufferedIOBase

from medllm_jax.data.prepare.streams import DamagedError

_BLOCK = 2**20
_MARK = re.compile(rb'\\.|["{}\[\],]', re.DOTALL)  # an escaped character is no mark
_OPEN, _CLOSE = b"{[", b"}]"


def begins_list(content: bytes) -> bool:
    """Whether the beginning of a file is that of a list, and not of objects line by line."""
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def read_items(stream: BufferedIOBase, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The items of a list: number, from 0, and bytes; None for one of more than ``max_bytes``.

    What an item is made of is left to its reader: here only brackets and strings are followed. Raises DamagedError
    where the list does not end, or something follows it.
    """
    depth, inside, number = 0, False, 0
    item, size = [], 0  # the pieces of an item, while they are few enough
    for block in _blocks(stream):
        start = 0
        for mark in _MARK.finditer(block):
            character = mark[0]
            if character == b'"':
                inside = not inside
            elif inside or character[:1] == b"\\":
                continue
            elif character in _OPEN:
                depth += 1
                start = mark.end() if depth == 1 else start
            elif character == b"," and depth != 1:
                continue
            elif character in _CLOSE and depth != 1:
                depth -= 1
            elif depth == 1:  # an item ends
                piece = block[start : mark.start()]
                whole = b"".join([*item, piece]) if size + len(piece) <= max_bytes else None
                if character == b"," or number or whole is None or whole.strip():  # an empty list has no item
                    yield number, whole
                number += 1
                item, size, start = [], 0, mark.end()
                depth -= character in _CLOSE
                if not depth:
                    _check_end(block[start:], stream)
                    return
        if depth:
            size += len(block) - start
            item = [*item, block[start:]] if size <= max_bytes else []
    raise DamagedError("has no end")


def _blocks(stream: BufferedIOBase) -> Iterator[bytes]:
    """The content in blocks, none of which ends between a backslash and what it escapes."""
    while block := stream.read(_BLOCK):
        while block.endswith(b"\\") and (more := stream.read(1)):
            block += more
        yield block


def _check_end(rest: bytes, stream: BufferedIOBase) -> None:
    while not rest.strip():
        rest = stream.read(_BLOCK)
        if not rest:
            return
    raise DamagedError("is followed by something else")

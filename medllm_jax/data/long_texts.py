"""Long texts are encoded in windows: a whole book at once takes 200 bytes of memory for each of its tokens.

Neighbouring windows overlap. Both are cut in the middle of a run of tokens that they have in common, thousands of
characters from where either ends: what is encoded on the right of such a place does not depend on what is on its left.
"""

from typing import Any

LONG = 2**17  # characters of a window; shorter texts are encoded whole
_OVERLAP = 2**13  # characters that the next one begins with
_ALIKE = 32  # tokens that both have in common where they are cut

_Token = tuple[int, int, int]  # first character, end and id


def encode_long(backend: Any, text: str) -> list[int]:
    """The ids of a text, without special tokens, as ``backend.encode`` gives them for the whole of it.

    backend: a ``tokenizers.Tokenizer``. Where windows have nothing in common, as in a word of a million letters, the
    text is encoded whole.
    """
    ids: list[int] = []
    start, window = 0, _encoded(backend, text, 0)
    while start + LONG + _OVERLAP < len(text):
        start += LONG
        following = _encoded(backend, text, start)
        cuts = _cuts(window, following, start + _OVERLAP // 2)
        if cuts is None:
            return backend.encode(text, add_special_tokens=False).ids
        ids += [token for _, _, token in window[: cuts[0]]]
        window = following[cuts[1] :]
    return ids + [token for _, _, token in window]


def _encoded(backend: Any, text: str, start: int) -> list[_Token]:
    found = backend.encode(text[start : start + LONG + _OVERLAP], add_special_tokens=False)
    return [(start + a, start + b, token) for (a, b), token in zip(found.offsets, found.ids, strict=True)]


def _cuts(before: list[_Token], after: list[_Token], middle: int) -> tuple[int, int] | None:
    """Where to end the one and to begin the other, behind a character; None where they have no run in common there."""
    places: dict[_Token, int] = {}
    for place, token in enumerate(before):
        if token[0] >= middle:
            places.setdefault(token, place)
    for place, token in enumerate(after):
        # (Of several tokens of one character, the first is looked for.)
        if token[0] < middle or (place and after[place - 1][0] == token[0]) or token not in places:
            continue
        there = places[token]
        if before[there : there + _ALIKE] == after[place : place + _ALIKE] and there + _ALIKE < len(before):
            return there + _ALIKE // 2, place + _ALIKE // 2
    return None

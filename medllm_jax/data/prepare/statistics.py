"""What a corpus is made of, in numbers that add up: over batches, tasks and processes, in any division and order."""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

SCRIPTS = ("hiragana", "katakana", "kanji", "latin", "digits", "punctuation", "white space", "other")
_HIRAGANA, _KATAKANA, _KANJI, _LATIN, _DIGITS, _PUNCTUATION, _SPACE, _OTHER = range(len(SCRIPTS))
_LETTERS = (_HIRAGANA, _KATAKANA, _KANJI, _LATIN, _OTHER)

# What a document is judged to be by its letters alone, and what that mostly means.
JUDGED = {
    "kana": "kana (Japanese)",
    "kanji": "kanji without kana (Chinese, or Japanese in key words)",
    "latin": "Latin letters (English and others)",
    "other": "other",
}
_KANA_SHARE = 0.05
_KANJI_SHARE = 0.2

# Inclusive, after the Unicode block charts. The long vowel mark counts as katakana, the iteration mark 々 as kanji.
_RANGES = {
    _HIRAGANA: ((0x3041, 0x309F), (0x1B001, 0x1B11F), (0x1B132, 0x1B132), (0x1B150, 0x1B152)),
    _KATAKANA: ((0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1B164, 0x1B167)),
    _KANJI: ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD)),
    _LATIN: (
        *((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2AF)),
        *((0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA722, 0xA7FF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    ),
}
_BY_CATEGORY = {"N": _DIGITS, "P": _PUNCTUATION, "S": _PUNCTUATION, "Z": _SPACE}

_BAR = 24  # characters
_EIGHTHS = ("", *"▏▎▍▌▋▊▉")


@functools.cache
def _script_table() -> np.ndarray:
    """Code point -> index into SCRIPTS, uint8 [0x110000]."""
    table = np.full(0x110000, _OTHER, np.uint8)
    # From U+20000 on there are only ideographs, which have their range, tags and private use.
    table[:0x20000] = [_BY_CATEGORY.get(unicodedata.category(chr(point))[0], _OTHER) for point in range(0x20000)]
    table[[*range(0x09, 0x0E), *range(0x1C, 0x20), 0x85]] = _SPACE  # line breaks and the like are control characters
    for script, ranges in _RANGES.items():
        for first, last in ranges:
            table[first : last + 1] = script
    return table


@dataclasses.dataclass
class _Additive:
    """Dataclasses of counts, and of lists and dicts of counts."""

    def merge(self, other: Self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, _added(getattr(self, field.name), getattr(other, field.name)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, which ``from_dict`` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        return cls(**content)


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: _added(one[key], other[key]) for key in one}
    if isinstance(one, list):
        return [a + b for a, b in itertools.zip_longest(one, other, fillvalue=0)]
    return one + other


@dataclasses.dataclass
class TextStatistics(_Additive):
    """Counts of texts.

    bytes: in UTF-8. scripts: characters by script (``SCRIPTS``); digits are numerals of any kind, punctuation has the
    symbols, katakana the half-width ones. lengths: place k counts documents of 2^k to 2^(k+1) - 1 characters.

    documents_by_script: judged by the letters alone (all but digits, punctuation and white space), not by language:
    "kana" where at least 5 % of them are kana, else "kanji" where at least 20 % are, else "latin" where at least half
    are, else "other".
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    scripts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(SCRIPTS, 0))
    documents_by_script: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(JUDGED, 0))
    lengths: list[int] = dataclasses.field(default_factory=list)

    def add(self, texts: Sequence[str]) -> None:
        """Counts a batch of texts. Memory: about 15 bytes a character of the batch."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        by_document = _scripts(texts, lengths)
        self.merge(
            type(self)(
                documents=len(texts),
                characters=int(lengths.sum()),
                bytes=_bytes(texts),
                scripts=dict(zip(SCRIPTS, by_document.sum(axis=0).tolist(), strict=True)),
                documents_by_script=dict(zip(JUDGED, _judged(by_document), strict=True)),
                lengths=_histogram(lengths),
            )
        )


def _scripts(texts: Sequence[str], lengths: np.ndarray) -> np.ndarray:
    """Characters of each script, int64 [n, len(SCRIPTS)]."""
    points = np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")
    found = np.repeat(np.arange(len(texts)) * len(SCRIPTS), lengths)
    found += _script_table()[points]
    return np.bincount(found, minlength=len(texts) * len(SCRIPTS)).reshape(len(texts), len(SCRIPTS))


def _judged(scripts: np.ndarray) -> list[int]:
    """Documents of each kind in JUDGED, by their characters of each script, int64 [n, len(SCRIPTS)]."""
    letters = scripts[:, _LETTERS].sum(axis=1)
    rules = (
        (letters > 0) & (scripts[:, [_HIRAGANA, _KATAKANA]].sum(axis=1) >= _KANA_SHARE * letters),
        (letters > 0) & (scripts[:, _KANJI] >= _KANJI_SHARE * letters),
        (letters > 0) & (2 * scripts[:, _LATIN] >= letters),
    )
    return np.bincount(np.select(rules, range(len(rules)), len(rules)), minlength=len(JUDGED)).tolist()


@dataclasses.dataclass
class TokenStatistics(_Additive):
    """Counts of token ids, and of their texts.

    bytes: of the texts in UTF-8. byte_pieces: tokens that are not whole characters (see ``tokenizer.byte_pieces``).
    lengths: place k counts documents of 2^k to 2^(k+1) - 1 tokens, place 0 also those of none.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    byte_pieces: int = 0
    lengths: list[int] = dataclasses.field(default_factory=list)

    def add(self, texts: Sequence[str], tokens: np.ndarray, lengths: np.ndarray, is_byte_piece: np.ndarray) -> None:
        """Counts a batch of texts and their token ids.

        tokens: integers, of one text after the other; lengths: integers [n], how many are of each; is_byte_piece: bool
        [vocabulary].
        """
        self.merge(
            type(self)(
                documents=len(texts),
                characters=sum(map(len, texts)),
                bytes=_bytes(texts),
                tokens=len(tokens),
                byte_pieces=int(np.count_nonzero(is_byte_piece[tokens])),
                lengths=_histogram(lengths),
            )
        )

    @property
    def characters_per_token(self) -> float:
        return _share(self.characters, self.tokens)

    @property
    def bytes_per_token(self) -> float:
        return _share(self.bytes, self.tokens)

    @property
    def byte_piece_share(self) -> float:
        return _share(self.byte_pieces, self.tokens)

    def percentile(self, percent: float) -> int:
        """Roughly the number of tokens that ``percent`` of the documents do not exceed; 0 without documents.

        The histogram tells the power of two; between two of them, lengths are taken to be spread evenly in the
        logarithm.
        """
        wanted = percent / 100 * self.documents
        below = 0
        for place, count in enumerate(self.lengths):
            if count and below + count >= wanted:
                return round(2 ** (place + (wanted - below) / count))
            below += count
        return 0


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _histogram(lengths: np.ndarray) -> list[int]:
    """How many lengths are from 2^k to 2^(k+1) - 1; a length of 0 counts as 1."""
    return np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1).tolist()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def format_statistics(text: TextStatistics, token: TokenStatistics) -> str:
    """One corpus as Markdown tables, of kept documents as text and as tokens."""
    totals = _table(
        ("documents", "characters", "bytes", "tokens", "characters per token", "bytes per token", "byte pieces"),
        [
            (
                *(f"{count:,}" for count in (text.documents, text.characters, text.bytes, token.tokens)),
                f"{token.characters_per_token:.2f}",
                f"{token.bytes_per_token:.2f}",
                f"{token.byte_piece_share:.2%}",
            )
        ],
    )
    kinds = {JUDGED[kind]: count for kind, count in text.documents_by_script.items()}
    percentiles = ", ".join(f"{percent} %: {token.percentile(percent):,}" for percent in (10, 50, 90, 99))
    return "\n\n".join(
        (
            totals,
            _shares("script", "characters", text.scripts),
            _shares("judged by script", "documents", kinds),
            _bars("characters", text.lengths),
            _bars("tokens", token.lengths),
            f"Tokens that this share of the documents has at most, about: {percentiles}.",
        )
    )


def _shares(title: str, counted: str, counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return _table(
        (title, counted, "share"),
        [(name, f"{count:,}", f"{_share(count, total):.1%}") for name, count in counts.items()],
    )


def _bars(counted: str, histogram: Sequence[int]) -> str:
    """Documents by length, from the first length that occurs to the last."""
    occurring = [place for place, count in enumerate(histogram) if count]
    places = range(occurring[0], occurring[-1] + 1) if occurring else ()
    rows = [
        (f"{2**place:,} to {2 ** (place + 1) - 1:,}", f"{histogram[place]:,}", _bar(histogram[place] / max(histogram)))
        for place in places
    ]
    return _table((f"{counted} a document", "documents", ""), rows)


def _bar(share: float) -> str:
    full, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * full + _EIGHTHS[eighths]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns hold numbers, except the first and those without a title."""
    rule = ["---" if place == 0 or not title else "---:" for place, title in enumerate(head)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))

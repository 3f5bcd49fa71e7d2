"""N-grams of characters, by which questions are found in other text.

Japanese has no spaces between words, so the 13 words of the usual check ("Language Models are Few-Shot Learners",
arXiv 2005.14165, appendix C) become 13 characters, about as many as six words. Text is compared in NFKC, without case,
white space and punctuation, so that another layout hides nothing.
"""

import re
import unicodedata
from collections.abc import Iterator

import numpy as np

GRAM = 13
_PIECE = 1024
_ALONE = re.compile(r"[\x00-\x7f、。\u4e00-\u9fff]")
_NO_LETTERS = re.compile(r"[\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no place of a gram is lost
_MIX = np.uint64(0xD6E8FEB86659FD93)


def plain(text: str) -> str:
    """The text that is compared: in NFKC and lower case, letters and digits alone."""
    return _NO_LETTERS.sub("", "".join(unicodedata.normalize("NFKC", piece) for piece in _pieces(text))).casefold()


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces, since a long run of combining marks takes quadratic time; cut before what joins nothing."""
    start = 0
    while start < len(text):
        end = start + _PIECE
        while end < min(len(text), start + 2 * _PIECE) and not _ALONE.match(text, end):
            end += 1
        yield text[start:end]
        start = end


def grams(text: str, n: int = GRAM) -> np.ndarray:
    """uint64 [max(0, len - n + 1)]: hashes of the n characters from each place of a plain text.

    Hashes of n characters are made from hashes of half as many, so the text is read a few times and not n times.
    """
    if len(text) < n:
        return np.zeros(0, np.uint64)
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        hashes, width = characters + np.uint64(1), 1
        done, done_width = np.zeros(0, np.uint64), 0
        while True:
            if n & width:  # the stretch that n's binary digits ask for
                if not done_width:
                    done = hashes
                else:
                    size = len(text) - done_width - width + 1
                    done = done[:size] * _BASE ** np.uint64(width) + hashes[done_width : done_width + size]
                done_width += width
            if width * 2 > n:
                break
            size = len(text) - 2 * width + 1
            hashes = hashes[:size] * _BASE ** np.uint64(width) + hashes[width : width + size]
            width *= 2
        done = done * _MIX
        return done ^ (done >> np.uint64(32))

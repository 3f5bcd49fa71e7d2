"""How much of an exam's questions stands in other text, by n-grams of characters.

Japanese has no spaces between words, so the 13 words of the usual check ("Language Models are Few-Shot Learners",
arXiv 2005.14165, appendix C) become 13 characters, about as many as six words. Text is compared in NFKC, without case,
white space and punctuation, so that another layout hides nothing.
"""

import re
import unicodedata
from collections.abc import Iterable

import numpy as np

from medllm_jax.evaluation.exam import Question

GRAM = 13
_NO_LETTERS = re.compile(r"[\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no place of a gram is lost
_MIX = np.uint64(0xD6E8FEB86659FD93)
_SIEVE_BITS = 24


def plain(text: str) -> str:
    """A text as it is compared."""
    return _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text)).casefold()


def plain_question(question: Question) -> str:
    """A question's own text and its choices', as they are compared."""
    return plain("".join((question.text, *question.choices)))


def grams(text: str, n: int = GRAM) -> np.ndarray:
    """uint64 [max(0, len - n + 1)]: hashes of the n characters from each place of a plain text.

    Built from those of half as many characters, so that a text is gone through a few times and not n times.
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


class Overlap:
    """Which n-grams of an exam's questions have been seen; memory is the exam's, whatever the text."""

    def __init__(self, questions: Iterable[Question], n: int = GRAM):
        """A question's n-grams are those of its text, and of each choice, since texts put other things between them.

        One whose parts are all shorter than n can't be found: `shares` gives it 0.
        """
        self.n = n
        parts = {question.id: (question.text, *question.choices) for question in questions}
        by_question = [
            (key, np.unique(np.concatenate([grams(plain(part), n) for part in found]))) for key, found in parts.items()
        ]
        self._known = np.unique(np.concatenate([hashes for _, hashes in by_question]))
        self._of = {key: np.searchsorted(self._known, hashes) for key, hashes in by_question}
        self._seen = np.zeros(len(self._known), bool)
        # Nearly all text is no part of the exam: a table of their first bits says so at once.
        self._sieve = np.zeros(1 << _SIEVE_BITS, bool)
        self._sieve[self._first_bits(self._known)] = True

    def add(self, text: str) -> None:
        """Takes note of a text, one document or message: nothing is found across two of them."""
        hashes = grams(plain(text), self.n)
        hashes = hashes[self._sieve[self._first_bits(hashes)]]
        places = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        self._seen[places[self._known[places] == hashes]] = True

    def shares(self) -> dict[str, float]:
        """Question id -> the share of its n-grams that were seen."""
        return {key: float(self._seen[places].mean()) if len(places) else 0.0 for key, places in self._of.items()}

    @property
    def too_short(self) -> int:
        """Questions that can't be found."""
        return sum(not len(places) for places in self._of.values())

    @staticmethod
    def _first_bits(hashes: np.ndarray) -> np.ndarray:
        return hashes >> np.uint64(64 - _SIEVE_BITS)

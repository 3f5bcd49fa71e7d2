"""Which questions of an exam stand in other text, or are asked by another exam too."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from medllm_jax.contamination.ngrams import GRAM, grams, plain
from medllm_jax.evaluation.exam import Exam, Question

_SIEVE_BITS = 24
_SIMILAR = 0.5  # share of the shorter question's n-grams that two similar questions have in common


class Overlap:
    """Which n-grams of an exam's questions have been seen; memory is the exam's, whatever the text."""

    def __init__(self, questions: Iterable[Question], n: int = GRAM):
        """A question's n-grams are those of its text and of each choice, since texts put other things between them.

        A question whose parts are all shorter than n can't be found: `shares` gives it 0.
        """
        self.n = n
        parts = {question.id: (question.text, *question.choices) for question in questions}
        by_question = [
            (key, np.unique(np.concatenate([grams(plain(part), n) for part in found]))) for key, found in parts.items()
        ]
        self._known = np.unique(np.concatenate([hashes for _, hashes in by_question]))
        self._of = {key: np.searchsorted(self._known, hashes) for key, hashes in by_question}
        self._seen = np.zeros(len(self._known), bool)
        # Nearly all text is no part of the exam: a table of the hashes' first bits rules it out quickly.
        self._sieve = np.zeros(1 << _SIEVE_BITS, bool)
        self._sieve[self._first_bits(self._known)] = True

    def add(self, text: str) -> None:
        """Marks the n-grams of a text, which is one document or message: nothing is found across two of them."""
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


def plain_question(question: Question) -> str:
    """The text of a question that is compared: its own and its choices'."""
    return plain("".join((question.text, *question.choices)))


def overlapping(exam: Exam, others: Iterable[Exam]) -> dict[str, str]:
    """Ids of the exam's questions that other exams ask too, with the reason: "same id", "same text" or "similar text".

    Two questions are similar if at least half of the n-grams of the shorter one stand in the other one too. Questions
    shorter than an n-gram are compared whole.
    """
    ids: set[str] = set()
    texts: set[str] = set()
    sizes: list[int] = []
    numbers: dict[int, list[int]] = defaultdict(list)  # n-gram -> the other exams' questions that have it
    for question in (question for other in others for question in other.questions):
        text = plain_question(question)
        ids.add(question.id)
        texts.add(text)
        found = _gram_set(text)
        for gram in found:
            numbers[gram].append(len(sizes))
        sizes.append(len(found))

    reasons = {}
    for question in exam.questions:
        text = plain_question(question)
        if question.id in ids:
            reasons[question.id] = "same id"
        elif text in texts:
            reasons[question.id] = "same text"
        else:
            found = _gram_set(text)
            shared = Counter(number for gram in found for number in numbers.get(gram, ()))
            if any(count >= _SIMILAR * min(len(found), sizes[number]) for number, count in shared.items()):
                reasons[question.id] = "similar text"
    return reasons


def _gram_set(text: str) -> set[int]:
    return set(grams(text).tolist())

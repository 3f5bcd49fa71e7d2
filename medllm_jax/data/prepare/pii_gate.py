"""The personal data gate: decides from the findings in all texts of a preparation whether it continues."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from medllm_jax.data.prepare.pii import Scanner
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.ranges import Ranged, Share

PiiMode = Literal["fail", "mask", "report"]

# A finding beside another may only be found once that is masked. Bounded, since a mask may itself match a pattern.
_MASK_ROUNDS = 3


class PiiFindings:
    """What a scan has found.

    documents: number of documents scanned; flagged: number of those with findings; by_pattern: findings of each
    pattern, and the places of the first ones.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.flagged = 0
        self.by_pattern = RejectionCounts()

    def add(self, scanner: Scanner, texts: tuple[str, ...], where: str) -> None:
        """Scans the texts of one document, or pair."""
        found = [finding for text in texts for finding in scanner.find(text)]
        self.documents += 1
        self.flagged += bool(found)
        for name, start, end in found:
            self.by_pattern.add(name, f"{where} characters {start}-{end}")

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds other findings, as ``as_dict`` gives them."""
        self.documents += other["documents"]
        self.flagged += other["flagged"]
        self.by_pattern.merge(RejectionCounts.from_dict(other["findings"]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"documents": self.documents, "flagged": self.flagged, "findings": self.by_pattern.as_dict()}


@dataclasses.dataclass(frozen=True)
class PiiGate(Ranged):
    """How a preparation treats personal data (see ``pii.py``).

    mode: "fail" stops where more than the stated rate of documents has any; "mask" replaces it; "report" counts it.
    patterns: files with more patterns. Raises UserError for a rate that is no share, and for pattern files that cannot
    be used.
    """

    mode: PiiMode = "fail"
    rate: Share = 0.0
    patterns: tuple[str, ...] = ()

    @functools.cached_property
    def scanner(self) -> Scanner:
        return Scanner.load(*self.patterns)

    def mask(self, text: str) -> str:
        """The text as it may be written."""
        if self.mode != "mask":
            return text
        for _ in range(_MASK_ROUNDS):
            found = self.scanner.find(text)
            if not found:
                break
            text = self.scanner.mask(text, found)
        return text

    def check(self, name: str, found: PiiFindings) -> None:
        """UserError, with counts and places, where a corpus has more findings than the rate allows."""
        if self.mode == "fail" and found.flagged > self.rate * found.documents:
            raise UserError(
                f"personal data in {found.flagged:,} of {found.documents:,} documents of {name} "
                f"({found.flagged / found.documents:.3%}; {self.rate:.3%} may have any): {found.by_pattern}; look at "
                "these places, then have what is found masked (--pii mask), state a higher rate (--pii-rate), or have "
                "it reported only (--pii report)"
            )

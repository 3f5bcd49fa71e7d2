"""Counts by reason: what was rejected, and anything else that is counted so, with the places of the first cases."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from medllm_jax.errors import UserError

OnBad = Literal["error", "skip"]
Reading = Literal["error", "skip", "collect"]
"""What a pass over rows does about bad ones: stop at the first, leave them out, or go on to find all (see `refuse`)."""

_MOST_REASONS, _MOST_PLACES = 10, 3  # that one line names


class Rejected(NamedTuple):
    """One row or example that is left out: its place ("file:line"), and the reason.

    too_long: it is too long for a row, and nothing else is wrong with it. hint: what would be right, where that is more
    than another row; it names fields and options, and quotes nothing. needs: options, each with the least number that
    would take it.
    """

    where: str
    reason: str
    too_long: bool = False
    hint: str = ""
    needs: tuple[tuple[str, int], ...] = ()


class RejectionCounts:
    """How many cases each reason has, and the places of the first ones, such as "file:line".

    Texts are kept only where ``max_texts`` asks for them.

    counts: reason -> number of cases, in the order in which the reasons first occurred.
    first: reason -> places of the first ``max_places`` cases.
    rows: how many rows or files of text were looked at; of_files: how many of the cases are no row, but (the rest of) a
    file. So rows + of_files - total is the number of rows that are not among the cases.
    texts: reason -> the first ``max_texts`` texts, each ``{"id": place, "text": text}``; no reason without a text.
    stopping: reasons that stop a preparation, found by a pass that collects them -> the hint of the first case.
    needs: option -> the number that would take all cases that any number would take.
    """

    def __init__(self, *, max_places: int = 10, max_texts: int = 0) -> None:
        self.max_places = max_places
        self.max_texts = max_texts
        self.rows = 0
        self.of_files = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[str]] = {}
        self.texts: dict[str, list[dict[str, str]]] = {}
        self.stopping: dict[str, str] = {}
        self.needs: dict[str, int] = {}

    def add(self, reason: str, where: str, text: str | None = None) -> None:
        """Counts one case."""
        self._add(reason, 1, [where])
        if text is not None and len(texts := self.texts.get(reason, [])) < self.max_texts:
            self.texts[reason] = [*texts, {"id": where, "text": text}]

    def merge(self, other: Self) -> None:
        """Adds the counts and places of another one; its places come after those that are here."""
        self.rows += other.rows
        self.of_files += other.of_files
        for reason, count in other.counts.items():
            self._add(reason, count, other.first[reason])
        self.stopping = other.stopping | self.stopping

    def _add(self, reason: str, count: int, places: Sequence[str]) -> None:
        self.counts[reason] += count
        first = self.first.setdefault(reason, [])
        first += places[: self.max_places - len(first)]

    @property
    def total(self) -> int:
        return self.counts.total()

    def as_dict(self, *, most_common_first: bool = False) -> dict[str, dict[str, Any]]:
        """reason -> {"count": int, "first": [place, ...]}, for JSON."""
        counts = self.counts.most_common() if most_common_first else self.counts.items()
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in counts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Mapping[str, Any]], rows: int = 0, of_files: int = 0) -> Self:
        """The counts that ``as_dict`` was called on."""
        counts = cls()
        counts.rows, counts.of_files = rows, of_files
        for reason, entry in content.items():
            counts._add(reason, entry["count"], entry["first"])
        return counts

    def check_kept(self, kept: int, what: str) -> None:
        """UserError unless every row is among those kept or among the cases: another pass has read other rows."""
        if self.rows + self.of_files != kept + self.total:
            raise UserError(
                f"{what}: {self.rows:,} rows were read, {kept:,} kept and {self.total - self.of_files:,} left out: the "
                "input changed while it was prepared; prepare it again"
            )

    def __str__(self) -> str:
        parts = (f"{count} {reason} (first at {self.first[reason][0]})" for reason, count in self.counts.items())
        return ", ".join(parts) or "nothing"


def reject(rejected: Rejected, reading: Reading, counts: RejectionCounts) -> None:
    """Counts what is rejected; raises UserError with place and reason where ``reading`` is "error"."""
    found = RejectionCounts() if reading == "error" else counts
    found.add(rejected.reason, rejected.where)
    if reading != "skip":
        found.stopping.setdefault(rejected.reason, rejected.hint)
        for option, number in rejected.needs:
            found.needs[option] = max(number, found.needs.get(option, 0))
    if reading == "error":
        refuse(found, "too long" if rejected.too_long else "bad")


def refuse(found: RejectionCounts, kind: Literal["bad", "too long"]) -> None:
    """UserError where a pass has collected what stops a preparation: how many, why, where, and what would do."""
    if message := refusal(found, kind):
        raise UserError(message)


def refusal(found: RejectionCounts, kind: Literal["bad", "too long"]) -> str:
    """What ``refuse`` says; nothing where nothing stops."""
    if not found.stopping:
        return ""
    first, *_ = reasons = list(found.stopping)
    total = sum(found.counts[reason] for reason in reasons)
    parts = [f"{found.first[first][0]}: {first}"]
    if total > 1:
        of = f" of {found.rows:,}" if found.rows > total else ""
        cases = f": {', '.join(_cases(found, reasons))}" if len(reasons) > 1 else f", first at {_places(found, first)}"
        parts.append(f"{total:,}{of} rows are {kind}{cases}")
    parts += dict.fromkeys(hint for hint in found.stopping.values() if hint)
    if kind == "too long":
        fits = " and ".join(f"{option} {number}" for option, number in found.needs.items())
        parts.append(
            f"{fits} would take {'all' if total > 1 else 'it'}, --on-long skip leaves such rows out and counts them"
        )
    else:
        correct = "correct the row" if total == 1 else "correct the rows"
        parts.append(f"{correct}, or have such rows left out and counted with --on-bad skip")
    return "; ".join(parts)


def _cases(found: RejectionCounts, reasons: Sequence[str]) -> Iterator[str]:
    for reason in reasons[:_MOST_REASONS]:
        yield f"{found.counts[reason]:,} {reason} (first at {_places(found, reason)})"
    if rest := reasons[_MOST_REASONS:]:
        yield f"{sum(found.counts[reason] for reason in rest):,} for {len(rest)} other reasons"


def _places(found: RejectionCounts, reason: str) -> str:
    return ", ".join(found.first[reason][:_MOST_PLACES])

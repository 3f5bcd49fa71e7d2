"""The scanner for personal data: finds what points at a person, by patterns that a team can read and change.

It serves a gate, not a proof: it finds what has a recognisable form (numbers, addresses, labelled fields, names with an
honorific) and nothing else. A text without findings may still identify a patient; de-identification comes before.

Patterns stand in ``pii.yaml`` beside this file and in files of the same form, a list of mappings:

* ``name``, ``label``  what reports call it, and one line for people
* ``regex``            Python ``re``; it sees one sentence at a time, that is up to a line end or ``。``
* ``mask``             what replaces a finding
* ``group``            the group that is the finding; the whole match without it, or where the group took no part
* ``except``           regexes; a finding that one of them matches as a whole is none
* ``check``            a checksum that the finding's digits must pass: ``my_number``
* ``hint``             a cheap regex; sentences without a match of it are skipped, for speed only
* ``enabled``          false turns a pattern off; an entry of an earlier pattern's name needs nothing else then
"""

import bisect
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from etils import epath

from medllm_jax.config.schema_reader import build, read_yaml_file
from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import Range, Ranged

_SHIPPED = Path(__file__).parent / "pii.yaml"
_SENTENCE_END = re.compile(r"[\n。]")
_ANYTHING = r"[^\n。]"


class Finding(NamedTuple):
    """A place where a text may hold personal data: characters [start, end), found by the pattern of that name."""

    pattern: str
    start: int
    end: int


def _my_number(digits: Sequence[int]) -> bool:
    """The check digit of an individual number (12 digits): order no. 85 of 2014 of the Ministry of Internal Affairs."""
    if len(digits) != 12:
        return False
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    remainder = sum(weight * digit for weight, digit in zip(weights, digits[:11], strict=True)) % 11
    return digits[11] == (0 if remainder <= 1 else 11 - remainder)


_CHECKS: dict[str, Callable[[Sequence[int]], bool]] = {"my_number": _my_number}


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """A pattern as its file defines it; compiled regexes travel to other processes as their source."""

    name: str
    label: str
    regex: re.Pattern[str]
    mask: str
    group: str | int
    exceptions: tuple[re.Pattern[str], ...]
    check: str | None
    hint: re.Pattern[str]

    def identity(self) -> dict[str, Any]:
        """What decides which findings there are and what a masked text becomes, for json."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "label"}
        sources = {"regex": self.regex.pattern, "hint": self.hint.pattern}
        return content | sources | {"exceptions": [item.pattern for item in self.exceptions]}

    def find(self, text: str) -> Iterator[Finding]:
        for offset, sentence in _sentences(text, self.hint):
            for match in self.regex.finditer(sentence):
                start, end = match.span(self.group)
                if start < 0:
                    start, end = match.span()
                if start < end and self._accepts(sentence[start:end]):
                    yield Finding(self.name, offset + start, offset + end)

    def _accepts(self, found: str) -> bool:
        if any(item.fullmatch(found) for item in self.exceptions):
            return False
        return self.check is None or _CHECKS[self.check](_digits(found))


def _digits(text: str) -> list[int]:
    return [unicodedata.decimal(character) for character in text if character.isdecimal()]


def _sentences(text: str, hint: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """The sentences of a text that ``hint`` occurs in, each with its offset."""
    position = 0
    while hit := hint.search(text, position):
        last_end = max(text.rfind(end, position, hit.start()) for end in "\n。")
        start = position if last_end < 0 else last_end + 1
        sentence_end = _SENTENCE_END.search(text, hit.start())
        end = sentence_end.start() if sentence_end else len(text)
        yield start, text[start:end]
        if not sentence_end:
            return
        position = end + 1


class Scanner:
    """The patterns of ``pii.yaml`` and of further files, ready for use; it can be sent to other processes.

    fingerprint: sha256 (hex) over the patterns in force: equal ones mask a text equally; names: of the patterns in
    force; labels: name -> one line for people.
    """

    def __init__(self, patterns: Iterable[_Pattern]):
        self._patterns = tuple(patterns)
        self.names = tuple(pattern.name for pattern in self._patterns)
        self.labels: Mapping[str, str] = {pattern.name: pattern.label for pattern in self._patterns}
        self._masks = {pattern.name: pattern.mask for pattern in self._patterns}
        identity = json.dumps([pattern.identity() for pattern in self._patterns], sort_keys=True)
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    @classmethod
    def load(cls, *files: str | epath.PathLike) -> Self:
        """The shipped patterns and those of YAML files; a later pattern replaces an earlier one of the same name.

        Raises UserError naming file, pattern and what is wrong with it.
        """
        patterns: dict[str, _Pattern] = {}
        for file in (_SHIPPED, *files):
            seen: set[str] = set()
            for entry, where in _entries(epath.Path(file)):
                name = entry.name
                if name in seen:
                    raise UserError(f"{where} stands twice in the file; keep one")
                seen.add(name)
                if entry.enabled:
                    patterns[name] = _pattern(entry, where)
                elif patterns.pop(name, None) is None and entry.regex is None:
                    raise UserError(f"{where} cannot be turned off, there is none; give one of {', '.join(patterns)}")
        return cls(patterns.values())

    def find(self, text: str) -> list[Finding]:
        """The findings of a text in order, without overlaps: of two that overlap the longer one, then the earlier."""
        present = [pattern for pattern in self._patterns if pattern.hint.search(text)]  # mostly none
        found = [finding for pattern in present for finding in pattern.find(text)]
        return found if len(found) < 2 else _without_overlaps(found)

    def mask(self, text: str, findings: Sequence[Finding]) -> str:
        """The text with each of its findings (as ``find`` returned them) replaced by its pattern's mask."""
        parts, position = [], 0
        for finding in findings:
            parts += text[position : finding.start], self._masks[finding.pattern]
            position = finding.end
        return "".join([*parts, text[position:]])


def _without_overlaps(findings: list[Finding]) -> list[Finding]:
    kept: list[tuple[int, int, str]] = []
    for name, start, end in sorted(findings, key=lambda finding: (finding.start - finding.end, finding.start)):
        place = bisect.bisect_left(kept, (start,))
        before_ends = place == 0 or kept[place - 1][1] <= start
        if before_ends and (place == len(kept) or end <= kept[place][0]):
            kept.insert(place, (start, end, name))
    return [Finding(name, start, end) for start, end, name in kept]


# --- reading pattern files -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry(Ranged):
    """An entry of a pattern file; the module's docstring tells its keys."""

    name: str
    label: str | None = None
    regex: str | None = None
    mask: str | None = None
    group: str | Annotated[int, Range(0, 999)] = 0
    exceptions: tuple[str, ...] = dataclasses.field(default=(), metadata={"alias": "except"})
    check: str | None = None
    hint: str | None = None
    enabled: bool = True


def _entries(file: epath.Path) -> Iterator[tuple[_Entry, str]]:
    """The entries of a pattern file, each with its place for errors."""
    if not file.is_file():
        raise UserError(f"no pattern file at {file}; give a YAML file with a list of patterns")
    content = read_yaml_file(file)
    if not isinstance(content, list):
        raise UserError(f"{file}: a list of patterns is expected, each a mapping with name, label, regex and mask")
    for position, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{file}: pattern {position} is not a mapping; give name, label, regex and mask")
        name = entry.get("name")
        where = f"{file}: pattern {quoted(name) if name and isinstance(name, str) else position}"
        built = build(_Entry, entry, where)
        _required(built.name, "name", where)
        yield built, where


def _pattern(entry: _Entry, where: str) -> _Pattern:
    regex = _compiled(_required(entry.regex, "regex", where), f"{where}: regex")
    if entry.group not in (*range(regex.groups + 1), *regex.groupindex):
        raise UserError(f"{where}: group {quoted(entry.group)} is none of the regex's groups")
    if entry.check is not None and entry.check not in _CHECKS:
        raise UserError(f"{where}: there is no check {quoted(entry.check)}; there is {', '.join(_CHECKS)}")
    return _Pattern(
        name=entry.name,
        label=_required(entry.label, "label", where),
        regex=regex,
        mask=_required(entry.mask, "mask", where),
        group=entry.group,
        exceptions=tuple(_compiled(item, f"{where}: except {quoted(item)}") for item in entry.exceptions),
        check=entry.check,
        hint=_compiled(_ANYTHING if entry.hint is None else entry.hint, f"{where}: hint"),
    )


def _required(text: str | None, key: str, where: str) -> str:
    if not text:
        raise UserError(f"{where}: {key} is {'missing' if text is None else 'empty'}; give a text")
    return text


def _compiled(source: str, where: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(source)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where} is not a regular expression of Python: {quoted(error, str, most=120)}") from error
    if compiled.match(""):
        raise UserError(f"{where} matches the empty text, so it would be everywhere; let it need a character")
    return compiled

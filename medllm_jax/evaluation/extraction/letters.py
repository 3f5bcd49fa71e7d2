"""Reading letters where an answer stands: `a,c`, `c: 糖尿病`, one labelled line after another, or a choice's words.

All text here is normalised (normalize.normalize). Every parser starts at a given position and never searches, so prose
yields nothing.
"""

import dataclasses
import re
from functools import lru_cache

from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.normalize import bare, skip

QUOTES = " \t\n[](){}「」『』【】<>〈〉《》\"'“”‘’_"
_HEDGE = r"または|又は|もしくは|あるいは|\bor\b|か"
_SEPARATOR = rf"[,、・/;&+と]|及び|および|and\b|{_HEDGE}"
# What may follow an answer. Letters begin words, too: b型肝炎, c反応性蛋白, a patient.
_AFTER = (
    r"[ \t]*(?:$|\n|[。.、,:;!?()\[\]{}「」『』【】<>〈〉《》\"'“”‘’→=]|です|である"
    r"|だ(?:と|が|けど|から|ろう|。|、|\n|$)|の(?:[1-9一二三四五](?:つ|個|種|者|点|択)|両方|両者|組み?合わ?せ)"
    r"|でしょう|で[、,しき]|と(?:考|思|な|判|い)|にな|だけ|のみ|解説|理由|説明|根拠|なぜ|because\b|explanation\b"
    r"|が(?:最|もっとも|正|適|該当)(?![^。\n]{0,16}(?:な[いく]|ません|言え|限|れば|ですか|だとす|思|候補|誤))"
)
_AFTER_START = re.compile(_AFTER + ")")
_AFTER_CUE = re.compile(_AFTER + r"|が|を(?!除))")
_OPENING = re.compile(r"[ \t\"'“”‘’「『(\[]*")
_CALLED = re.compile(r"[ \t\"'“”‘’「『(\[]*(?:(?:選択肢の?|(?:choice|option)\b)[ \t\"'“”‘’「『(\[]*)?")
_NOT_BUT = re.compile(r"(?:では|じゃ)(?:なくて?[、, ]{0,2}|(?P<stop>(?:ありません|ないです|ない)[。\n]\s{0,2}))")
# What may follow an answer in the sentence after a denial: another's discussion goes on otherwise (b: ..., bは...).
_AFTER_DENIED = re.compile(r"[ \t]*(?:$|\n|。|です|である|だ(?:と|。|\n|$)|でしょう|が(?:最|もっとも|正|適|該当))")
# Numbers of choices that are numbered by nobody but the model: 3, 1と3, 3番です.
_DIGITS = re.compile(r"[1-9](?:番目?)?(?:\s?(?:[,、・/&と]|及び|および|and\b)\s?[1-9](?:番目?)?){0,8}(?![0-9])")
_AFTER_DIGITS = re.compile(
    r"[\"'“”‘’」』)\]】]{0,2}[ \t]*(?:$|\n|[。、,!」』】]|です|である|だ(?:と|が|。|\n|$)|と(?:考|思|な|判)"
    r"|の[1-9]つ|が(?:最|もっとも|正|適|該当|答|解|回))"
)
_CROSSED_OUT = re.compile(
    r"[ \t]{0,4}\(?(?:←|<-|->|→)?[ \t]?(?:×|✗|✕|誤り|不正解|不適)"
)  # a line of a list that goes through all
# What may stand before an answer that its cue follows.
_BEGINS = frozenset("。、,「『(【[\"' \n\t:→はりてばくでめら")
_UP_TO_CUE = re.compile(r"(?:の[1-9]つ)?[\"'“”‘’」』)\]]*")
_LONGEST_BEFORE = 60
_MAX_DENIED = 8  # answers before the one that stands instead of them
_CLOSING = re.compile(r"[\"'“”‘’」』)\]]*")
_LABEL = r"[-・]?\s?(?:\((?P<in>{span})\)\s?|(?P<out>{span})(?:\s?[:.)]\s?|の|[ \t]?))"
_NUMBERED = re.compile(r"([1-9])\s?[.:)]\s?")
_DOT = re.compile(r"\s?[.:)]\s?")
_SPACE = re.compile(r"\s*")
_DOTTED_WORD = re.compile(r"\.\s?([a-z]{2,})")
_BETWEEN_WORDS = re.compile(r"[ \t]*(?:[,、・/;&+と。]|及び|および|and\b)?[ \t]*")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Letters read at a position: `end` is where they end, `rule` how they were read. `conflict` says that the
    output offers alternatives, or a letter beside the words of another choice."""

    letters: frozenset[str]
    end: int
    rule: str
    conflict: bool = False


class LetterReader:
    """The parsers for one question's choices."""

    def __init__(self, choices: tuple[str, ...], letters: tuple[str, ...], k: int):
        self.letters, self.k = letters, k
        self._patterns = _patterns(letters[-1])
        texts = [bare(choice) for choice in choices]
        # Blank and repeated choices cannot be told apart by their words. Longest first, lest 胃 win over 胃癌.
        distinct = [(t, letter) for t, letter in zip(texts, letters, strict=True) if t and texts.count(t) == 1]
        self._words = sorted(distinct, key=lambda pair: -len(pair[0]))
        self._digit_labelled = any(t[0].isdigit() for t in texts if t)

    @staticmethod
    def of(question: Question) -> "LetterReader":
        return _reader(question.choices, question.letters, question.k)

    def whole(self, text: str) -> Reading | None:
        """The answer of a text that is nothing but an answer."""
        patterns, text = self._patterns, text.strip()
        if len(text) > 2_000:
            return None
        core = text.lstrip(QUOTES).rstrip(f"。.、,!{QUOTES}")
        if patterns.whole.fullmatch(core):
            return Reading(patterns.letters_of(core), len(text), "letters", bool(re.search(_HEDGE, core)))
        if patterns.joined.fullmatch(core) and len(set(core)) == len(core):
            return Reading(frozenset(core), len(text), "letters")
        words = self._choice_words(text, 0, across_lines=True)
        if words and text[words.end :].strip(f"。.、,!{QUOTES}") in ("", "です", "である"):
            return words
        if not self._digit_labelled and re.fullmatch(r"[1-9](?:\s?[,、・ ]\s?[1-9]){0,8}", core):
            numbers = {int(digit) for digit in re.findall(r"\d", core)}
            if max(numbers) <= len(self.letters):
                return Reading(frozenset(self.letters[n - 1] for n in numbers), len(text), "digits")
        return None

    def at(self, text: str, start: int, *, after_cue: bool) -> Reading | None:
        """The answer that begins at a position, whatever follows it."""
        start, after = self._past_denied(text, start, _AFTER_CUE if after_cue else _AFTER_START)
        if after is not _AFTER_DENIED and (lines := self._labelled_lines(text, start)):
            return lines
        words = self._choice_words(text, start, across_lines=False)
        # A choice's words end at white space, which after a letter may go on with anything (a patient).
        if words and not text[words.end : words.end + 1].isspace() and not after.match(text, words.end):
            words = None
        plain = self._plain(text, start, after)
        if not plain and not words:
            return self._numbers(text, start, after_cue)
        plain, words = (None if r and _CROSSED_OUT.match(text, r.end) else r for r in (plain, words))
        # Where a choice is itself a letter, or begins with one (c 型肝炎), the longer reading is the meant one.
        return max((r for r in (plain, words) if r), key=lambda r: r.end, default=None)

    def mentioned(self, text: str) -> frozenset[str]:
        """Every letter that stands by itself anywhere in a text: prose included, so only for the lenient tier."""
        return frozenset(self._patterns.mention.findall(text))

    def before(self, text: str, start: int, end: int) -> tuple[int, Reading | None]:
        """The answer that ends at `end`, and where it begins: the longest in its sentence."""
        start = max(start, end - _LONGEST_BEFORE, text.rfind("。", start, end) + 1, text.rfind("\n", start, end) + 1)
        for begin in range(start, end):
            if begin and text[begin - 1] not in _BEGINS:
                continue
            reading = self.at(text, begin, after_cue=True)
            if reading and skip(_UP_TO_CUE, text, reading.end) == end:
                return begin, reading
        return end, None

    def marks_a_choice(self, text: str, cue: re.Match) -> bool:
        """Whether a cue ends the line of a choice, and so says of that one that it is right: a 甲 ← 正解."""
        line = text.rfind("\n", 0, cue.start()) + 1
        ends_line = text[cue.end("word") :].lstrip(" \t)]】」』")[:1] in ("", "\n")
        return ends_line and bool(self._patterns.label.match(text, line)) and line < cue.start()

    def _numbers(self, text: str, start: int, after_cue: bool) -> Reading | None:
        """The choices by their numbers; without a cue before them they must say that they are numbers (3番)."""
        match = None if self._digit_labelled else _DIGITS.match(text, start)
        if not match or not (after_cue or "番" in match[0]):
            return None
        numbers = {int(digit) for digit in re.findall(r"\d", match[0])}
        if max(numbers) > len(self.letters):
            return None
        letters, end = frozenset(self.letters[n - 1] for n in numbers), match.end()
        dotted = _DOT.match(text, end)
        if dotted and (named := self._choice_at(text, dotted.end())):
            return Reading(letters, named[1], "digits", conflict=letters != {named[0]})
        return Reading(letters, end, "digits") if _AFTER_DIGITS.match(text, end) else None

    def _past_denied(self, text: str, start: int, after: re.Pattern) -> tuple[int, re.Pattern]:
        """Where the answer begins that stands instead of others, and what may follow it: aではなくb, aでもbでもなくc,
        胃癌ではなく胃, aではない。bです。"""
        start = skip(_CALLED, text, start)
        for _ in range(_MAX_DENIED):
            denied = self._patterns.neither.match(text, start)
            if not denied:
                plain, words = (
                    self._patterns.list.match(text, start),
                    self._choice_words(text, start, across_lines=False),
                )
                ends = [*([plain.end()] if plain else []), *([words.end] if words else [])]
                denied = next(filter(None, (_NOT_BUT.match(text, end) for end in ends)), None)
            if not denied:
                break
            if denied.re is _NOT_BUT and denied["stop"]:
                after = _AFTER_DENIED
            start = skip(_CALLED, text, denied.end())
        return start, after

    def _plain(self, text: str, start: int, after: re.Pattern) -> Reading | None:
        patterns = self._patterns
        joined = patterns.joined.match(text, start)
        if joined and len(joined[0]) == self.k == len(set(joined[0])):
            if after.match(text, joined.end()):
                return Reading(frozenset(joined[0]), joined.end(), "letters")
            return None
        match = patterns.list.match(text, start)
        if not match:
            return None
        letters, end = patterns.letters_of(match[0]), match.end()
        if len(letters) < self.k and (lines := patterns.spread.match(text, start)):  # one a line
            found = patterns.letters_of(lines[0])
            if len(found) == self.k and after.match(text, lines.end()):
                letters, end = found, lines.end()
        if not after.match(text, end):
            # 答えはbの糖尿病です
            named = self._choice_at(text, skip(_OPENING, text, end + 1)) if text[end : end + 1] == "の" else None
            if not named or named[0] not in letters:
                return None
        # e. coli is no choice e, unless it is that choice's own first word.
        word = _DOTTED_WORD.match(text, end)
        if word and not any(t.startswith(word[1]) for t, _ in self._words):
            return None
        return Reading(letters, end, "letters", bool(re.search(_HEDGE, match[0])))

    def _labelled_lines(self, text: str, start: int) -> Reading | None:
        """Two or more lines `c: ...`; a single one is read as plain letters or as words."""
        found: list[str] = []
        end = start
        while len(found) <= len(self.letters) and (match := self._patterns.line.match(text, end)):
            letter = match["in"] or match["out"]
            line_end = text.find("\n", match.end())
            line_end = line_end + 1 if line_end >= 0 else len(text)
            said = self._choice_at(text, match.end())
            if said and said[0] != letter and not text[said[1] : line_end].strip("。. \n"):
                return Reading(frozenset((letter, said[0])), line_end, "labelled", conflict=True)
            found.append(letter)
            end = line_end
        return Reading(frozenset(found), end, "labelled") if len(found) > 1 else None

    def _choice_words(self, text: str, start: int, *, across_lines: bool) -> Reading | None:
        """Whole choices by their words, each perhaps after its letter, one after another."""
        found: list[str] = []
        labels, conflict, end, position = 0, False, start, start
        while len(found) <= len(self.letters):
            position = skip(_OPENING, text, position)
            number = None if self._digit_labelled else _NUMBERED.match(text, position)
            said = self._choice_at(text, number.end()) if number else None
            counts = (self.letters.index(said[0]) + 1, len(found) + 1 if self.k > 1 else 0) if said else ()
            if number and int(number[1]) in counts:  # the number of the choice, or of a line
                position = number.end()
            said, label = self._choice_at(text, position), None
            if not said and (label := self._patterns.label.match(text, position)):
                said = self._choice_at(text, skip(_OPENING, text, label.end()))
            if not said or said[0] in found:
                break
            if label:
                labels += 1
                conflict |= (label["in"] or label["out"]) != said[0]
            found.append(said[0])
            end = said[1]
            if behind := self._patterns.label_behind.match(text, end):  # 胃癌(c)
                end, conflict = behind.end(), conflict or behind[1] != said[0]
            end = skip(_CLOSING, text, end)
            position = skip(_BETWEEN_WORDS, text, end)
            if "。" in text[end:position] and len(found) >= self.k:
                break
            # A new line goes on with the answer only while choices are missing: what follows may be a new question.
            if (across_lines or len(found) < self.k) and (line := _SPACE.match(text, position)):
                position = line.end()
        return Reading(frozenset(found), end, "labelled" if labels else "words", conflict) if found else None

    def _choice_at(self, text: str, position: int) -> tuple[str, int] | None:
        """The longest choice whose words stand at a position: its letter, and where it ends."""
        for words, letter in self._words:
            if (end := _same_words(text, position, words)) is not None:
                return letter, end
        return None


def _same_words(text: str, position: int, words: str) -> int | None:
    """Where `words` end if they stand at the position with any white space among them, else None."""
    gap = 0
    for char in words:
        while position < len(text) and text[position].isspace() and gap < 8:
            position, gap = position + 1, gap + 1
        if position >= len(text) or text[position] != char:
            return None
        position, gap = position + 1, 0
    return position


@dataclasses.dataclass(frozen=True)
class _Patterns:
    list: re.Pattern
    spread: re.Pattern
    whole: re.Pattern
    neither: re.Pattern
    joined: re.Pattern
    label: re.Pattern
    label_behind: re.Pattern
    line: re.Pattern
    mention: re.Pattern
    letter: re.Pattern

    def letters_of(self, text: str) -> frozenset[str]:
        return frozenset(self.letter.findall(text))


@lru_cache(maxsize=32)
def _patterns(last: str) -> _Patterns:
    span = f"[a-{last}]"
    # Possessive throughout: a gap that could be split in two ways would cost exponential time.
    called = r"(?:選択肢の?|choice[ \t]|option[ \t])?+"
    one = rf"{called}[\"'“”‘’「『(\[{{]{{0,2}}+{span}(?![a-z0-9])[)\"'“”‘’」』\]}}]{{0,2}}+"
    gap = rf"(?>[ \t]{{0,4}}+(?:{_SEPARATOR})[ \t]{{0,4}}+|[ \t]{{0,8}}+)"
    any_gap = gap.replace(r"[ \t]", r"\s")
    label = _LABEL.format(span=span)
    return _Patterns(
        list=re.compile(rf"{one}(?:{gap}{one}){{0,25}}+"),
        spread=re.compile(rf"{one}(?:{any_gap}{one}){{0,25}}+"),
        whole=re.compile(rf"{one}(?:{any_gap}{one}){{0,25}}+(?:です|である|だ)?"),
        neither=re.compile(rf"(?:{one}でも[、, ]{{0,2}}){{1,6}}なくて?[、, ]{{0,2}}"),
        joined=re.compile(rf"{span}{{2,26}}(?![a-z0-9])"),
        label=re.compile(label),
        label_behind=re.compile(rf"[ \t]?\(({span})\)"),
        line=re.compile(rf"[-・]?\s?(?:\((?P<in>{span})\)|(?P<out>{span})\s?[:.)])[ \t]*(?=[^\s])"),
        mention=re.compile(
            rf"(?<![a-z0-9.(\-]){span}(?![a-z0-9\-]|型|群|波|細胞|反応|因子|\.\s?[a-z]|[ \t][a-z]{{2,}})"
        ),
        letter=re.compile(rf"(?<![a-z]){span}(?![a-z])"),
    )


@lru_cache(maxsize=4096)
def _reader(choices: tuple[str, ...], letters: tuple[str, ...], k: int) -> LetterReader:
    return LetterReader(choices, letters, k)

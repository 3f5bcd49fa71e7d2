"""From a model's raw output to the part of it that can hold its answer, in one spelling."""

import dataclasses
import re
import unicodedata
from itertools import islice

# Answers stand at the start or at the end; what lies between the two is not looked at.
HEAD, TAIL = 4_000, 6_000
_FAR = 200_000  # from either end: no think block begins or ends farther in
_CHUNK = 256
_LONGEST_SPELLING = 4  # of one character, that NFKC makes longer: ㌘ is three, but ﷺ would be eighteen

_OPEN_THINK, _CLOSE_THINK = ("<think>", "<thinking>"), ("</think>", "</thinking>")
# The end of the model's own turn: what follows is another turn.
_END_OF_TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|im_start|end|user|return)\|>|</s>")
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:pad|bos|eos|unk)>|\[/?inst\]")
_LEADING = re.compile(r"(?:\s|<\|[^|<>\s]{1,40}\|>|</?s>)*(?:assistant[\s:]{1,3})?")
_NEXT_TURN = re.compile(
    r"\n\s{0,4}(?:#{1,4}\s?)?[【\[]?(?:(?:ユーザー?|user|human|system)\s?(?::|\n)|医師国家試験を解きます)"
)
# It begins a question of the model's own, or its answer, which may say again what was asked.
_HEADING = re.compile(
    r"\n\s{0,4}(?:#{1,4}\s?)?[【\[]?(?:次の|新しい|例題)?(?:"
    r"(?:問題文?|設問|質問|例題|question|problem)\s?\d{0,4}\s?(?:[】\]:.]|\n|$)|(?:問|q)\s?\d{1,4}\s?(?:[】\]:.]|\n))"
)
_BOXED = re.compile(r"\\boxed\{\s?(?:\\text\{)?([^{}\n]{0,200})\}{1,2}")
# Marks of emphasis, and characters that print nothing or are the rest of a token cut in two.
_MARKUP = re.compile(r"[*`$]|[\u200b-\u200f\u2060\ufeff\u00ad\ufffd\ud800-\udfff]|^\s{0,3}#{1,6}\s|^\s{0,3}>\s?", re.M)
_CIRCLED = {ord("①") + i: chr(0xE001 + i) for i in range(9)}


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """`text` is NFKC and lower case, without markup; `cut` says a further turn was cut off, `unclosed` that the
    output ends inside a think block. `longer` goes on to the second of the headings that begin a question (to the end
    where there is one), `text` to the first; `longer_cut` is `cut` of that."""

    text: str
    cut: bool
    unclosed: bool
    longer: str
    longer_cut: bool


def clean(raw: str, *, keep_circled: bool = False) -> Cleaned:
    """The model's own answer turn. `keep_circled` keeps ①-⑨ apart from 1-9, as U+E001-U+E009."""
    raw = _ends(raw, _FAR, _FAR)
    # Found without a regular expression, which takes too long; most outputs have no such block.
    thinks = "think" in raw
    closed = max((raw.rfind(tag) + len(tag) for tag in _CLOSE_THINK if thinks and tag in raw), default=0)
    raw = raw[closed:]
    opened = [at for tag in _OPEN_THINK if thinks and (at := raw.find(tag)) >= 0]
    unclosed = bool(opened)
    raw = raw[: min(opened, default=len(raw))]
    raw = _ends(raw)
    text = _ends(normalize(raw.translate(_CIRCLED) if keep_circled else raw))
    text = text[skip(_LEADING, text) :]
    end = _END_OF_TURN.search(text)
    turn = _NEXT_TURN.search(text, 0, end.start() if end else len(text))
    cuts = [m.start() for m in (end, turn) if m]
    stop = min(cuts, default=len(text))
    first, second, *_ = [*(m.start() for m in islice(_HEADING.finditer(text, 0, stop), 2)), stop, stop]
    return Cleaned(
        _plain(text[:first]), bool(cuts) or first < stop, unclosed, _plain(text[:second]), bool(cuts) or second < stop
    )


def _plain(text: str) -> str:
    """Without special tokens and marks of emphasis."""
    return _MARKUP.sub("", _BOXED.sub(r"\n答え: \1\n", _SPECIAL.sub(" ", text))).strip()


def normalize(text: str) -> str:
    """NFKC and lower case, with the many kinds of line end, dash and wave as one."""
    # Character by character, and NFC of that: the same, and far faster where much changes, since few of them differ.
    spelled = {ord(c): n for c in set(text) if c != (n := unicodedata.normalize("NFKC", c))}
    text = text.translate({c: n for c, n in spelled.items() if len(n) <= _LONGEST_SPELLING})
    # In pieces, since reordering a long run of combining marks takes quadratic time.
    pieces = (text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK))
    text = "".join(unicodedata.normalize("NFC", p) for p in pieces).lower()
    return re.sub(r"\r\n?|[\u2028\u2029\u0085\v\f]", "\n", text).translate(_ONE_SPELLING)


def skip(pattern: re.Pattern[str], text: str, start: int = 0) -> int:
    """The position after what a pattern matches at `start`; `start` itself where it matches nothing."""
    match = pattern.match(text, start)
    return match.end() if match else start


def bare(text: str) -> str:
    """The normalised text without white space and closing punctuation: how choice texts are compared."""
    return re.sub(r"\s+", "", _MARKUP.sub("", normalize(text))).strip("。.、,")


_ONE_SPELLING = {ord(c): "~" for c in "〜～∼"} | {ord(c): "-" for c in "‐‑–—−―"} | {ord("．"): ".", ord("｡"): "。"}


def _ends(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    return text if len(text) <= head + tail else f"{text[:head]}\n\n{text[-tail:]}"

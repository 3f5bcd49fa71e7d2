"""Normalising Japanese medical text: line ends, invisible characters, and optionally a Unicode form.

Unicode's own forms go too far here in two places. NFC replaces CJK compatibility ideographs, with which people write
their names (U+FA19 becomes 神, U+795E). NFKC moreover writes 10⁶ as 106, 1½ as 11⁄2 and 3① as 31. Such characters stay
as they are in every form, and so does Japanese punctuation (see ``normalise``).
"""

import functools
import re
import unicodedata
from typing import Literal

Form = Literal["none", "nfc", "nfkc"]

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# The ends of the higher planes are noncharacters too, and nothing else above U+1FFFD is text but ideographs and tags.
_PLANE_ENDS = "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
_INVISIBLE = re.compile(
    # C0, DEL and C1; soft hyphen; zero width space; marks of direction; byte order mark; noncharacters. Joiners
    # (U+200C, U+200D) and variation selectors are part of what is written.
    f"[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufeff{_PLANE_ENDS}]+"
)
# What either of them matches, and a little more where that is quicker to look for: one range for all higher planes.
_UNCLEAN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufdd0-\ufdef\ufeff\ufffe\uffff"
    "\U0001fffe-\U0010ffff]"
)
_SPACE_AT_LINE_END = re.compile(r"[^\S\n]\n")
_BLANK_LINES = re.compile(r"\n{3,}")

_COMPATIBILITY_IDEOGRAPH = re.compile("([\uf900-\ufaff\U0002f800-\U0002fa1f]+)")
_PUNCTUATION = frozenset("\u3000（）［］｛｝，．：；！？～…‥")  # the ideographic space is one of them
_IN_A_NUMBER = re.compile("(?<=[0-9])[，．：](?=[0-9])")
_TO_ASCII = {ord(wide): narrow for wide, narrow in zip("，．：", ",.:", strict=True)}


def normalise(text: str, form: Form) -> str:
    """The normalised text; normalising it again changes nothing, and every text can be normalised.

    "none": every kind of line end (form feeds too, which part the pages of a PDF) becomes a newline; control
    characters other than tab, and what is invisible (byte order marks, zero width spaces, soft hyphens, marks of
    direction, noncharacters) go; white space at line ends and around the whole goes; of several blank lines one stays.

    "nfc": NFC besides, but for CJK compatibility ideographs.

    "nfkc": NFKC besides, with the same exception: half-width katakana, full-width letters, digits and signs, ligatures
    and squared units become ordinary characters (㎎ mg, ㎡ m²). What would mean something else stays: superscripts and
    subscripts, fractions, circled and parenthesised characters, numbers with a mark (⒈ ㏠), spacing accents.

    Full-width punctuation and the ideographic space stay in every form: Japanese sentences are written with them, as
    with 、。「」, which no form touches, and a model should see sentences as its readers write them. Only between two
    digits do ， ． ： become , . : since there they are part of a number or time.
    """
    if _UNCLEAN.search(text):
        text = _INVISIBLE.sub("", _LINE_END.sub("\n", text))
    if form == "nfkc":
        foldable, table = _folding()
        text = foldable.sub(lambda match: match[0].translate(table), text)
        text = _IN_A_NUMBER.sub(lambda match: match[0].translate(_TO_ASCII), text)
    if form != "none":
        text = _nfc(text)
    if _SPACE_AT_LINE_END.search(text):
        text = "\n".join(map(str.rstrip, text.split("\n")))
    return _BLANK_LINES.sub("\n\n", text).strip()


def _nfc(text: str) -> str:
    """NFC of the text between CJK compatibility ideographs; no character composes with one."""
    parts = _COMPATIBILITY_IDEOGRAPH.split(text)
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(parts)


@functools.cache
def _folding() -> tuple[re.Pattern[str], dict[int, str]]:
    """A pattern of what may have to be folded, and what each such character becomes (to be followed by NFC)."""
    # Above U+1FFFF only CJK compatibility ideographs have decompositions.
    table = {
        ord(char): folded for char in map(chr, range(0xA0, 0x20000)) if (folded := _nfc(_fold(char))) != _nfc(char)
    }
    # Ranges beyond the first plane are looked through one by one, for every character: one range does for all.
    class_of_chars = "".join(re.escape(chr(code)) for code in table if code < 0x10000)
    return re.compile(f"[{class_of_chars}\U00010000-\U0001ffff]+"), table


def _fold(char: str) -> str:
    """The full compatibility decomposition, which stops at what is kept."""
    tag, *codes = (unicodedata.decomposition(char) or "-").split()
    if not tag.startswith("<"):
        tag, codes = "", [tag, *codes]
    if codes == ["-"] or _is_kept(char, tag):
        return char
    return "".join(_fold(chr(int(code, 16))) for code in codes)


def _is_kept(char: str, tag: str) -> bool:
    if char in _PUNCTUATION or tag in ("<super>", "<sub>", "<fraction>", "<circle>"):
        return True
    if tag != "<compat>":
        return _COMPATIBILITY_IDEOGRAPH.match(char) is not None
    plain = unicodedata.normalize("NFKC", char)
    return plain[0] == "(" or (plain[0] == " " and plain != " ") or not set(plain).isdisjoint("0123456789")

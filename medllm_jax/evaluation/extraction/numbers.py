"""Reading a number where an answer stands, and comparing it with the golds of a question."""

import re
from decimal import Decimal, InvalidOperation

from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.normalize import skip

# Bounded, so that a number of a million digits is no number.
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,20})(?:\.\d{1,20})?(?![\d,]*\d)"
_POWER = r"(?:\s?[x×*]\s?10\s?\^\s?\{?(?P<power>-?\d{1,2})\}?)?"
_NUMBER_AND_POWER = re.compile(rf"(?P<digits>{_NUMBER}|[-+]?\.\d{{1,20}}){_POWER}")
# A range, a second number, or a number that is denied: the answer is not one number.
_NOT_ONE = re.compile(
    r"\s?(?:~|-|から|ないし|to|または|又は|か|or)\s?\d|\s?[x×]\s?\d"
    r"|\s?[^\s\d。、(]{0,8}?(?:では?な[いくか]|じゃな|以外|以上|以下|未満)"
)
_SUBJECT = re.compile(r"[^\d\n=。\ue001-\ue009][^\n=。\ue001-\ue009]{0,24}?は")
_BEFORE = re.compile(r"[\s\"'「『(\[約およそほぼ、,:=]{0,12}\ue001?")
_OTHER_BOX = re.compile(r"[\ue002-\ue009]\s?[:=は]?\s?\d")
_BOX = re.compile(r"[\ue001-\ue009]\s?[:=は]?\s?(\d)(?![\d.,])[\s,、。.;]{0,3}")


def read_number(
    text: str, start: int = 0, *, equation: bool = True, sentence: bool = True
) -> tuple[str | None, int, bool]:
    """The number that stands at a position of normalised text, where boxes ①-⑨ are U+E001-U+E009.

    With `equation`, the line may be one (A-aDO2 = 26), whose last side counts; with `sentence`, the number may have a
    subject (A-aDO2は26です).

    Returns:
      The number without separators (None where there is none), its end, and whether it is one of several.
    """
    line_end = text.find("\n", start)
    line_end = min(line_end if line_end >= 0 else len(text), start + 300)
    if boxed := _boxes(text, start):
        return boxed[0], boxed[1], False
    equals = max(text.rfind(sign, start, line_end) for sign in "=≒≈") if equation else -1
    begin = equals + 1 if equals >= start else start
    if sentence and (subject := _SUBJECT.match(text, begin)):
        begin = subject.end()
    begin = skip(_BEFORE, text, begin)
    match = _NUMBER_AND_POWER.match(text, begin)
    if not match:
        return None, start, False
    several = bool(_NOT_ONE.match(text, match.end()))
    if text[begin - 1 : begin] == "\ue001":
        # ①26: all of it in the first box, unless more boxes are filled.
        several |= bool(_OTHER_BOX.search(text, match.end(), match.end() + 40))
    digits = match["digits"].replace(",", "").lstrip("+")
    if match["power"]:
        digits = format(Decimal(digits).scaleb(int(match["power"])), "f")
    return digits, match.end(), several


def _boxes(text: str, start: int) -> tuple[str, int] | None:
    """Digits given box by box: ①2 ②6."""
    position, digits = skip(_BEFORE, text, start), ""
    position -= text[position - 1 : position] == "\ue001"
    while (match := _BOX.match(text, position)) and ord(match[0][0]) == 0xE001 + len(digits):
        digits, position = digits + match[1], match.end()
    return (digits, position) if digits else None


def same_number(question: Question, number: str) -> bool:
    """Whether a number answers the question: equal as a decimal, or as the digits to be put into its boxes.

    Equal decimals: 7.2 and 7.20; 1,130 where the form "1, ①②③" reads the gold 130. Equal digits, only for a question
    with boxes: 21 for 2.1; and 2.1 for 21 where the form is unknown.
    """
    value = _decimal(number)
    if value is None:
        return False
    gold, *readings = question.numbers
    if question.boxes is None:
        return value == _decimal(gold)
    if any(value == _decimal(reading) for reading in readings):
        return True
    whole = re.fullmatch(r"[\d,]+", number)
    return bool(whole or not readings) and re.sub(r"\D", "", number) == re.sub(r"\D", "", gold)


def _decimal(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", ""))
    except InvalidOperation:
        return None

"""From a model's output to the letters or the number it answers, by a fixed ladder of rules.

An answer is taken only where an answer stands: as the whole output, as JSON, after a cue such as 答え:, or (where the
prompt asked for nothing else) at the very start. Nothing is collected from prose; the one rule that does so is marked
`lenient` and scored apart. What no rule reads is a problem with a name, and scores 0:

    empty         nothing was written
    refusal       the model says that it cannot answer
    placeholder   the answer form was copied instead of being filled in
    truncated     the output reached its limit before the answer was complete
    conflict      two answers that exclude each other, without a word between them
    wrong_count   an answer, but not of as many letters as were asked for (its letters are kept)
    unparseable   anything else
    unanswered    there is no output: the server gave none

Every rule looks at a bounded stretch of the output with expressions that take linear time.
"""

import dataclasses
import json
import re
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.letters import QUOTES, LetterReader, Reading
from medllm_jax.evaluation.extraction.normalize import clean, normalize
from medllm_jax.evaluation.extraction.numbers import read_number
from medllm_jax.evaluation.sampling import UNANSWERED

PROBLEMS = ("empty", "refusal", "placeholder", "truncated", "conflict", "wrong_count", "unparseable", "unanswered")

_QUOTE = f"[{re.escape(QUOTES)}]"
# As the questions themselves ask (最も考えられるのはどれか).
_LIKELIEST = r"(?:最も|もっとも)(?:考えられる|疑われる|適切な|可能性が高い)の"
# What is called wrong is no answer (不正解, 誤答).
_CUE = re.compile(
    r"(?<![不誤])(?<!不正)(?<!誤った)(?<!間違った)(?<!incorrect )(?<!wrong )"
    r"(?P<word>最終(?:的な?)?(?:答え|解答|回答|結論|判断|選択|診断)?|正解|正答|答え|答|解答|回答"
    rf"|(?<![a-z])(?:final )?answers?|{_LIKELIEST})"
    r"(?:の?(?:選択肢|番号|記号)|(?: choices?| options?| letters?)\b)?"
    r"[ \]】」』)\"']{0,4}(?:は|が|:|=|->|→|is\b|are\b|\n|(?<=[】\]]))"
    rf"(?:{_QUOTE}|[、,:=]|選択肢の?|番号|記号"
    r"|(?:次|以下)の(?:通り|とおり)?(?=[^a-z])|[2-5二三四五]つ(?=[、:])|options?\b|choices?\b){0,12}"
)
_LIKELY, _HEDGED = re.compile(_LIKELIEST), re.compile(r"だ(?:が|けど)")  # 最も考えられるのはaだが、bも否定できない
# After its answer: bが正解です。 Neither asked, nor denied, nor supposed.
_CUE_BEHIND = re.compile(
    r"が(?P<answer_is>(?:最も適切な|最終的な)?(?:正解|正答|答え|解答|回答))"
    r"(?:です|である|だ|となる|となります|と(?:考え|判断)(?:る|ます|られる|られます|する|します|できる|される))?(?:[。\n、!]|$)"
)
_MAX_BEHIND = 2
_CUE_WORDS = re.compile(
    rf"{_LIKELIEST}|最終(?:的な?)?|結論|判断|選択|診断|正解|正答|答え?|解答|回答|final|answers?|is|are|です|である|{_QUOTE}|[。.、,:;=はが]"
)
# A sentence that asks, or a list of choices: the model has begun a question of its own.
_NEW_QUESTION = re.compile(r"(?:どれか|選べ|求めよ|選んでください)。|\na[:.)]\s?\S[^\n]{0,200}\n{1,2}b[:.)]")
_REFUSAL = re.compile(
    r"申し訳|できません|できない|出来ません|(?:分か|わか)りません|示されてい|提示されて|添付されてい|情報が(?:不足|足り)"
    r"|sorry|cannot|can't|unable|not possible|impossible|not provided|no image|more information|unknown"
)
_PLACEHOLDER = re.compile(
    rf"{_QUOTE}{{0,4}}(?:選択肢|該当|記号|アルファベット|解答|回答|答え|ここ|正しい選択|your\b|letters?\b|answer\b"
    r"|x{1,3}\b|[○〇◯●_?…□]|\.{2,})"
)
# What follows a number at the start: its unit, and not a sentence (60歳の男性では...).
_UNIT = re.compile(r"[^\n。(]{0,16}(?:$|[\n。(])")
_FLAT_OBJECT = re.compile(r"\{[^{}]{2,4000}\}")
_MAX_CUES = 64
_ANSWER_KEYS = ("answer", "final_answer", "答え", "正解", "解答", "回答")


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What an output answers, and how it was read.

    Where `problem` is None, exactly one of `letters` and `number` is set. `rule` names the rule that matched ("" where
    none did): letters, digits, words, labelled, number, each alone or as start_..., cue_... or json_...; or mentioned.
    `lenient` marks the tier that by default is no answer. `truncated` says that the output ended at its length limit
    within the model's own turn.
    """

    letters: frozenset[str] | None = None
    number: str | None = None
    rule: str = ""
    truncated: bool = False
    problem: str | None = None
    lenient: bool = False


def extract(question: Question, text: str, finish_reason: str = "stop", condition: str = "answer_only") -> Extraction:
    """Reads the answer in a model's output; whatever the output is, this returns and does not raise.

    Args:
      question: what was asked.
      text: the output as generated, which follows the last characters of the prompt directly.
      finish_reason: "length" where the output reached its limit, UNANSWERED where there is none, "stop" otherwise.
      condition: "answer_only" (the output starts with its answer) or "explain" (the answer follows an explanation).
    """
    if finish_reason == UNANSWERED:
        return Extraction(problem="unanswered")
    cleaned = clean(text, keep_circled=question.kind == "number")
    truncated = finish_reason == "length" and not cleaned.cut
    leading = condition == "answer_only"
    if cleaned.unclosed:
        return Extraction(problem="truncated" if truncated else "unparseable", truncated=truncated)
    if not cleaned.text:
        return Extraction(problem="empty", truncated=truncated)
    read = _read_number if question.kind == "number" else _read_letters
    found = read(question, cleaned.text, leading, truncated)
    if (found is None or found.lenient) and cleaned.longer != cleaned.text:
        # Nothing was answered yet: what looks like a further question is the model's account of this one, unless the
        # model has given up on this one.
        later = finish_reason == "length" and not cleaned.longer_cut
        again = None if _REFUSAL.search(cleaned.text) else read(question, cleaned.longer, leading, later)
        if again and again.problem is None and not again.lenient:
            found, truncated = again, later
    found = found or Extraction(problem=_nature(cleaned.text, truncated))
    return dataclasses.replace(found, truncated=truncated)


def vote(extractions: Sequence[Extraction]) -> Extraction:
    """What most of several outputs to one question answer (self-consistency, arXiv 2203.11171).

    Outputs without an answer have no vote, those of the lenient tier only where no other has; of answers that are as
    frequent the one that came first counts. Where none can be read the first output stands for all.
    """
    voters = [e for e in extractions if e.problem is None and not e.lenient]
    voters = voters or [e for e in extractions if e.problem is None]
    if not voters:
        return extractions[0]
    winner, _ = Counter((e.letters, e.number) for e in voters).most_common(1)[0]
    return next(e for e in voters if (e.letters, e.number) == winner)


def _read_letters(question: Question, text: str, leading: bool, truncated: bool) -> Extraction | None:
    reader = LetterReader.of(question)

    def result(reading: Reading, place: str, within: str = text) -> Extraction:
        rule = f"{place}_{reading.rule}".lstrip("_")
        problem = None
        if reading.conflict:
            problem = "conflict"
        elif len(reading.letters) != question.k:
            short = len(reading.letters) < question.k and not within[reading.end :].strip(" \t\n,、・と")
            problem = "truncated" if truncated and short else "wrong_count"
        kept = reading.letters if problem in (None, "wrong_count") else None
        return Extraction(letters=kept, rule=rule, problem=problem)

    if reading := reader.whole(text):
        return result(reading, "")
    values = [normalize(v) for v in _json_answers(text)]
    readings = [r for v in values if (r := reader.whole(v) or reader.at(v, 0, after_cue=True))]
    if readings:
        agree = len({r.letters for r in readings}) == 1
        return result(readings[-1], "json", "}") if agree else Extraction(rule="json", problem="conflict")

    first = reader.at(text, 0, after_cue=False) if leading else None
    start = first.end if first else 0
    cued = _after_last_cue(text, start, bool(first), lambda at: reader.at(text, at, after_cue=True), reader)
    if isinstance(cued, Extraction) or (first and cued and first.letters != cued.letters):
        return Extraction(rule="cue", problem="conflict")
    if first:
        return result(first, "start")
    if cued:
        return result(cued, "cue")
    mentioned = reader.mentioned(text)
    if len(mentioned) == question.k and (leading or not truncated):
        return Extraction(letters=mentioned, rule="mentioned", lenient=True)
    return None


def _read_number(question: Question, text: str, leading: bool, truncated: bool) -> Extraction | None:
    # A first line of several is a step of the calculation.
    short = "\n" not in text and len(text) <= 100

    def at(position: int) -> Reading | None:
        number, end, several = read_number(
            text, position, equation=position > 0 or (short and leading), sentence=position > 0
        )
        return Reading(frozenset((number,)), end, "number", conflict=several) if number else None

    def result(reading: Reading, place: str) -> Extraction:
        rule = f"{place}_number".lstrip("_")
        if reading.conflict:
            return Extraction(rule=rule, problem="conflict")
        if truncated and reading.end == len(text):
            # The next token could have been a further digit.
            return Extraction(rule=rule, problem="truncated")
        return Extraction(number=next(iter(reading.letters)), rule=rule)

    for value in _json_answers(text)[-1:]:
        number, _, several = read_number(normalize(value))
        if number and not several:
            return Extraction(number=number, rule="json_number")
    first = at(0) if leading or short else None
    if first and not _UNIT.match(text, first.end):
        first = None
    cued = _after_last_cue(text, first.end if first else 0, bool(first), at)
    if isinstance(cued, Extraction) or (first and cued and first.letters != cued.letters):
        return Extraction(rule="cue", problem="conflict")
    if first:
        return result(first, "start" if leading else "")
    return result(cued, "cue") if cued else None


def _after_last_cue(
    text: str, start: int, answered: bool, read: Callable[[int], Reading | None], reader: LetterReader | None = None
) -> Reading | Extraction | None:
    """The reading at the last cue that an answer follows, or, by `reader`, that stands after its answer (bが正解です);
    an Extraction where two stand side by side and differ.

    Once there is an answer (`answered` says there was one before `start`), a question ends the search: it is one that
    the model asks itself.
    """
    questions = [match.start() for match in _NEW_QUESTION.finditer(text, start)]
    found: Reading | None = None
    end = start
    # An output with more cues than this repeats itself.
    behind = {m.end("answer_is"): m for m in list(_CUE_BEHIND.finditer(text, start))[-_MAX_BEHIND:]} if reader else {}
    cues = [cue for cue in list(_CUE.finditer(text, start))[-_MAX_CUES:] if cue.end("word") not in behind]
    for cue in sorted([*cues, *behind.values()], key=lambda cue: cue.start()):
        if (found or answered) and bisect(questions, cue.end()) > bisect_left(questions, end):
            break
        begin = cue.start()
        if reader and cue.re is _CUE_BEHIND:
            begin, reading = reader.before(text, max(start, end), cue.start())
        elif reader and reader.marks_a_choice(text, cue):
            continue
        else:
            reading = read(cue.end())
        if reading is None or (_LIKELY.match(cue[0]) and _HEDGED.match(text, reading.end)):
            continue
        if found and found.letters != reading.letters and not _CUE_WORDS.sub("", text[end:begin]):
            return Extraction(rule="cue", problem="conflict")
        found, end = reading, max(reading.end, begin)
    return found


def _json_answers(text: str) -> list[str]:
    """The values of an answer key in flat JSON objects, as text."""
    answers = []
    for match in list(_FLAT_OBJECT.finditer(text))[-8:]:
        try:
            content = json.loads(match[0], strict=False)
        except (ValueError, RecursionError):
            continue
        for key in _ANSWER_KEYS:
            value = content.get(key) if isinstance(content, dict) else None
            if isinstance(value, list):
                answers.append(",".join(map(str, value)))
            elif isinstance(value, str | int | float):
                answers.append(str(value))
    return answers


def _nature(text: str, truncated: bool) -> str:
    """Which problem an output has that holds no answer."""
    cues = list(_CUE.finditer(text))
    answer = text[cues[-1].end() :] if cues else text
    if cues or len(text) <= 40:
        if truncated and not answer.strip():
            return "truncated"
        if not answer.strip() or _PLACEHOLDER.match(answer):
            return "placeholder"
    if truncated:
        return "truncated"
    return "refusal" if _REFUSAL.search(text) else "unparseable"

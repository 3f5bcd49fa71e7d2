"""Exams: questions with their accepted answers, from the IgakuQA folders or from multiple-choice JSON lines.

IgakuQA (github.com/jungokasai/IgakuQA) is the Japanese medical licensing exam of 2018-2022. It is read where it lies;
nothing of it is part of this project.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable
from itertools import product

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.json_lines import Row, read_rows
from medllm_jax.storage.remote import is_file, is_folder, is_there, names_in

_log = logging.getLogger(__name__)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_YEAR_OF_EXAM_ZERO = 1906  # the 112th exam was held in 2018, and there is one a year
_EXAM_FILE = re.compile(r"(\d{2,3})-([A-Z])\.jsonl")
_COMPANION_FILE = re.compile(r".*_(metadata|translate)\.jsonl")
_CASE_SET = re.compile(r"\s*次の文を読み、(?:\d{1,4}\s*[〜～~、,・-]\s*(\d{1,4})|以下)の問いに答えよ。")
# Where the lead item does not say how many questions its case has (2020 on), the section decides.
_CASE_SET_SIZE = {"B": 2, "E": 2, "C": 3, "F": 3}
_MAX_CASE = 20  # questions about one case: each later one repeats what the earlier ones told
_MAX_ALTERNATIVES = 1_000  # accepted answers of a question
_MOST_OF_A_NAME = 200  # characters of an id, section or category, which tables and messages show
_PICTURED = 5  # choices of a question that gives none of them, since they are pictures
# Found to be faulty after the exam: credited to everyone. Its file has the answer of the faulty key.
_CREDITED = {"116A71"}
_SECTIONS = "ABCDEF"
_BOXES = re.compile(r"解答\s*[:：]\s*(\D{0,3}(?:\d[\d,、 ]*)?[①-⑨][①-⑨.．,、\s]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question. `kind` is "choice" (answers are letters) or "number" (no choices). Pictures as choices are "".

    `gold` holds every accepted set of letters; it is empty for a number. `numbers` holds the golds of a number: first
    as the file has it, then as read through `boxes`, the answer form printed in the question ("①②.③" makes 100 mean
    10.0; "1, ①②③" makes 130 mean 1,130). `boxes` is None where a number is plain, and "" where the form is unknown.
    `case` is the id of the first question about the same case, and "" for a question that stands alone; `stem` is the
    case that a follow-up question is about and that its own text lacks. `points` 0 means the question was excluded from
    the exam, `credited` that everybody got its points, whatever the answer. `contraindicated` are the choices that
    endanger the patient.
    """

    id: str
    text: str
    choices: tuple[str, ...] = ()
    gold: frozenset[frozenset[str]] = frozenset()
    numbers: tuple[str, ...] = ()
    boxes: str | None = None
    k: int = 1
    points: int = 1
    text_only: bool = True
    exam: str = ""
    section: str = ""
    year: int | None = None
    category: str = ""
    case: str = ""
    stem: str = ""
    explanation: str = ""
    contraindicated: frozenset[str] = frozenset()
    credited: bool = False

    @property
    def kind(self) -> str:
        return "choice" if self.choices else "number"

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the choices, in order."""
        return tuple(LETTERS[: len(self.choices)])


@dataclasses.dataclass(frozen=True)
class Exam:
    """A named, ordered, non-empty collection of questions with distinct ids."""

    name: str
    questions: tuple[Question, ...]


def load_exam(
    path: epath.PathLike,
    years: Iterable[int] | None = None,
    *,
    name: str | None = None,
    text_only: bool = False,
    prepend_stems: bool = False,
    limit: int | None = None,
) -> Exam:
    """Reads an exam from a JSON lines file or a folder of them.

    Folders: IgakuQA's repository, its `data` folder, one of its year folders, or any folder of `*.jsonl`. Rows: those
    of IgakuQA (`problem_id`, `problem_text`, ...), or `id`, `question`, `choices` (a list; empty for a number, and for
    an answer of letters where the choices are pictures: five, or as many as the answer has need of),
    `answer` (a letter, a list of letters, a number as a string, or "any" if everyone is credited), and optionally
    `points` (default 1), `explanation`, `category`, `year`, `exam`, `section`, `text_only`, `case` (equal for questions
    about one case), `contraindicated` (letters).

    Args:
      path: local, or gs://.
      years: keeps the questions of these years.
      name: of the exam; the last part of the path by default.
      text_only: keeps the questions that need no picture.
      prepend_stems: puts the case before the follow-up questions that lack it. Off for scores comparable with the
        published ones, which were made without.
      limit: keeps the first so many questions.

    Raises:
      UserError: the path, a line of it, or what is left after choosing is not an exam.
    """
    root = epath.Path(path)
    years = None if years is None else set(years)
    files = [root] if is_file(root) else _exam_files(root, years)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    empty = []
    for file in files:
        found = _read_file(file)
        empty += [] if found else [file]
        for question, where in found:
            if question.id in seen:
                raise UserError(
                    f"{where}: the id {_short(question.id)} was used at {seen[question.id]}; ids must be distinct"
                )
            seen[question.id] = where
            questions.append(question)
    if not questions:
        raise UserError(f"{root}: there is no question in it; one JSON object a line was expected")
    if empty:
        _log.warning(f"warning: {len(empty)} of {len(files)} files hold no question, the first is {empty[0]}")

    if years is not None:
        wanted, held = years, {q.year for q in questions if q.year is not None}
        if missing := sorted(wanted - held):
            raise UserError(
                f"{root}: no questions of {_listed(missing)}; it holds {_listed(sorted(held)) or 'no years'}"
            )
        questions = [q for q in questions if q.year in wanted]
    if text_only:
        questions = [q for q in questions if q.text_only]
    if limit is not None:
        questions = questions[:limit]
    if not questions:
        raise UserError(f"{root}: no question is left after choosing by years, text_only and limit")
    if prepend_stems:
        questions = [dataclasses.replace(q, text=f"{q.stem}\n{q.text}") if q.stem else q for q in questions]
    return Exam(name or root.name.removesuffix(".jsonl"), tuple(questions))


def _sections_of(year: epath.Path) -> list[epath.Path]:
    """The files of one year of IgakuQA, all six, whose metadata (contraindicated choices) are there too."""
    names, held = [f"{int(year.name) - _YEAR_OF_EXAM_ZERO}-{section}" for section in _SECTIONS], names_in(year)
    if missing := [f"{n}{end}.jsonl" for n in names for end in ("", "_metadata") if f"{n}{end}.jsonl" not in held]:
        raise UserError(
            f"{year}: {_listed(missing)} missing; an exam has sections {_SECTIONS[0]} to {_SECTIONS[-1]}, "
            "each with its metadata: fetch the folder again, or choose other years"
        )
    return [year / f"{name}.jsonl" for name in names]


def _exam_files(root: epath.Path, years: set[int] | None) -> list[epath.Path]:
    if not is_folder(root):
        raise UserError(
            f"{root}: no such file or folder; an exam is a .jsonl file or a folder of them "
            "(IgakuQA is fetched by: medllm data exam igakuqa --output IgakuQA)"
        )
    data = root / "data"
    for folder in (data, root):
        if is_folder(folder) and (year_folders := [p for p in folder.iterdir() if re.fullmatch(r"\d{4}", p.name)]):
            held = {int(y.name): y for y in year_folders}
            chosen = sorted(held if years is None or not years <= held.keys() else years)
            found = [f for year in chosen for f in _sections_of(held[year])]
            return sorted(found, key=lambda f: (f.parent.name, f.name))
    return sorted(f for f in root.iterdir() if f.name.endswith(".jsonl") and not _COMPANION_FILE.fullmatch(f.name))


def _read_file(file: epath.Path) -> list[tuple[Question, str]]:
    rows = read_rows(file)
    if not any("problem_id" in row.fields for row in rows):
        return [(_generic(row), row.where) for row in rows]
    match = _EXAM_FILE.fullmatch(file.name)
    place = {"exam": file.name.removesuffix(".jsonl")}
    if match:
        place |= {"section": match[2], "year": int(match[1]) + _YEAR_OF_EXAM_ZERO}
    questions = [_igakuqa(row, place) for row in rows]
    questions = _with_metadata(_with_stems(questions), file.parent / f"{place['exam']}_metadata.jsonl")
    return list(zip(questions, (row.where for row in rows), strict=True))


# --- one row ---------------------------------------------------------------------------------------------------------


def _generic(row: Row) -> Question:
    year = row.get("year", int | None, None)
    return _question(
        row,
        text=row.get("question", str),
        boxed=False,
        id=row.get("id", str),
        exam=row.get("exam", str, ""),
        section=row.get("section", str, ""),
        year=year,
        category=row.get("category", str, ""),
        case=row.get("case", str, ""),
        explanation=row.get("explanation", str, ""),
        text_only=row.get("text_only", bool, True),
        contraindicated=_contraindicated(row),
    )


def _contraindicated(row: Row) -> frozenset[str]:
    letters, known = row.get("contraindicated", list, []), LETTERS[: len(row.get("choices", list)) or None]
    if not all(isinstance(letter, str) and letter in tuple(known) for letter in letters):
        raise row.error(f"'contraindicated' is {_short(letters)}; letters of its choices were expected")
    return frozenset(letters)


def _igakuqa(row: Row, place: dict) -> Question:
    text = row.get("problem_text", str)
    return _question(
        row,
        text=text,
        boxed=True,
        id=row.get("problem_id", str),
        credited=row.get("problem_id", str) in _CREDITED,
        text_only=row.get("text_only", bool, True),
        explanation=row.get("explanation", str, ""),
        **place,
    )


def _question(row: Row, *, text: str, boxed: bool, **fields) -> Question:
    for name in ("id", "exam", "section", "category", "case"):
        if len(fields.get(name, "")) > _MOST_OF_A_NAME:
            raise row.error(f"{name!r} has {len(fields[name])} characters; at most {_MOST_OF_A_NAME} were expected")
    choices = tuple(row.get("choices", list))
    if not all(isinstance(c, str) for c in choices) or len(choices) > len(LETTERS):
        raise row.error(f"'choices' must be a list of at most {len(LETTERS)} strings")
    answer = row.get("answer", str | list | int | float)
    items = [str(a) for a in (answer if isinstance(answer, list) else [answer])]
    alternatives = _alternatives(items)
    named = {letter for letters in alternatives for letter in letters}
    if not choices and named and all(len(letter) == 1 and letter in LETTERS for letter in named):
        choices = ("",) * max(_PICTURED, LETTERS.index(max(named)) + 1)
        fields["text_only"] = row.get("text_only", bool, False)
    fields |= {"text": text, "choices": choices, "points": _points(row)}
    if choices:
        if items == ["any"]:
            letters = frozenset(map(frozenset, LETTERS[: len(choices)]))
            return Question(gold=letters, **fields | {"credited": True})
        gold = _accepted_sets(alternatives, LETTERS[: len(choices)])
        if gold is None:
            raise row.error(
                f"the answer {_short(answer)} is not made of distinct letters of its choices "
                f"a-{LETTERS[len(choices) - 1]}, with {_MAX_ALTERNATIVES} alternatives at most"
            )
        return Question(gold=gold, k=len(next(iter(gold))), **fields)
    number = items[0].strip() if len(items) == 1 else ""
    if not _NUMBER.fullmatch(number):
        raise row.error(f"the answer {_short(answer)} of a question without choices is not a number")
    boxes = None
    if boxed:
        form = _BOXES.search(text)
        boxes = form[1].strip() if form else ""
    value = read_boxes(boxes, number) if boxes else None
    return Question(numbers=(number,) if value is None else (number, value), boxes=boxes, **fields)


def _points(row: Row) -> int:
    points = row.get("points", str | int, 1)
    if not re.fullmatch(r"[0-9]{1,6}", str(points)):
        raise row.error(f"'points' is {_short(points)}; a whole number of at least 0 was expected")
    return int(points)


def _alternatives(items: list[str]) -> list[list[str]]:
    """What each item of an answer may be: "a or d"; one item may stand for several ("a,c")."""
    if len(items) == 1 and "," in items[0]:
        items = items[0].split(",")
    return [[part.strip().lower() for part in item.split(" or ")] for item in items]


def _accepted_sets(alternatives: list[list[str]], letters: str) -> frozenset[frozenset[str]] | None:
    """The accepted sets of letters; None where something is no letter, or there are too many."""
    if len(alternatives) > len(letters) or math.prod(map(len, alternatives)) > _MAX_ALTERNATIVES:
        return None
    sets = {frozenset(choice) for choice in product(*alternatives)}
    sizes_agree = all(len(s) == len(alternatives) for s in sets)
    known = all(len(part) == 1 and part in letters for parts in alternatives for part in parts)
    return frozenset(sets) if alternatives and sizes_agree and known else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_boxes(boxes: str, digits: str) -> str | None:
    """The number that `digits` make in an answer form: ("①②.③", "100") -> "10.0"; None where they do not fit it."""
    if "." in digits:
        return digits
    form = re.sub(r"[^0-9.①-⑨]", "", boxes.replace("．", "."))
    if len(re.findall(r"[①-⑨]", form)) != len(digits):
        return None
    remaining = iter(digits)
    return re.sub(r"[①-⑨]", lambda _: next(remaining), form)


# --- a section of an exam --------------------------------------------------------------------------------------------


def _with_stems(questions: list[Question]) -> list[Question]:
    """Says which questions are about one case, and gives the later ones the earlier, without what those asked."""
    result: list[Question] = []
    case, stem, last = "", "", 0
    for question in questions:
        number = _number(question.id)
        lead = _CASE_SET.match(question.text)
        if lead:
            last = int(lead[1]) if lead[1] else number + _CASE_SET_SIZE.get(question.section, 1) - 1
            last = min(last, number + _MAX_CASE - 1)
            case, stem = question.id, ""
        elif number > last:
            case, stem = "", ""
        question = dataclasses.replace(question, case=case, stem=stem)
        if number < last:
            stem = f"{stem}\n{_without_task(question.text)}".strip()
        result.append(question)
    return result


def _without_task(text: str) -> str:
    lead = _CASE_SET.match(text)
    sentences = re.split(r"(?<=。)", text[lead.end() if lead else 0 :])
    sentences = [s for s in sentences if s.strip()]
    while sentences and re.search(r"どれか|選べ|求めよ|計算せよ", sentences[-1]):
        sentences.pop()
    return "".join(sentences).strip()


def _number(question_id: str) -> int:
    match = re.search(r"(\d{1,6})$", question_id)
    return int(match[1]) if match else 0


def _with_metadata(questions: list[Question], file: epath.Path) -> list[Question]:
    if not is_there(file):
        return questions
    by_id = {row.get("problem_id", str): row for row in read_rows(file)}
    return [
        dataclasses.replace(
            q,
            category=by_id[q.id].get("category", str, ""),
            # The letters stand apart (["d", "e"]) or together (["de"]), a few of them full-width.
            contraindicated=frozenset(
                c for c in LETTERS if c in "".join(map(str, by_id[q.id].get("kinki", list, []))).translate(_HALF_WIDTH)
            ),
        )
        if q.id in by_id
        else q
        for q in questions
    ]


_HALF_WIDTH = {ord("ａ") + i: LETTERS[i] for i in range(26)}


def _listed(values: Iterable) -> str:
    return ", ".join(map(str, values))

"""Reads predictions that others made: the published form of IgakuQA's results, or outputs with ids.

A file holds one system's answers, or a part of them: `112-A_gpt4.jsonl` is a section by system gpt4, any other name is
the system's own. Rows have `problem_id` and `prediction`, or `id`, `text` and optionally `finish_reason`.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from etils import epath

from medllm_jax.errors import UserError, quoted
from medllm_jax.evaluation.exam import Exam
from medllm_jax.evaluation.sampling import finish_reason_of
from medllm_jax.storage.json_lines import Row, read_rows
from medllm_jax.storage.remote import is_file, is_folder

_SECTION_FILE = re.compile(r"\d{2,3}-[A-Z]_(.+)")
_LISTED = 3


class Prediction(NamedTuple):
    """One answer: its text, "length" where it ended at the limit, and where it stands ("file:line")."""

    text: str
    finish_reason: str
    where: str


def read_predictions(
    paths: Iterable[str], exam: Exam, whole: Exam, *, allow_missing: bool = False
) -> dict[str, dict[str, Prediction]]:
    """System -> question id -> prediction, of every question of an exam, in its order.

    Args:
      paths: files, folders (their `*.jsonl`, and those of the folders in them) or globs, local or gs://.
      exam: the questions.
      whole: the exam that the questions were chosen from; predictions of others of its questions are left out.
      allow_missing: a question without a prediction counts as one with an empty one.

    Raises:
      UserError: nothing is there; an id is given twice, or not of the exam; or questions have no prediction.
    """
    systems: dict[str, dict[str, Prediction]] = {}
    for file in [file for path in paths for file in _files(path)]:
        stem = file.name.removesuffix(".jsonl")
        match = _SECTION_FILE.fullmatch(stem)
        system = match[1] if match else stem
        if system in (".", ".."):
            raise UserError(f"{file}: a system's results become a folder of its name, which {system!r} can't be")
        found = systems.setdefault(system, {})
        for row in read_rows(file):
            key, prediction = _prediction(row)
            if key in found:
                raise row.error(
                    f"the question {quoted(key)} was answered at {found[key].where}; one answer each was expected"
                )
            found[key] = prediction
    known = {question.id for question in whole.questions}
    return {system: _fitted(system, found, exam, known, allow_missing) for system, found in sorted(systems.items())}


def _files(path: str) -> list[epath.Path]:
    root = epath.Path(path)
    if any(mark in root.name for mark in "*?["):
        found = sorted(root.parent.glob(root.name))
    elif is_folder(root):
        folders = [root, *sorted(entry for entry in root.iterdir() if is_folder(entry))]
        found = [file for folder in folders for file in sorted(folder.glob("*.jsonl"))]
    else:
        found = [root] if is_file(root) else []
    if not found:
        raise UserError(f"{path}: no predictions; a .jsonl file, a folder of them, or a pattern was expected")
    return found


def _prediction(row: Row) -> tuple[str, Prediction]:
    if "problem_id" in row.fields:
        return row.get("problem_id", str), Prediction(row.get("prediction", str), "stop", row.where)
    text, reason = row.get("text", str), finish_reason_of(row.get("finish_reason", str | None, None))
    return row.get("id", str), Prediction(text, reason, row.where)


def _fitted(
    system: str, found: dict[str, Prediction], exam: Exam, known: Collection[str], allow_missing: bool
) -> dict[str, Prediction]:
    ids = [question.id for question in exam.questions]
    unknown = [key for key in found if key not in known]
    if unknown and len(unknown) == len(found):
        raise UserError(
            f"{found[unknown[0]].where}: {quoted(unknown[0])} and all other ids of {system} are not of {exam.name} "
            f"({ids[0]}, ...): these are predictions of another exam"
        )
    if unknown:
        raise UserError(
            f"{found[unknown[0]].where}: {quoted(unknown[0])} is no question of {exam.name}"
            f"{_more(unknown)}: remove the line, or give the exam that it is of"
        )
    missing = [key for key in ids if key not in found]
    if missing and not allow_missing:
        raise UserError(
            f"{system}: {len(missing)} of {len(ids)} questions have no prediction ({_named(missing)}): give all files, "
            "choose the --years that were answered, or --allow-missing to count them as wrong"
        )
    nothing = Prediction("", "stop", "")
    return {key: found.get(key, nothing) for key in ids}


def _more(ids: Collection[str]) -> str:
    return f" (nor are {len(ids) - 1} more)" if len(ids) > 1 else ""


def _named(ids: list[str]) -> str:
    return ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")

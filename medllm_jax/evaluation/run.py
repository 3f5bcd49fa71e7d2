"""Running an exam: prompts to a model, raw outputs to a file, grades from that file.

Raw outputs are written before anything is parsed, so an interrupted run goes on where it stopped, and a finished one
can be graded again without the model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation.answers import extract
from medllm_jax.evaluation.exam import Exam
from medllm_jax.evaluation.jsonl import parse_row
from medllm_jax.evaluation.prompts import CONDITIONS, PromptTemplate
from medllm_jax.evaluation.scoring import Summary, grade, summarize, write_grades
from medllm_jax.remote import is_remote

# An object in a bucket cannot be appended to, and writing it whole for every line would take longer than the model.
_LINES_PER_REWRITE = 100


class Completion(Protocol):
    """What a model makes of a prompt: its text, and "length" where it ended at the limit, "stop" otherwise."""

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...


class Complete(Protocol):
    """A model: completions in the order of the prompts, best yielded as soon as they are ready."""

    def __call__(self, prompts: list[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> Iterable[Completion]: ...


def evaluate(
    exam: Exam,
    template: PromptTemplate,
    conditions: Sequence[str],
    complete: Complete,
    output_dir: epath.PathLike,
    *,
    model: str = "",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Summary]:
    """Puts every question to a model under every condition and grades the answers.

    Writes to `output_dir` (local or gs://): `raw-{condition}.jsonl`, one output a line as it comes;
    `grades-{condition}.jsonl`, what was read in each and whether it is right; `scores.json`; and `table.md`. Questions
    whose output is already there are not asked again.

    Args:
      exam: the questions.
      template: how they are put.
      conditions: among prompts.CONDITIONS.
      complete: the model.
      output_dir: made where it does not exist.
      model: the model's identity (a path, a checkpoint's step). Part of the hash under which an output is kept, so the
        outputs of one model are not taken for another's.
      progress: called with the number of questions done so far, over all conditions, kept ones included.

    Raises:
      UserError: the conditions are wrong, or `output_dir` holds outputs of other prompts, settings or another model.
    """
    _check_conditions(conditions, template)
    output_dir = epath.Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    progress = progress or (lambda done: None)
    summaries: dict[str, Summary] = {}
    done = 0
    for condition in conditions:
        settings = template.condition(condition)
        prompts = {q.id: template.render(q, condition) for q in exam.questions}
        hashes = {key: _hash(prompt, settings.max_new_tokens, settings.stop, model) for key, prompt in prompts.items()}
        file = output_dir / f"raw-{condition}.jsonl"
        with _RawOutputs(file, hashes) as outputs:
            pending = [key for key in prompts if key not in outputs.by_id]
            done += len(prompts) - len(pending)
            progress(done)
            asked = [prompts[key] for key in pending]
            answers = complete(asked, max_new_tokens=settings.max_new_tokens, stop=settings.stop) if asked else ()
            for key, answer in zip(pending, answers, strict=True):
                outputs.add(key, answer.text, answer.finish_reason)
                done += 1
                progress(done)
        grades = [
            grade(q, extract(q, outputs.by_id[q.id]["text"], outputs.by_id[q.id]["finish_reason"], condition))
            for q in exam.questions
        ]
        write_grades(output_dir / f"grades-{condition}.jsonl", grades)
        summaries[condition] = summarize(grades)

    scores = {
        "exam": exam.name,
        "template": template.name,
        "model": model,
        "conditions": {condition: summary.as_dict() for condition, summary in summaries.items()},
    }
    (output_dir / "scores.json").write_bytes(json.dumps(scores, indent=2, ensure_ascii=False).encode() + b"\n")
    (output_dir / "table.md").write_bytes(format_markdown(summaries).encode())
    return summaries


def _check_conditions(conditions: Sequence[str], template: PromptTemplate) -> None:
    if not conditions or len(set(conditions)) < len(conditions) or set(conditions) - set(CONDITIONS):
        raise UserError(f"conditions: {list(conditions)} given; one or both of {', '.join(CONDITIONS)} were expected")
    for condition in conditions:
        template.condition(condition)


# --- raw outputs -----------------------------------------------------------------------------------------------------


class _RawOutputs:
    """The raw outputs of one condition, by question id, on disk as soon as they are added."""

    def __init__(self, file: epath.Path, hashes: Mapping[str, str]):
        self._file, self._hashes = file, hashes
        self._lines: list[bytes] = []
        self.by_id: dict[str, dict[str, str]] = {}
        self._unwritten = 0
        self._append = None

    def __enter__(self) -> "_RawOutputs":
        if self._file.exists():
            self._read()
        if _appendable(self._file):
            self._append = self._file.open("ab")
        return self

    def __exit__(self, *_) -> None:
        if self._append:
            self._append.close()
        if self._unwritten:
            self._rewrite()

    def add(self, key: str, text: str, finish_reason: str) -> None:
        row = {"id": key, "prompt_hash": self._hashes[key], "text": text, "finish_reason": finish_reason}
        self.by_id[key] = row
        line = _json_line(row)
        if self._append:
            self._append.write(line)
            self._append.flush()
            return
        self._lines.append(line)
        self._unwritten += 1
        if self._unwritten >= _LINES_PER_REWRITE:
            self._rewrite()

    def _rewrite(self) -> None:
        self._file.write_bytes(b"".join(self._lines))
        self._unwritten = 0

    def _read(self) -> None:
        content = self._file.read_bytes()
        # A run that was stopped while writing leaves half a line, which may even end within a character.
        whole, _, torn = content.rpartition(b"\n")
        self._lines = [line + b"\n" for line in whole.split(b"\n")] if whole else []
        for number, line in enumerate(self._lines, 1):
            self._keep(line.decode("utf-8", "replace"), f"{self._file}:{number}")
        if torn:
            self._rewrite()

    def _keep(self, line: str, where: str) -> None:
        row = parse_row(line, where)
        fields = {name: row.get(name, str) for name in ("id", "prompt_hash", "text", "finish_reason")}
        expected = self._hashes.get(fields["id"])
        if expected is not None and fields["prompt_hash"] != expected:
            raise row.error(
                f"the output of {fields['id']} was made with another prompt, other settings or another model; "
                "give another output folder, or delete this file to ask again"
            )
        self.by_id[fields["id"]] = fields


def _appendable(file: epath.Path) -> bool:
    return not is_remote(file)


def _hash(prompt: str, max_new_tokens: int, stop: tuple[str, ...], model: str) -> str:
    """16 hexadecimal digits over all that decides an output."""
    content = json.dumps([prompt, max_new_tokens, list(stop), model])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # A model can produce half of a surrogate pair, which has no UTF-8.
        line = json.dumps(row).encode()
    return line + b"\n"


# --- tables ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("condition", "questions", "correct", "accuracy", "weighted accuracy", "unparseable", "wrong count")


def _cells(condition: str, s: Summary) -> tuple[str, ...]:
    accuracies = (f"{100 * s.accuracy:.1f}%", f"{100 * s.weighted_accuracy:.1f}%")
    return (condition, str(s.n), str(s.correct), *accuracies, str(s.unparseable), str(s.wrong_count))


def format_markdown(summaries: Mapping[str, Summary]) -> str:
    """A Markdown table with a row for each condition."""
    rows = [_COLUMNS, ("---", *["---:"] * (len(_COLUMNS) - 1)), *(_cells(*item) for item in summaries.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_table(summaries: Mapping[str, Summary]) -> str:
    """The same table in aligned columns, for a terminal."""
    rows = [_COLUMNS, *(_cells(*item) for item in summaries.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)

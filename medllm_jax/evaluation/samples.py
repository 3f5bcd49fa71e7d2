"""A model's own answers to an exam, one or several to a question, in a file that is graded or made into pairs.

The first line of the file says of which model the samples are and how they were drawn; each further one holds all
samples of one question under one condition. What a question's samples are depends on that question, the model and the
settings alone, so a file that was begun goes on to the same content, wherever it was interrupted. Prompts that a server
left without an answer are not in the file: the next run asks for them again.
"""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from etils import epath

from medllm_jax.config.load import build
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.prompts import Prompt, PromptTemplate
from medllm_jax.evaluation.sampling import UNANSWERED, Completion, Sampler, SamplingParams, finish_reason_of
from medllm_jax.storage.append import AppendedFile
from medllm_jax.storage.json_lines import Row, parse_row
from medllm_jax.storage.lease import sole_writer
from medllm_jax.storage.remote import is_there

_log = logging.getLogger(__name__)

_HALF = re.compile(r"[\ud800-\udfff]")

Key = tuple[str, str]  # question id, condition

# What the head of a file says of how its samples were drawn -> the field of SamplingParams.
_PARAMS = {"samples": "n", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}


def prompt_of(question: Question, template: PromptTemplate, condition: str, *, chat: bool) -> Prompt:
    """What is put to the model: text that it continues, or chat messages that it answers."""
    return (template.render_messages if chat else template.render)(question, condition)


@sole_writer("file", beside=True)
def sample_exam(
    exam: Exam,
    template: PromptTemplate,
    conditions: Sequence[str],
    file: epath.PathLike,
    sampler: Sampler | None,
    params: SamplingParams,
    *,
    anew: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> "Samples":
    """The samples of every question under every condition, those that are not in the file drawn and written to it.

    Args:
      exam, template, conditions: what is asked. The file may hold other questions too, which stay.
      file: local or gs://, JSON lines; made where it does not exist.
      sampler: the model; None where the file holds all samples already, which then are taken as they are.
      params: how samples are drawn; limit and stop strings are the template's.
      anew: forgets what is in the file.
      progress: called with the number of prompts whose samples are there.

    Raises:
      UserError: the file's samples are of another model, other settings or other prompts; or there is no sampler and
        samples are missing.
    """
    file = epath.Path(file)
    kept = None if anew else Samples.read(file)
    if sampler is None:
        if kept is None:
            raise UserError(f"{file} holds no samples: name the model to sample (--run, or --server and --model)")
        samples = kept
    else:
        settings = {"model": sampler.model, "chat": sampler.chat}
        settings |= {name: getattr(params, field) for name, field in _PARAMS.items()}
        if kept is not None:
            kept.check_settings(settings)
        samples = kept or Samples(file, settings, sampler.where)
    asked = {condition: _Asked.of(exam, template, condition, samples.chat) for condition in conditions}
    pending = {condition: [i for i in its.ids if not samples.holds(i, its)] for condition, its in asked.items()}
    missing = sum(map(len, pending.values()))
    total = sum(len(its.ids) for its in asked.values())
    progress(total - missing)
    if not missing:
        return samples
    if sampler is None:
        raise UserError(f"{file} lacks the samples of {missing} of {total} prompts: name the model to sample")
    with samples.appending() as add:
        for condition, ids in pending.items():
            its = asked[condition]
            seeds = [_seed(params.seed, condition, i) for i in ids]
            prompts = [its.prompts[i] for i in ids]
            limited = dataclasses.replace(params, max_new_tokens=its.max_new_tokens, stop=its.stop)
            drawn = sampler.sample(prompts, seeds, limited) if ids else ()
            for question, completions in zip(ids, drawn, strict=True):
                add(question, its, completions)
                missing -= 1
                progress(total - missing)
    if samples.unanswered:
        _log.warning(
            f"{samples.unanswered} of {total} prompts were not answered by the server: they are counted apart; run the "
            "same command again to ask for them"
        )
    return samples


def _seed(seed: int, condition: str, question: str) -> int:
    digest = hashlib.sha256(json.dumps([seed, condition, question]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The prompts of one condition by question id, and a hash of each with all that bounds its completions."""

    condition: str
    prompts: dict[str, Prompt]
    hashes: dict[str, str]
    max_new_tokens: int
    stop: tuple[str, ...]

    @classmethod
    def of(cls, exam: Exam, template: PromptTemplate, condition: str, chat: bool) -> "_Asked":
        limits = template.condition(condition)
        prompts = {q.id: prompt_of(q, template, condition, chat=chat) for q in exam.questions}
        bounds = [limits.max_new_tokens, list(limits.stop)]
        hashes = {key: _digest([prompt, *bounds]) for key, prompt in prompts.items()}
        return cls(condition, prompts, hashes, limits.max_new_tokens, limits.stop)

    @property
    def ids(self) -> Collection[str]:
        return self.prompts.keys()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# --- the file --------------------------------------------------------------------------------------------------------


class Samples:
    """The content of a file of samples; see the module's docstring for its form."""

    def __init__(self, file: epath.Path, settings: dict[str, Any], where: str):
        self.file, self.settings, self.where = file, settings, where
        self._lines = [_line({"settings": settings, "where": where})]
        self._by_key: dict[Key, tuple[Completion, ...]] = {}
        self._hashes: dict[Key, str] = {}
        self.unanswered = 0  # prompts that lack a sample

    @property
    def chat(self) -> bool:
        """Whether the prompts were put as chat messages."""
        return self.settings["chat"]

    def of(self, question: str, condition: str) -> tuple[Completion, ...]:
        """The samples of a question under a condition, in the order in which they were drawn."""
        return self._by_key[question, condition]

    @classmethod
    def read(cls, file: epath.Path) -> "Samples | None":
        """What a file holds; None where it is not there. A last line that was not written to its end is left out."""
        if not is_there(file):
            return None
        whole = file.read_bytes().split(b"\n")[:-1]
        if not whole:
            return None
        rows = [parse_row(line, f"{file}:{n}") for n, line in enumerate(whole, 1)]
        settings = rows[0].fields.get("settings")
        expected = {"model", "chat", *_PARAMS}
        if not isinstance(settings, dict) or settings.keys() != expected:
            raise rows[0].error("not the head of a file of samples; give another output, or remove this file")
        for name, kind in (("model", str), ("chat", bool)):
            Row(settings, rows[0].where).get(name, kind)
        build(SamplingParams, {field: settings[name] for name, field in _PARAMS.items()}, rows[0].where)
        samples = cls(file, settings, rows[0].get("where", str))
        for row in rows[1:]:
            samples._take(row)
        samples._lines = [line + b"\n" for line in whole]
        return samples

    def _take(self, row: Row) -> None:
        key = row.get("id", str), row.get("condition", str)
        drawn = row.get("samples", list)
        if len(drawn) != self.settings["samples"]:
            raise row.error(f"{len(drawn)} samples where {self.settings['samples']} were drawn: remove this line")
        parts = [Row(each, row.where) if isinstance(each, dict) else row for each in drawn]
        self._by_key[key] = tuple(
            Completion(part.get("text", str), finish_reason_of(part.get("finish_reason", str))) for part in parts
        )
        self._hashes[key] = row.get("prompt_hash", str)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """UserError where these are not the settings that the file's samples were drawn with."""
        differing = [
            f"{name} was {_short(value)} and is now {_short(settings[name])}"
            for name, value in self.settings.items()
            if value != settings[name]
        ]
        if differing:
            raise UserError(
                f"the samples in {self.file} ({self.where}) were drawn otherwise: {'; '.join(differing)}; "
                "set it back, give another output, or --resample to forget them"
            )

    def holds(self, question: str, asked: _Asked) -> bool:
        """Whether the samples of a prompt are there; UserError where they are of another prompt."""
        found = self._hashes.get((question, asked.condition))
        if found is not None and found != asked.hashes[question]:
            raise UserError(
                f"the samples of {question} ({asked.condition}) in {self.file} are of another prompt, or other "
                "limits: set exam and template back, give another output, or --resample to forget all"
            )
        return found is not None

    def appending(self) -> "_Appending":
        """A context that gives a function to add the samples of a prompt by."""
        return _Appending(self)

    def _add(self, question: str, asked: _Asked, drawn: Sequence[Completion]) -> bytes:
        """The line of the file that holds the samples; b"" where the server did not give them all."""
        key = question, asked.condition
        # A server can send half of a surrogate pair, which is no text.
        self._by_key[key] = tuple(Completion(_HALF.sub("\ufffd", each.text), each.finish_reason) for each in drawn)
        self._hashes[key] = asked.hashes[question]
        if any(each.finish_reason == UNANSWERED for each in drawn):
            self.unanswered += 1
            return b""
        row = {"id": question, "condition": asked.condition, "prompt_hash": self._hashes[key]}
        texts = [{"text": each.text, "finish_reason": each.finish_reason} for each in self._by_key[key]]
        self._lines.append(_line(row | {"samples": texts}))
        return self._lines[-1]


class _Appending:
    """Writes samples as they are added: line by line, or in a bucket, where nothing can be appended to, all anew.

    Anew after every fiftieth more, so that an interruption costs little and all the writing is a multiple of the file.
    """

    def __init__(self, samples: Samples):
        self._samples, self._unwritten = samples, 0

    def __enter__(self) -> Callable[[str, _Asked, Sequence[Completion]], None]:
        self._samples.file.parent.mkdir(parents=True, exist_ok=True)
        # Written anew, without the torn line that an interrupted run may have left.
        self._file = AppendedFile(self._samples.file, self._samples._lines)
        return self._add

    def __exit__(self, *_: object) -> None:
        if self._unwritten:
            self._file.flush()

    def _add(self, question: str, asked: _Asked, drawn: Sequence[Completion]) -> None:
        line = self._samples._add(question, asked, drawn)
        if not line:
            return
        self._file.add(line)
        self._unwritten += 1
        if self._unwritten >= max(10, len(self._samples._lines) // 50):
            self._file.flush()
            self._unwritten = 0


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."

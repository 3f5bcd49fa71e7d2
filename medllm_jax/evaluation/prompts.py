"""Prompt templates: how a question is put to a model under each of the two conditions.

The conditions are those whose difference the exam score is read for: `answer_only` asks for the letters at once,
`explain` asks for an explanation first.
"""

import dataclasses
import re
import string
from collections.abc import Collection
from typing import Any

import yaml
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import LETTERS, Question

CONDITIONS = ("answer_only", "explain")
Prompt = str | list[dict[str, str]]  # text to continue, or chat messages to answer

_TEMPLATES = epath.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Shot:
    """A solved example; `answer` is the letters, or the number."""

    question: str
    choices: tuple[str, ...]
    answer: tuple[str, ...]
    explanation: str = ""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What one condition adds after a question.

    `cue` ends the prompt, and the model's text follows it directly; `solution` is what follows the cue in a solved
    example ({answer}, {explanation}). `max_new_tokens` counts tokens.
    """

    cue: str
    solution: str
    stop: tuple[str, ...]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Texts with placeholders: `question` and `number_question` may use {question}, {choices}, {letters} and {k};
    `choice`, the form of one choice, {letter} and {text}. `number_question` is for questions without choices.
    """

    name: str
    question: str
    number_question: str
    choice: str
    conditions: dict[str, Condition]
    system: str = ""
    shots: tuple[Shot, ...] = ()

    def render(self, question: Question, condition: str) -> str:
        """The whole prompt as plain text, for a model that continues it.

        Raises:
          UserError: the template does not have the condition.
        """
        chosen = self.condition(condition)
        parts = [self.system] if self.system else []
        parts += [f"{self._ask(s.question, s.choices, len(s.answer))}\n{_solved(chosen, s)}" for s in self.shots]
        parts.append(f"{self._ask(question.text, question.choices, question.k)}\n{chosen.cue}")
        return "\n\n".join(parts)

    def render_messages(self, question: Question, condition: str) -> list[dict[str, str]]:
        """The same prompt as chat messages: the examples are earlier turns, and a cue ends each of the user's."""
        chosen = self.condition(condition)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for shot in self.shots:
            asked = self._ask(shot.question, shot.choices, len(shot.answer))
            messages.append({"role": "user", "content": f"{asked}\n{chosen.cue}"})
            messages.append({"role": "assistant", "content": _solved(chosen, shot).removeprefix(chosen.cue).strip()})
        asked = self._ask(question.text, question.choices, question.k)
        return [*messages, {"role": "user", "content": f"{asked}\n{chosen.cue}"}]

    def solve(self, question: Question, letters: Collection[str], condition: str, explanation: str = "") -> str:
        """What follows the prompt where these letters are the answer; for a number, which has none, the gold one."""
        if not question.choices:
            answers = [question.numbers[-1]]
        elif "{letter}" in self.choice:
            answers = sorted(letters)
        else:  # the template answers with the choice's words
            answers = [question.choices[LETTERS.index(letter)] for letter in sorted(letters)]
        return self.condition(condition).solution.format(answer=",".join(answers), explanation=explanation)

    def condition(self, name: str) -> Condition:
        """The settings of a condition; UserError where the template lacks it."""
        if name not in self.conditions:
            raise UserError(f"template {self.name!r} has no condition {name!r}; it has {', '.join(self.conditions)}")
        return self.conditions[name]

    def _ask(self, text: str, choices: tuple[str, ...], k: int) -> str:
        lines = [self.choice.format(letter=letter, text=c) for letter, c in zip(LETTERS, choices, strict=False)]
        form = self.question if choices else self.number_question
        letters = ",".join(LETTERS[: len(choices)])
        return form.format(question=text, choices="\n".join(lines), letters=letters, k=k).rstrip("\n")


def _solved(condition: Condition, shot: Shot) -> str:
    solution = condition.solution.format(answer=",".join(shot.answer), explanation=shot.explanation)
    return f"{condition.cue}{solution}".rstrip("\n")


# --- reading ---------------------------------------------------------------------------------------------------------


def load_template(name_or_path: epath.PathLike) -> PromptTemplate:
    """Reads a template: one that comes with the project by its name ("igakuqa", "plain"), or a YAML file by its path.

    Raises:
      UserError: there is none, or it has unknown or missing keys, wrong types, or unknown placeholders.
    """
    shipped = sorted(p.name.removesuffix(".yaml") for p in _TEMPLATES.iterdir() if p.name.endswith(".yaml"))
    file = _TEMPLATES / f"{name_or_path}.yaml" if str(name_or_path) in shipped else epath.Path(name_or_path)
    if not file.is_file():
        raise UserError(
            f"no prompt template {str(name_or_path)!r}; give {', '.join(shipped)}, or the path of a YAML file"
        )
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not YAML ({getattr(e, 'problem', None) or e})") from e
    return _template(_Reader(content, str(file)), file.name.removesuffix(".yaml"))


class _Reader:
    """A YAML mapping whose keys are all asked for, and whose mistakes name the file and the key."""

    def __init__(self, content: Any, where: str):
        if not isinstance(content, dict):
            raise UserError(f"{where}: a mapping of keys to values was expected")
        self.content, self.where = content, where
        self._asked: set[str] = set()

    def get(self, key: str, expected: type, default: Any = None) -> Any:
        """The value; without a default the key must be there."""
        self._asked.add(key)
        if key not in self.content:
            if default is None:
                raise UserError(f"{self.where}: the key {key!r} is missing")
            return default
        value = self.content[key]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key!r} is {type(value).__name__}; {expected.__name__} was expected")
        return value

    def text(self, key: str, placeholders: str = "", default: str | None = None) -> str:
        """A text whose only placeholders are the given ones."""
        value = self.get(key, str, default)
        allowed = placeholders.split()
        try:
            fields = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(value) if name is not None]
        except ValueError as e:
            raise UserError(f"{self.where}: {key!r}: {e}; write {{{{ and }}}} for plain braces") from e
        for name, spec, conversion in fields:
            if name not in allowed or spec or conversion:
                known = ", ".join(f"{{{a}}}" for a in allowed) or "none"
                raise UserError(f"{self.where}: {key!r} has the unknown placeholder {{{name}}}; known are {known}")
        return value

    def strings(self, key: str, default: list | None = None) -> tuple[str, ...]:
        values = self.get(key, list, default)
        if not all(isinstance(v, str) and v for v in values):
            raise UserError(f"{self.where}: {key!r} must be a list of non-empty strings")
        return tuple(values)

    def done(self) -> None:
        if unknown := sorted(map(str, self.content.keys() - self._asked)):
            raise UserError(f"{self.where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(self._asked))}")


def _template(reader: _Reader, name: str) -> PromptTemplate:
    asked = "question choices letters k"
    conditions = _Reader(reader.get("conditions", dict), f"{reader.where}: conditions")
    shots = [_Reader(s, f"{reader.where}: shots[{i}]") for i, s in enumerate(reader.get("shots", list, []))]
    template = PromptTemplate(
        name=reader.get("name", str, name),
        system=reader.get("system", str, "").rstrip("\n"),
        question=reader.text("question", asked),
        number_question=reader.text("number_question", "question"),
        choice=reader.text("choice", "letter text", "{letter}: {text}"),
        shots=tuple(map(_shot, shots)),
        conditions={
            key: _condition(_Reader(conditions.get(key, dict), f"{conditions.where}: {key}"))
            for key in CONDITIONS
            if key in conditions.content
        },
    )
    reader.done()
    if not template.conditions or conditions.content.keys() - set(CONDITIONS):
        found = ", ".join(map(str, conditions.content)) or "none"
        raise UserError(f"{conditions.where}: found {found}; {' and '.join(CONDITIONS)} (or one of them) were expected")
    for form, key in ((template.question, "question"), (template.number_question, "number_question")):
        if "{question}" not in form:
            raise UserError(f"{reader.where}: {key!r} lacks the placeholder {{question}}")
    return template


def _condition(reader: _Reader) -> Condition:
    condition = Condition(
        cue=reader.text("cue"),
        solution=reader.text("solution", "answer explanation", " {answer}"),
        stop=reader.strings("stop", []),
        max_new_tokens=reader.get("max_new_tokens", int),
    )
    reader.done()
    if condition.max_new_tokens < 1:
        raise UserError(f"{reader.where}: 'max_new_tokens' is {condition.max_new_tokens}; at least 1 was expected")
    return condition


def _shot(reader: _Reader) -> Shot:
    shot = Shot(
        question=reader.get("question", str).rstrip("\n"),
        choices=reader.strings("choices", []),
        answer=tuple(part for part in re.split(r"\s*,\s*", reader.get("answer", str).strip()) if part),
        explanation=reader.get("explanation", str, "").rstrip("\n"),
    )
    reader.done()
    if not shot.answer or (shot.choices and not set(shot.answer) <= set(LETTERS[: len(shot.choices)])):
        raise UserError(f"{reader.where}: 'answer' must be letters of the choices, such as 'a' or 'a,c'")
    return shot

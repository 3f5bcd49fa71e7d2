"""Prompt templates: how a question is put to a model under each of the two conditions.

The conditions are those whose difference the exam score is read for: `answer_only` asks for the letters at once,
`explain` asks for an explanation first.
"""

import dataclasses
import re
import string
from collections.abc import Collection
from typing import Any

from etils import epath

from medllm_jax.config.schema_reader import build, read_yaml_file
from medllm_jax.errors import UserError, quoted
from medllm_jax.evaluation.exam import LETTERS, Question
from medllm_jax.ranges import NewTokens, Ranged

CONDITIONS = ("answer_only", "explain")
Prompt = str | list[dict[str, str]]  # text to continue, or chat messages to answer

_TEMPLATES = epath.Path(__file__).parent / "templates"
_DEMO = epath.Path(__file__).parents[1] / "recipes" / "demo" / "template.yaml"  # the world's, and part of its recipe


@dataclasses.dataclass(frozen=True)
class Shot:
    """A solved example; `answer` is the letters, or the number."""

    question: str
    choices: tuple[str, ...]
    answer: tuple[str, ...]
    explanation: str = ""


@dataclasses.dataclass(frozen=True)
class Condition(Ranged):
    """What one condition adds after a question.

    `cue` ends the prompt, and the model's text follows it directly; `solution` is what follows the cue in a solved
    example ({answer}, {explanation}). `max_new_tokens` counts tokens.
    """

    cue: str
    max_new_tokens: NewTokens
    solution: str = " {answer}"
    stop: tuple[str, ...] = ()


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

    def explained(self, output: str) -> str:
        """A model's output to the explain prompt up to its answer: the explanation, and what leads to the answer."""
        before, turn = self._around_explanation()
        explanation, answered, _ = output.rpartition(turn.strip())
        return f"{before}{(explanation if answered else output).strip()}{turn.rstrip()}"

    def solve_explained(self, question: Question, letters: Collection[str]) -> str:
        """What follows `explained` where these letters are the answer."""
        before, turn = self._around_explanation()
        return self.solve(question, letters, "explain").removeprefix(f"{before}{turn.rstrip()}")

    def _around_explanation(self) -> tuple[str, str]:
        """What stands before an explanation, and between it and the answer; UserError where that is not told apart."""
        before, explained, rest = self.condition("explain").solution.partition("{explanation}")
        turn, answered, _ = rest.partition("{answer}")
        if not explained or not answered or not turn.strip():
            raise UserError(
                f"template {quoted(self.name)}: its explain solution is {quoted(before + explained + rest, str)}; "
                "{explanation}, then text such as a cue, then {answer} were expected"
            )
        return before.format(), turn.format()

    def condition(self, name: str) -> Condition:
        """The settings of a condition; UserError where the template lacks it."""
        if name not in self.conditions:
            raise UserError(
                f"template {quoted(self.name)} has no condition {quoted(name)}; it has {', '.join(self.conditions)}"
            )
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
    """Reads a template: one that comes with the project by its name ("igakuqa", "plain", "demo"), or a YAML file.

    Raises:
      UserError: there is none, or it has unknown or missing keys, wrong types, or unknown placeholders.
    """
    shipped = {p.name.removesuffix(".yaml"): p for p in _TEMPLATES.iterdir() if p.name.endswith(".yaml")}
    shipped["demo"] = _DEMO
    file = shipped.get(str(name_or_path)) or epath.Path(name_or_path)
    if not file.is_file():
        raise UserError(
            f"no prompt template {quoted(str(name_or_path), most=300)}; "
            f"give {', '.join(sorted(shipped))}, or the path of a YAML file"
        )
    return _template(read_yaml_file(file), str(file), file.name.removesuffix(".yaml"))


@dataclasses.dataclass(frozen=True)
class _TemplateFile:
    """A template as its file has it; see `PromptTemplate`."""

    question: str
    number_question: str
    conditions: dict[str, Any]
    name: str | None = None
    system: str = ""
    choice: str = "{letter}: {text}"
    shots: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class _ShotFile:
    """A solved example as its file has it: `answer` is letters such as ``a,c``, or a number."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    explanation: str = ""


def _template(content: Any, where: str, name: str) -> PromptTemplate:
    file = build(_TemplateFile, content, where)
    _check_placeholders(where, "question", file.question, "question choices letters k")
    _check_placeholders(where, "number_question", file.number_question, "question")
    _check_placeholders(where, "choice", file.choice, "letter text")
    if not file.conditions or file.conditions.keys() - set(CONDITIONS):
        found = quoted(", ".join(map(str, file.conditions)) or "none", str)
        raise UserError(
            f"{where}: conditions: found {found}; {' and '.join(CONDITIONS)} (or one of them) were expected"
        )
    for form, key in ((file.question, "question"), (file.number_question, "number_question")):
        if "{question}" not in form:
            raise UserError(f"{where}: {key!r} lacks the placeholder {{question}}")
    return PromptTemplate(
        name=name if file.name is None else file.name,
        system=file.system.rstrip("\n"),
        question=file.question,
        number_question=file.number_question,
        choice=file.choice,
        shots=tuple(_shot(shot, f"{where}: shots[{number}]") for number, shot in enumerate(file.shots)),
        conditions={
            key: _condition(file.conditions[key], f"{where}: conditions: {key}")
            for key in CONDITIONS
            if key in file.conditions
        },
    )


def _condition(content: Any, where: str) -> Condition:
    condition = build(Condition, content, where)
    _check_placeholders(where, "cue", condition.cue, "")
    _check_placeholders(where, "solution", condition.solution, "answer explanation")
    _check_no_empty_text(where, "stop", condition.stop)
    return condition


def _shot(content: Any, where: str) -> Shot:
    file = build(_ShotFile, content, where)
    _check_no_empty_text(where, "choices", file.choices)
    answer = tuple(part for part in re.split(r"\s*,\s*", file.answer.strip()) if part)
    if not answer or (file.choices and not set(answer) <= set(LETTERS[: len(file.choices)])):
        raise UserError(f"{where}: 'answer' must be letters of the choices, such as 'a' or 'a,c'")
    return Shot(file.question.rstrip("\n"), file.choices, answer, file.explanation.rstrip("\n"))


def _check_placeholders(where: str, key: str, text: str, allowed: str) -> None:
    """UserError where a text has other placeholders than the allowed ones."""
    try:
        fields = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(text) if name is not None]
    except ValueError as e:
        raise UserError(f"{where}: {key!r}: {quoted(e, str)}; write {{{{ and }}}} for plain braces") from e
    for name, spec, conversion in fields:
        if name not in allowed.split() or spec or conversion:
            known = ", ".join(f"{{{a}}}" for a in allowed.split()) or "none"
            raise UserError(f"{where}: {key!r} has the unknown placeholder {{{quoted(name, str)}}}; known are {known}")


def _check_no_empty_text(where: str, key: str, texts: Collection[str]) -> None:
    if not all(texts):
        raise UserError(f"{where}: {key!r} must be a list of non-empty strings")

"""Forms of rows: which fields a row has, and what they mean. A row's form is judged from its own fields, by a table."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from medllm_jax.data.prepare.chat_messages import Messages, NotUnderstood, is_nothing, said, with_system
from medllm_jax.data.prepare.examples import ChatExample, Example, TextExample
from medllm_jax.data.prepare.files import Inputs
from medllm_jax.data.prepare.readers import ReadOptions, names_of, read_all_records, text_problem
from medllm_jax.data.prepare.rejections import Reading, Rejected, RejectionCounts, reject
from medllm_jax.errors import UserError

_log = logging.getLogger(__name__)

Sides = tuple[str, ...] | tuple[Messages, ...]
Fields = Mapping[str, Any]

# What changes the meaning of a row, in whatever form. Other fields that a form does not read, such as ids, sources and
# scores, say something about the row; they are left aside, and named when all rows are read.
_MEANINGFUL = (
    "system", "history", "tools", "functions", "images", "image", "videos", "audios", "chat_template_kwargs",
)  # fmt: skip

_OURS = ("id", "condition", "prefers")  # what `medllm pairs` writes beside a pair


class Form(NamedTuple):
    """A form of rows.

    name: as people call it. required: fields that make a row one of this form. read: its sides; raises NotUnderstood.
    optional: fields that are read where they are there. beside: fields of other forms that it repeats, and does not
    read.
    """

    name: str
    required: tuple[str, ...]
    read: Callable[[Fields], Sides]
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def fields(self) -> set[str]:
        return {*self.required, *self.optional}

    def __str__(self) -> str:
        return f"{'+'.join(self.required)} ({self.name})"


class Forms:
    """A table of forms, the first that fits a row first.

    plain: the form that a row is compared with which has fields of none. missing: what is said of a field that lacks.
    columns: field of a form -> the name that it has in the rows at hand; only forms with all of these fields are looked
    for then. chat: strings are turns of a chat, which ``as_chat`` makes of them.

    unread: name -> rows whose field of this name was left aside.

    Raises UserError where no form has the fields of ``columns``.
    """

    def __init__(
        self,
        table: Sequence[Form],
        plain: Form,
        missing: str = "no field `{}`",
        *,
        columns: Mapping[str, str] = {},
        chat: bool = False,
        as_chat: "Callable[[Sides, Fields], tuple[Messages, ...]] | None" = None,
    ):
        self._table = [form for form in table if columns.keys() <= form.fields]
        self._plain, self._missing, self._columns = plain, missing, columns
        self._chat, self._as_chat = chat, as_chat or chat_sides
        if not self._table:
            raise UserError(
                f"--columns {' '.join(f'{field}={name}' for field, name in columns.items())}: no form of rows has the "
                f"field{'s' * (len(columns) > 1)} {names_of(columns)}; the forms: {'; '.join(map(str, table))}"
            )
        known = {field for form in table for field in (*form.fields, *form.beside)} | set(_MEANINGFUL)
        taken = set(columns.values())  # by fields that have another name
        self._known = {field: field for field in sorted(known) if field not in taken} | dict(columns)
        self.unread: Counter[str] = Counter()
        self._alpaca = 0

    @property
    def names(self) -> set[str]:
        """The names of all fields that are looked at."""
        return set(self._known.values())

    @property
    def settings(self) -> dict[str, Any]:
        """What rows depend on beside the table, for a recipe."""
        settings = {"columns": dict(self._columns), "chat": self._chat}
        return {name: value for name, value in settings.items() if value}

    def example(self, row: Fields, where: str) -> Example:
        """The example that a row is; raises NotUnderstood."""
        fields = {field: row[name] for field, name in self._known.items() if row.get(name) is not None}
        form = self._form(fields, row)
        for field in _MEANINGFUL:
            if field not in form.fields and not is_nothing(fields.get(field)):
                raise NotUnderstood(f"`{field}` stands beside {names_of(form.required)}, and is not read in such rows")
        own = {field: fields[field] for field in (*form.required, *form.optional) if field in fields}
        sides = form.read(own)
        if isinstance(sides[0], str):
            sides = self._strings(sides, own)
        self.unread.update(set(row) - {self._known.get(field) for field in form.fields})
        self._alpaca += "instruction" in own
        if isinstance(sides[0], str):
            return TextExample(sides, where)
        return ChatExample(sides, where)

    def say_what_was_left_aside(self) -> None:
        """Logs the names of fields that no form reads, and what strings have become where that may not be meant."""
        if left := [name for name in self.unread if name not in _OURS]:
            _log.info(f"left aside, since nothing reads them: the fields {names_of(sorted(left))}")
        if self._alpaca and not self._chat:
            _log.info("instructions are plain text; --chat writes them by the tokenizer's chat template")

    def _form(self, fields: Fields, row: Fields) -> Form:
        fitting = [form for form in self._table if fields.keys() >= set(form.required)]
        if not fitting:
            # Of two that are equally near, the plain one; a row of none is told what that one lacks.
            near = max(self._table, key=lambda form: (len(fields.keys() & set(form.required)), form is self._plain))
            lacking = next(field for field in near.required if field not in fields)
            name = self._columns.get(lacking, lacking)
            raise NotUnderstood(self._missing.format(name), self._hint(row))
        form = fitting[0]
        for other in fitting[1:]:
            if not self._columns and not set(other.required) <= {*form.fields, *form.beside}:
                raise NotUnderstood(f"a row of two forms, {form} and {other}", "name the fields to read with --columns")
        return form

    def _hint(self, row: Fields) -> str:
        there = f"it has {names_of(row)}" if row else "it has no field"
        example = f"--columns {self._plain.required[0]}=FIELD {self._plain.required[-1]}=FIELD"
        return f"{there}, and these are read: {'; '.join(map(str, self._table))}; {example} names other fields"

    def _strings(self, sides: Sides, fields: Fields) -> Sides:
        """Sides of strings, as a chat where that is asked for; what only a chat can hold is refused elsewhere."""
        for field in ("system", "history"):
            if not self._chat and not is_nothing(fields.get(field)):
                raise NotUnderstood(
                    f"`{field}` stands beside plain strings, and only a chat can hold it",
                    "--chat writes the strings as turns of a chat, by the tokenizer's chat template",
                )
        return self._as_chat(sides, fields) if self._chat else sides


def chat_sides(sides: Sides, fields: Fields) -> tuple[Messages, ...]:
    """Strings, a prompt and responses, as the turns of a chat, with what went before (``system``, ``history``)."""
    prompt, *responses = sides
    before = [
        said(role, text) for turn in _turns(fields.get("history")) for role, text in zip(_TURN, turn, strict=True)
    ]
    prompts = with_system([*before, said("user", str(prompt))], fields.get("system"))
    return prompts, *([said("assistant", str(response))] for response in responses)


_TURN = ("user", "assistant")


def _turns(history: Any) -> Iterator[list[str]]:
    if is_nothing(history):
        return
    if not isinstance(history, list):
        raise NotUnderstood("history is not a list of turns, two texts each")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or any(map(text_problem, turn)):
            raise NotUnderstood("history is not a list of turns, two texts each")
        yield turn


def text_sides(fields: Fields, names: Sequence[str]) -> tuple[str, ...]:
    """Fields that are texts; raises NotUnderstood."""
    for name in names:
        if problem := text_problem(fields[name]):
            raise NotUnderstood(f"{name} is {problem}")
    return tuple(fields[name] for name in names)


def alpaca_prompt(fields: Fields) -> str:
    """``instruction`` and the ``input`` that it is about, each on lines of its own; raises NotUnderstood."""
    parts = [fields["instruction"], *([] if is_nothing(fields.get("input")) else [fields["input"]])]
    for name, part in zip(("instruction", "input"), parts, strict=False):
        if problem := text_problem(part):
            raise NotUnderstood(f"{name} is {problem}")
    return "\n".join(parts)


def read_rows(inputs: Inputs, forms: Forms, reading: Reading, rejections: RejectionCounts) -> Iterator[Example]:
    """The examples of all inputs (see ``readers.read_all_records``), in order, one in memory at a time.

    A row that is none is rejected, see ``reject``.
    """
    for row, where in read_all_records(inputs, ReadOptions(on_bad=reading), rejections, forms.names):
        try:
            example = forms.example(row, where)
        except NotUnderstood as problem:
            reject(Rejected(where, str(problem), hint=problem.hint), reading, rejections)
        else:
            yield example

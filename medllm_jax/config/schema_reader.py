"""YAML and JSON as dataclasses: the one reader of configs, rounds, corpora, prompt templates and PII patterns.

A dataclass is the schema: `build` checks every key and type against it, and an error is one line that names the place,
the key and what would be right. Two entries of a field's metadata are read here:

* ``alias``     the key in the file, where the field's own name can't be one (``except`` is a word of Python)
* ``formerly``  an older key, which is accepted and means the same

Values are as strict as JSON: text is not a number, 1 is not true, and a list is a list. Importing this module does not
import pydantic, which takes as long as all of `--help`.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml

from medllm_jax.errors import UserError, quoted

if typing.TYPE_CHECKING:
    from etils import epath
    from pydantic import TypeAdapter

Schema = TypeVar("Schema")

# Halves of characters, which no file can hold, and NUL, which no path can.
_NOT_TEXT = re.compile("[\\0\ud800-\udfff]")


# --- YAML ------------------------------------------------------------------------------------------------------------


# The parser is written in Python: a value takes it 40 microseconds. Configs have a depth of 4.
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 2**20, 100_000, 32
_MAX_DIGITS = 60  # of a whole number; which numbers are right, their ranges say


class StrictLoader(yaml.SafeLoader):
    """YAML of text, numbers, truth values, null, lists and mappings by text; everything else is an error with its line.

    `1e-5` is a number, a date is text, and a key that stands twice is an error. So is what aliases (`*name`) would make
    larger than a file may be.
    """

    def __init__(self, text: str):
        if len(text) > _MAX_BYTES:
            raise yaml.YAMLError(f"more than {_MAX_BYTES:,} characters")
        super().__init__(text)
        self._depth = self._values = self._repeated = 0
        self._sizes: dict[str, int] = {}  # characters that an anchor (`&name`) stands for, once it is whole

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _problem(f"more than {_MAX_VALUES:,} values", event)
        if self._depth == _MAX_DEPTH:
            raise _problem(f"nested more than {_MAX_DEPTH} deep", event)
        if getattr(event, "tag", None) not in (None, "!", "tag:yaml.org,2002:str"):
            raise _problem(f"the tag {quoted(event.tag)} is not read here: write a plain value", event)
        repeated_before = self._repeated
        alias = isinstance(event, yaml.AliasEvent)
        if alias and event.anchor in self.anchors:
            self._repeated += self._sizes.get(event.anchor, _MAX_BYTES)  # one that stands in itself has no end
            if self._repeated >= _MAX_BYTES:
                raise _problem(f"the alias {quoted(event.anchor)} repeats too much: write the values out", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node and event.anchor and not alias:
            written = node.end_mark.index - node.start_mark.index
            self._sizes[event.anchor] = 1 + written + self._repeated - repeated_before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key is text, and neither a list nor a mapping", key_node)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _problem(f"the key {quoted(key)} stands twice; keep one", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS // 2:
            raise _problem(f"{quoted(node.value, str)} is too large for a whole number", node)
        return self.construct_yaml_int(node)


def _problem(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_whole_number)
# What a plain value is by its form; everything else is text. Not here are YAML 1.1's dates, numbers to the base of 60
# (`1:30` is 90) and octal ones (`010` is 8), nor `<<` and `=`.
StrictLoader.yaml_implicit_resolvers = {}
for kind, form, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]*[0-9a-fA-F][0-9a-fA-F_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(([0-9][0-9_]*)?\.[0-9][0-9_]*|[0-9][0-9_]*\.)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{form})$"), first)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    return yaml.load(text, StrictLoader)  # a SafeLoader


def read_yaml_file(path: "str | Path | epath.Path") -> Any:
    """The value in a YAML file.

    Raises:
      UserError: it is no file that can be read, or more than a megabyte, malformed, not UTF-8, or has a key twice;
        names the file and the line.
    """
    text = _text_of(Path(path) if isinstance(path, str) else path)
    try:
        return parse_yaml(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{path}:{line}: not YAML (the character {chr(error.character)!r} can't be in it)") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = quoted(error.problem, str, most=120)
        in_syntax = not isinstance(error, yaml.constructor.ConstructorError)
        raise UserError(f"{path}{line}: {f'not YAML ({problem})' if in_syntax else problem}") from None


def _text_of(file: "Path | epath.Path") -> str:
    problem = _not_readable(Path(file)) if "://" not in os.fspath(file) else None
    if problem:
        raise UserError(f"{quoted(file, str, most=300)} {problem}: a YAML file is expected")
    with file.open("rb") as content:
        data = content.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(f"{file} has more than {_MAX_BYTES:,} bytes: so large a file is no config")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}") from None


def _not_readable(file: Path) -> str | None:
    """Why a local path is no file that can be read; None where it is one."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing" if file.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        return f"can't be read ({getattr(error, 'strerror', None) or error})"
    if not stat.S_ISREG(mode):
        return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
    return None if os.access(file, os.R_OK) else "can't be read (permission denied)"


def read_yaml(path: "str | Path | epath.Path") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
      UserError: the file can't be read (see `read_yaml_file`), or holds no mapping.
    """
    content = read_yaml_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of settings is expected, found {type(content).__name__}")
    return content


# --- dataclasses -----------------------------------------------------------------------------------------------------


def build(cls: type[Schema], settings: Any, where: str) -> Schema:
    """An instance of a dataclass from nested plain values.

    Raises:
      UserError: a key is unknown or missing, or a value has another type; names ``where``, the dotted key, and the
        likely key where one is unknown. What `__post_init__` of the dataclass raises is named with ``where`` too.
    """
    import pydantic

    current: dict[str, Any] = {}
    try:
        current = _current_keys(cls, settings, list(dotted_keys(cls)), getattr(cls, "NAMES_ELSEWHERE", {}))
        # Strict in JSON means what YAML means: a mapping is a dataclass there, and a list a tuple.
        return _adapter(cls).validate_json(json.dumps(current), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise UserError(f"{where}: {_first_problem(cls, current, found)}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@functools.cache
def _adapter(cls: type[Schema]) -> "TypeAdapter[Schema]":
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def rename_old_keys(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which some may be missing or unknown, with older keys replaced by today's."""
    renamed = {}
    for key, value in settings.items():
        f = _fields_by_key(cls).get(key)
        section = _section_of(_hints(cls)[f.name])[0] if f else None
        within = rename_old_keys(section, value) if section and isinstance(value, Mapping) else value
        renamed[_key(f) if f else key] = within
    return renamed


def current_key(cls: type, dotted: str) -> str:
    """A dotted key with older names in it replaced by today's."""
    first, dot, rest = dotted.partition(".")
    f = _fields_by_key(cls).get(first)
    if f is None:
        return dotted
    section, _ = _section_of(_hints(cls)[f.name])
    return _key(f) + (dot + current_key(section, rest) if section and dot else dot + rest)


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key that settings may have, sections too, as ``section.key``."""
    for f in _fields(cls):
        yield prefix + _key(f)
        section, _ = _section_of(_hints(cls)[f.name])
        if section:
            yield from dotted_keys(section, f"{prefix}{_key(f)}.")


def documented_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    """Every single setting: its dotted key, its field, and the dataclass that has the field."""
    for f in _fields(cls):
        section, _ = _section_of(_hints(cls)[f.name])
        if section:
            yield from documented_fields(section, f"{prefix}{_key(f)}.")
        else:
            yield prefix + _key(f), f, cls


def metadata_along(cls: type, dotted: str) -> list[Mapping[str, Any]]:
    """The metadata of the fields that a dotted key passes, the innermost last; what is no field is passed over."""
    first, _, rest = dotted.partition(".")
    f = _fields_by_key(cls).get(first)
    if f is None:
        return []
    section, _ = _section_of(_hints(cls)[f.name])
    return [f.metadata, *(metadata_along(section, rest) if section and rest else [])]


def type_name(hint: Any) -> str:
    """A type in words, such as ``a whole number or null``."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (tuple, list):
        return f"a list of {type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping of " + " to ".join(map(type_name, typing.get_args(hint)))
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join("null" if t is type(None) else type_name(t) for t in typing.get_args(hint))
    if hint is Any:
        return "a value"
    return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> text, from the `Attributes:` part of the docstring."""
    _, _, tail = (cls.__doc__ or "").partition("Attributes:")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", tail, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


# --- what `build` checks ---------------------------------------------------------------------------------------------


def likely_key(unknown: str, known: Sequence[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """The key that was probably meant by one that is unknown; None where none is like it.

    elsewhere: what other programs call a setting -> its key here. Then come a key of that last name in another section,
    one in the same section whose words or initials it has, and what is spelt alike.
    """
    section, _, last = unknown.rpartition(".")
    beside = [key for key in known if key.rpartition(".")[0] == section]
    leaf = {key: key.rpartition(".")[2] for key in known}
    if last in elsewhere:
        return elsewhere[last]
    for keys, is_like in (
        (known, lambda name: name == last),
        (beside, lambda name: "".join(word[0] for word in name.split("_")) == last),
        (known if not section else beside, lambda name: len(name) > 3 and f"_{name}_" in f"_{last}_"),
        (beside, lambda name: len(last) > 3 and name.startswith(last)),
    ):
        found = [key for key in keys if is_like(leaf[key])]
        if found:
            return found[0]
    near = difflib.get_close_matches(last, [leaf[key] for key in beside], n=1, cutoff=0.6)
    if near:
        return next(key for key in beside if leaf[key] == near[0])
    return next(iter(difflib.get_close_matches(unknown, known, n=1, cutoff=0.8 if section else 0.5)), None)


def _current_keys(
    cls: type, settings: Any, known: Sequence[str], elsewhere: Mapping[str, str], prefix: str = ""
) -> dict[str, Any]:
    """Settings under today's keys.

    Raises:
      UserError: a key is unknown or given under both its names, or a value is not plain.
    """
    if not isinstance(settings, Mapping):
        within = f"{prefix.rstrip('.')}: " if prefix else ""
        raise UserError(f"{within}a mapping is expected, got {quoted(settings)}")
    current = {}
    for key, value in settings.items():
        f = _fields_by_key(cls).get(key)
        if f is None:
            shown = quoted(key, str)
            near = likely_key(f"{prefix}{shown}", known, elsewhere)
            beside = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
            hint = f"did you mean {near}?" if near else f"known keys: {', '.join(k for k in beside if '.' not in k)}"
            raise UserError(f"unknown key {prefix}{shown}: {hint}")
        if _key(f) in current:
            raise UserError(f"{prefix}{f.metadata['formerly']} is the older name of {prefix}{_key(f)}: keep one")
        hint = _hints(cls)[f.name]
        section, optional = _section_of(hint)
        if section and not (optional and value is None):
            value = _current_keys(section, value, known, elsewhere, f"{prefix}{_key(f)}.")
        elif not _is_plain(value):
            if isinstance(value, Mapping) and not all(isinstance(name, str) for name in value):
                raise UserError(f"{prefix}{_key(f)}: a name in it is not text; write it in quotes")
            raise UserError(f"{prefix}{_key(f)}: expected {type_name(hint)}, got {quoted(value)}")
        current[_key(f)] = value
    return current


def _first_problem(cls: type, settings: Mapping[str, Any], problems: Sequence[Any]) -> str:
    """The first of pydantic's errors in our words; what is missing comes before what is wrong."""
    problem = next((each for each in problems if each["type"] == "missing"), problems[0])
    owner: Any = cls
    value: Any = settings
    keys, hint = [], None
    for part in problem["loc"]:
        f = _fields_by_key(owner).get(part) if isinstance(owner, type) and dataclasses.is_dataclass(owner) else None
        if f is None:
            break
        keys.append(_key(f))
        hint = _hints(owner)[f.name]
        owner, _ = _section_of(hint)
        value = value.get(_key(f)) if isinstance(value, Mapping) else value
    key = ".".join(keys)
    if problem["type"] == "missing":
        return f"{key} is not set: it has no default"
    return f"{key}: expected {type_name(hint)}, got {'null' if value is None else quoted(value)}"


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is one of JSON, but NaN, which equals nothing, not even itself, and text of no file."""
    if depth > _MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(key) and _is_plain(v, depth + 1) for key, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, str):
        return not _NOT_TEXT.search(value)
    if isinstance(value, float):
        return not math.isnan(value)
    return value is None or (isinstance(value, int) and abs(value) < 10**_MAX_DIGITS)


# --- dataclasses' fields ---------------------------------------------------------------------------------------------


_UNIONS = (types.UnionType, typing.Union)  # `Annotated[int, ...] | None` is of the second kind


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of fields, without their ranges."""
    return typing.get_type_hints(cls)


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)


def _key(f: dataclasses.Field) -> str:
    return f.metadata.get("alias", f.name)


@functools.cache
def _fields_by_key(cls: type) -> dict[str, dataclasses.Field]:
    """Fields by the keys that name them, older ones too."""
    older = {f.metadata["formerly"]: f for f in _fields(cls) if "formerly" in f.metadata}
    return older | {_key(f): f for f in _fields(cls)}


def _section_of(hint: Any) -> tuple[type | None, bool]:
    """The dataclass behind a field's type, if it is one, and whether the field may be null."""
    options = typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)
    section = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return section if isinstance(section, type) else None, type(None) in options

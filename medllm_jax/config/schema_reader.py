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
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from medllm_jax.errors import UserError

if typing.TYPE_CHECKING:
    from etils import epath
    from pydantic import TypeAdapter

Schema = TypeVar("Schema")


# --- YAML ------------------------------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """YAML 1.1, but `1e-5` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    return yaml.load(text, StrictLoader)  # a SafeLoader


def read_yaml_file(path: "str | Path | epath.Path") -> Any:
    """The value in a YAML file that is there.

    Raises:
      UserError: it is malformed, not UTF-8, or has a key twice; names the file and the line.
    """
    file = Path(path) if isinstance(path, str) else path
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        in_syntax = not isinstance(error, yaml.constructor.ConstructorError)
        raise UserError(f"{path}{line}: {f'not YAML ({problem})' if in_syntax else problem}") from None


def read_yaml(path: "str | Path | epath.Path") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
      UserError: the file is missing, malformed, not UTF-8, has a key twice, or holds no mapping.
    """
    file = Path(path) if isinstance(path, str) else path
    if not file.exists():
        raise UserError(f"config file {path} does not exist")
    content = read_yaml_file(file)
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
        current = _current_keys(cls, settings, known=list(dotted_keys(cls)))
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
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if t is type(None) else type_name(t) for t in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> text, from the `Attributes:` part of the docstring."""
    _, _, tail = (cls.__doc__ or "").partition("Attributes:")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", tail, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


# --- what `build` checks ---------------------------------------------------------------------------------------------


def _current_keys(cls: type, settings: Any, known: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Settings under today's keys.

    Raises:
      UserError: a key is unknown or given under both its names, or a value is not plain.
    """
    if not isinstance(settings, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'the config'}: a mapping is expected, got {settings!r}")
    current = {}
    for key, value in settings.items():
        f = _fields_by_key(cls).get(key)
        if f is None:
            near = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0.5)
            beside = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(k for k in beside if '.' not in k)}"
            raise UserError(f"unknown key {prefix}{key}: {hint}")
        if _key(f) in current:
            raise UserError(f"{prefix}{f.metadata['formerly']} is the older name of {prefix}{_key(f)}: keep one")
        hint = _hints(cls)[f.name]
        section, optional = _section_of(hint)
        if section and not (optional and value is None):
            value = _current_keys(section, value, known, f"{prefix}{_key(f)}.")
        elif not _is_plain(value):
            if isinstance(value, Mapping) and not all(isinstance(name, str) for name in value):
                raise UserError(f"{prefix}{_key(f)}: a name in it is not text; write it in quotes")
            raise UserError(f"{prefix}{_key(f)}: expected {type_name(hint)}, got {value!r}")
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
    return f"{key}: expected {type_name(hint)}, got {'null' if value is None else repr(value)}"


def _is_plain(value: Any) -> bool:
    """Whether a value is one of JSON, NaN excepted: it equals nothing, not even itself."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or (
        isinstance(value, str | int | float) and not (isinstance(value, float) and math.isnan(value))
    )


# --- dataclasses' fields ---------------------------------------------------------------------------------------------


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
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
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    section = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return section if isinstance(section, type) else None, type(None) in options

"""Config dataclasses from YAML and `--a.b value` overrides, and back; every key and type is checked.

Nothing here touches JAX, so `--help` and config errors are quick.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from medllm_jax.config.schema import ModelConfig, RunConfig
from medllm_jax.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1, but `1e-5` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Any) -> dict[str, Any]:
    """The mapping in a YAML file (a path, local or an epath); UserError if missing, malformed, or with a key twice."""
    path = Path(path) if isinstance(path, str) else path
    if not path.exists():
        raise UserError(f"config file {path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of settings is expected, found {type(content).__name__}")
    return content


def load_run_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A RunConfig from a YAML file and `--a.b value` overrides, which win.

    `model:` may name a model file, relative to the config file (or, as an override, to the working directory).
    """
    settings = read_yaml(path)
    settings["model"] = _model_section(settings.get("model"), Path(path).parent)
    for key, value in _parse_overrides(overrides):
        if key == "model":
            value = _model_section(value, Path.cwd())
        _set_dotted(settings, key, value)
    return build(RunConfig, settings, where=str(path))


def load_model_config(path: str | Path) -> ModelConfig:
    """A ModelConfig from a YAML file such as configs/model/qwen2.5-7b.yaml."""
    return build(ModelConfig, read_yaml(path), where=str(path))


def _model_section(value: Any, folder: Path) -> Any:
    return read_yaml(folder / value) if isinstance(value, str) else value


def _parse_overrides(arguments: typing.Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise UserError(f"unexpected argument {name!r}: settings are given as --section.key value")
        if not equals:
            if not rest:
                raise UserError(f"{name} has no value")
            value = rest.pop(0)
        try:
            pairs.append((name[2:], yaml.load(value, _StrictLoader)))
        except yaml.YAMLError:
            pairs.append((name[2:], value))
    return pairs


def _set_dotted(settings: dict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(settings.get(section), dict):
            settings[section] = {}
        settings = settings[section]
    settings[last] = value


def build(cls: type, settings: dict[str, Any], where: str):
    """An instance of a config dataclass from nested plain values, every key and type checked.

    Raises UserError naming ``where``, the dotted key, and the likely key where one is unknown.
    """
    known = dict(_dotted_keys(cls))
    for key in _keys_given(cls, settings):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(k for k in known if '.' not in k)}"
            raise UserError(f"{where}: unknown key {key}: {hint}")
    try:
        return _build(cls, settings, prefix="")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _build(cls: type, settings: Any, prefix: str):
    if not isinstance(settings, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'}: a mapping is expected, got {settings!r}")
    hints = typing.get_type_hints(cls)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in settings
    ]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is not set: it has no default")
    values = {}
    for name, value in settings.items():
        section, optional = _section_of(hints[name])
        if section and not (optional and value is None):
            values[name] = _build(section, value, f"{prefix}{name}.")
        else:
            values[name] = _checked(hints[name], value, f"{prefix}{name}")
    return cls(**values)


@functools.cache
def _validator(hint):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _checked(hint: Any, value: Any, key: str) -> Any:
    # A YAML scalar of another kind is a mistake, though a parser of command lines would convert it.
    wanted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) not in wanted:  # which jsonargparse lets pass
        raise UserError(f"{key}: expected {_type_name(hint)}, got null")
    if str in wanted and isinstance(value, str):
        return value
    if str in wanted and value is not None and not isinstance(value, list | tuple):
        raise UserError(f"{key}: expected {_type_name(hint)}, got {value!r}")
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        raise UserError(f"{key}: a name in it is not text; write it in quotes")
    if int in wanted and isinstance(value, bool):
        raise UserError(f"{key}: expected {_type_name(hint)}, got {value!r}")
    try:
        return _validator(hint).parse_object({"value": value}).value
    except Exception:
        raise UserError(f"{key}: expected {_type_name(hint)}, got {value!r}") from None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping of " + " to ".join(map(_type_name, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if t is type(None) else _type_name(t) for t in typing.get_args(hint))
    return {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), str(hint)
    )


def _section_of(hint: Any) -> tuple[type | None, bool]:
    """The dataclass behind a field's type, if it is one, and whether the field may be null."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    section = next((option for option in options if dataclasses.is_dataclass(option)), None)
    return section, type(None) in options


def _dotted_keys(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, dataclasses.Field]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name, f
        section, _ = _section_of(hints[f.name])
        if section:
            yield from _dotted_keys(section, f"{prefix}{f.name}.")


def _keys_given(cls: type, settings: dict, prefix: str = "") -> typing.Iterator[str]:
    hints = typing.get_type_hints(cls)
    for name, value in settings.items():
        yield f"{prefix}{name}"
        section, _ = _section_of(hints[name]) if name in hints else (None, False)
        if section and isinstance(value, dict):
            yield from _keys_given(section, value, f"{prefix}{name}.")


def to_plain(config: Any) -> dict[str, Any]:
    """Nested plain values: what YAML and JSON hold; `build(type(config), to_plain(config))` gives it back."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def describe(cls: type = RunConfig) -> str:
    """Every setting with its type, default and meaning, one a line: the tail of `medllm train --help`."""
    lines = []
    for key, f, owner in _documented_fields(cls):
        hint = typing.get_type_hints(owner)[f.name]
        if f.default is not dataclasses.MISSING:
            default = "null" if f.default is None else str(f.default).lower() if f.type is bool else f.default
            default = f" (default {default})"
        else:
            default = " (required)"
        lines.append(f"  {key}: {_type_name(hint)}{default}\n      {_field_docs(owner).get(f.name, '')}")
    return "\n".join(lines)


def _documented_fields(cls: type, prefix: str = ""):
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        section, _ = _section_of(hints[f.name])
        if section:
            yield from _documented_fields(section, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, cls


def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> text, from the `Attributes:` part of the docstring."""
    _, _, tail = (cls.__doc__ or "").partition("Attributes:")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", tail, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}

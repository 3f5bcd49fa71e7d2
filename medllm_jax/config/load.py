"""Configs of runs and models from files or by the names of shipped ones, with `--a.b value` overrides, and back.

Nothing here touches JAX, so `--help` and config errors are quick.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from medllm_jax.config.schema import ModelConfig, RunConfig
from medllm_jax.config.schema_reader import (
    build,
    current_key,
    documented_fields,
    field_docs,
    parse_yaml,
    read_yaml,
    rename_old_keys,
    type_name,
)
from medllm_jax.config.shipped import CONFIGS, find_config
from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import hints_with_ranges, ranges_in

_COMMENTS = 50  # the column where comments begin, behind values that are not longer
_MAX_DOTS = 10  # in the name of a setting, of which each makes a mapping


def load_run_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A RunConfig from a YAML file and `--a.b value` overrides, which win.

    path: of a file, or the name of a shipped config, such as ``cpt-72b-v5p-4x4x4``. `model:` may be a model file,
    relative to the config file (or, as an override, to the working directory), or the name of a shipped model.
    """
    return _read_run_config(path, overrides)[0]


def run_config_with_origins(path: str | Path, overrides: typing.Sequence[str] = ()) -> str:
    """The config that `load_run_config` makes, as YAML; a comment behind each value says where it came from."""
    config, origins = _read_run_config(path, overrides)
    return "".join(_lines_with_origins(config, origins))


# Dotted key -> where its value came from: a file, an option. What is in a section came from where the section did, if
# it has no entry of its own; what has none came from the defaults.
_Origins = dict[str, str]


def _read_run_config(path: str | Path, overrides: typing.Sequence[str]) -> tuple[RunConfig, _Origins]:
    file = find_config(path, "runs")
    settings = rename_old_keys(RunConfig, read_yaml(file))
    origins = {key: _place(file) for key in _leaves(settings)}
    settings["model"] = _model_section(settings.get("model"), file.parent, origins)
    for key, value in _parse_overrides(overrides):
        option, key = f"--{key}", current_key(RunConfig, key)
        for replaced in [each for each in origins if f"{each}.".startswith(f"{key}.")]:
            del origins[replaced]
        origins[key] = option
        if key == "model":
            value = _model_section(value, Path.cwd(), origins)
        _set_dotted(settings, key, value)
    return build(RunConfig, settings, where=str(path)), origins


def _leaves(settings: typing.Mapping[str, Any], prefix: str = "") -> typing.Iterator[str]:
    """The dotted keys of values that are no mappings."""
    for key, value in settings.items():
        if isinstance(value, typing.Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _lines_with_origins(config: Any, origins: _Origins, prefix: str = "") -> typing.Iterator[str]:
    for f in dataclasses.fields(config):
        value, key, indent = getattr(config, f.name), f"{prefix}{f.name}", "  " * prefix.count(".")
        if dataclasses.is_dataclass(value):
            yield f"{indent}{f.name}:\n"
            yield from _lines_with_origins(value, origins, f"{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
            text = text.removesuffix("\n...\n").strip()
            yield f"{f'{indent}{f.name}: {text}':<{_COMMENTS - 2}}  # {_origin(key, origins)}\n"


def _origin(key: str, origins: _Origins) -> str:
    inside = [origin for each, origin in origins.items() if each.startswith(f"{key}.")]
    if inside and key not in origins:  # a mapping whose entries were given one by one
        return ", ".join(dict.fromkeys(inside))
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "default")


def load_model_config(path: str | Path) -> ModelConfig:
    """A ModelConfig from a YAML file such as configs/model/qwen2.5-7b.yaml, or by a shipped name: ``qwen2.5-7b``."""
    return build(ModelConfig, read_yaml(find_config(path, "model")), where=str(path))


def _model_section(value: Any, folder: Path, origins: _Origins) -> Any:
    """The shape that `model` names, or holds itself."""
    if not isinstance(value, str):
        return value
    file = find_config(value, "model", folder=folder)
    shape = read_yaml(file)
    del origins["model"]  # which named the file, and no value
    origins |= {f"model.{key}": _place(file) for key in shape}
    return shape


def _place(file: Path) -> str:
    """A file as people know it: a shipped one by its place in configs/."""
    file, shipped = file.resolve(), CONFIGS.resolve()
    return f"configs/{file.relative_to(shipped)}, shipped" if file.is_relative_to(shipped) else str(file)


def _parse_overrides(arguments: typing.Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise UserError(f"unexpected argument {quoted(name)}: settings are given as --section.key value")
        if name.count(".") > _MAX_DOTS:
            raise UserError(f"{quoted(name, str)} names no setting: it has {name.count('.')} dots")
        if not equals:
            if not rest:
                raise UserError(f"{quoted(name, str)} has no value")
            value = rest.pop(0)
        try:
            pairs.append((name[2:], parse_yaml(value)))
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


def to_plain(config: Any) -> dict[str, Any]:
    """Nested plain values: what YAML and JSON hold; `build(type(config), to_plain(config))` gives it back."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def describe(cls: type = RunConfig) -> str:
    """Every setting with its type, default and meaning, one a line: the tail of `medllm train --help`."""
    lines = []
    for key, f, owner in documented_fields(cls):
        if f.default is not dataclasses.MISSING:
            default = "null" if f.default is None else str(f.default).lower() if f.type is bool else f.default
            default = f" (default {default})"
        else:
            default = " (required)"
        hint = typing.get_type_hints(owner)[f.name]
        within = "".join(f", {within}" for _, within in ranges_in(hints_with_ranges(owner)[f.name]))
        lines.append(f"  {key}: {type_name(hint)}{within}{default}\n      {field_docs(owner).get(f.name, '')}")
    return "\n".join(lines)

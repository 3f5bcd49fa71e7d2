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
from medllm_jax.config.shipped import find_config
from medllm_jax.errors import UserError, quoted
from medllm_jax.ranges import hints_with_ranges, ranges_in

_MAX_DOTS = 10  # in the name of a setting, of which each makes a mapping


def load_run_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A RunConfig from a YAML file and `--a.b value` overrides, which win.

    path: of a file, or the name of a shipped config, such as ``cpt-72b-v5p-4x4x4``. `model:` may be a model file,
    relative to the config file (or, as an override, to the working directory), or the name of a shipped model.
    """
    file = find_config(path, "runs")
    settings = rename_old_keys(RunConfig, read_yaml(file))
    settings["model"] = _model_section(settings.get("model"), file.parent)
    for key, value in _parse_overrides(overrides):
        if key == "model":
            value = _model_section(value, Path.cwd())
        _set_dotted(settings, current_key(RunConfig, key), value)
    return build(RunConfig, settings, where=str(path))


def load_model_config(path: str | Path) -> ModelConfig:
    """A ModelConfig from a YAML file such as configs/model/qwen2.5-7b.yaml, or by a shipped name: ``qwen2.5-7b``."""
    return build(ModelConfig, read_yaml(find_config(path, "model")), where=str(path))


def _model_section(value: Any, folder: Path) -> Any:
    return read_yaml(find_config(value, "model", folder=folder)) if isinstance(value, str) else value


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

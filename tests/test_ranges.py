"""Every number that can be set has a range, which is kept whatever way it is set: all fields and options are walked."""

import argparse
import ast
import dataclasses
import importlib
import math
import typing
from pathlib import Path
from typing import Annotated

import pytest

from medllm_jax.cli import main, make_parser
from medllm_jax.config.load import describe, load_model_config, to_plain
from medllm_jax.config.schema import ModelConfig, RunConfig
from medllm_jax.config.schema_reader import build
from medllm_jax.errors import UserError, first_line, quoted
from medllm_jax.ranges import Range, Ranged, hints_with_ranges, ranges_in
from medllm_jax.terminal.parser import Parser, number

PACKAGE = Path(__file__).parents[1] / "medllm_jax"


def _schemas():
    """Dataclasses that `build` makes from files, and all others with ranges; found in the package's source."""
    trees = {file: ast.parse(file.read_text("utf-8")) for file in PACKAGE.rglob("*.py")}
    built, ranged, homes = set(), set(), {}
    for file, node in ((file, node) for file, tree in trees.items() for node in ast.walk(tree)):
        match node:
            case ast.Call(func=ast.Name("build"), args=[ast.Name(name), *_]):
                built.add(name)
            case ast.ClassDef(name=name, bases=bases):
                homes[name] = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
                ranged |= {name} if "Ranged" in map(ast.unparse, bases) else set()
    return [getattr(importlib.import_module(homes[name]), name) for name in (built | ranged) & homes.keys()], built


SCHEMAS, BUILT = _schemas()
SCHEMAS.sort(key=lambda cls: cls.__name__)
FIELDS = [
    pytest.param(cls, name, hint, id=f"{cls.__name__}.{name}")
    for cls in SCHEMAS
    for name, hint in hints_with_ranges(cls).items()
    if any(ranges_in(hint))
]


def test_the_walk_finds_what_there_is():
    names = {cls.__name__ for cls in SCHEMAS}
    assert names >= {"RunConfig", "OptimizerConfig", "RoundsConfig", "Recipe", "Condition", "SamplingParams", "_Entry"}
    assert len(FIELDS) > 60


def _value(hint):
    """A value of a type, within its range."""
    if hint is ModelConfig:
        return load_model_config("qwen2.5-tiny")
    if dataclasses.is_dataclass(hint):
        return hint(**_required(hint))
    if typing.get_origin(hint) is Annotated:
        kind, within = typing.get_args(hint)
        return kind(next(n for n in (within.least, within.most, within.below) if math.isfinite(n)))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Literal else "x"


def _required(cls):
    return {
        f.name: _value(hints_with_ranges(cls)[f.name])
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    } | ({"model": _value(ModelConfig), "steps": 1} if issubclass(cls, RunConfig) else {})


def _outside(kind, within):
    """Numbers that are in no range, and those just out of this one."""
    yield from (-(10**30), 10**30) if kind is int else (-1e300, 1e300, math.nan, math.inf, -math.inf)
    after = (lambda bound, to: bound + to) if kind is int else (lambda bound, to: math.nextafter(bound, to * math.inf))
    yield within.below if math.isfinite(within.below) else after(within.most, 1)
    below = within.above if math.isfinite(within.above) else after(within.least, -1)
    yield below if below != within.also else after(below, -1)


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_a_number_out_of_its_range_is_one_line(cls, name, hint):
    assert issubclass(cls, Ranged), f"{cls.__name__} has numbers, and is no Ranged"
    for kind, within in ranges_in(hint):
        assert within is not None, f"{cls.__name__}.{name} declares no range: give it one, as in medllm_jax/ranges.py"
        assert math.isfinite(max(within.least, within.above)) and math.isfinite(min(within.most, within.below))
        for wrong in _outside(kind, within):
            value = {"a": wrong} if "dict" in str(hint) else wrong
            settings = _required(cls) | {name: value}
            with pytest.raises(UserError, match=rf"^(\w+\.)?{name}(\.a)? is .*: it must be ") as caught:
                cls(**settings)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
            if cls.__name__ not in BUILT:
                continue
            plain = {k: to_plain(v) if dataclasses.is_dataclass(v) else v for k, v in settings.items()}
            with pytest.raises(UserError, match=rf"^here: (\w+\.)?{name}\b") as caught:
                build(cls, plain, "here")
            assert "\n" not in str(caught.value)


def test_numbers_in_lists_have_ranges_too():
    @dataclasses.dataclass(frozen=True)
    class Several(Ranged, section="several"):
        shares: tuple[Annotated[float, Range(0, below=1)], ...] = ()

    assert Several((0, 0.5)).shares == (0, 0.5)
    with pytest.raises(UserError, match=r"^several\.shares\[1\] is 1: it must be at least 0 and below 1$"):
        Several((0.5, 1))


def test_help_names_the_ranges():
    text = describe(RunConfig)
    assert "optimizer.clip_norm: a number, at least 0 and at most 1e+09 (default 1.0)" in text
    assert "mesh.fsdp: a whole number, -1, or at least 1 and at most 1,048,576 (default -1)" in text


# --- options ---------------------------------------------------------------------------------------------------------


def _options(parser, words=()):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield from _options(verb, (*words, name))
        elif action.type in (int, float) or isinstance(action.type, number):
            yield pytest.param(words, action, id=" ".join((*words, *action.option_strings[:1])))
        elif isinstance(action.default, int | float) and not isinstance(action.default, bool):
            raise AssertionError(f"{words}: {action.option_strings} has a number for its default, and no type")


OPTIONS = list(_options(make_parser()))


@pytest.mark.parametrize(("words", "action"), OPTIONS)
def test_an_option_out_of_its_range_is_one_line(words, action, capsys):
    assert isinstance(action.type, number), "give it type=number(...), with a range"
    within = action.type.within
    assert action.help == argparse.SUPPRESS or action.help.endswith(f"; {within}")
    wrong = [*map(str, _outside(action.type.kind, within)), "9" * 5000, "x", "", "1_0", "１", "1e999", "0x1", " 1"]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match="is expected") as caught:
            action.type(text)
        assert len(str(caught.value)) < 200
    assert main([*words, f"{action.option_strings[0]}={wrong[0]}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"argument {action.option_strings[0]}: " in error and str(within) in error


def test_all_verbs_are_walked():
    assert len(OPTIONS) > 50 and {words[0] for words in (option.values[0] for option in OPTIONS)} >= {"pairs", "plan"}
    assert type(make_parser()) is Parser


@pytest.mark.parametrize("text", ["1/99999999999999999", "0/1", "2/1", "1/1025", "1", "１/１", "1/" + "9" * 5000])
def test_parts_are_bounded(text, capsys):
    assert main(["convert", "from-hf", "somewhere", "elsewhere", "--part", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --part") and "at most 1024" in error and len(error) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--config", "cpt-tiny", "--topology", "v5p:4x4x" + "9" * 5000),
        ("convert", "from-hf", "somewhere", "elsewhere", "--mesh", "fsdp=" + "9" * 5000),
        ("convert", "to-hf", "somewhere", "elsewhere", "--max-shard-size", "9" * 5000 + "GB"),
        ("plan", "--config", "cpt-tiny", "--topology", "v5p:2x2x1", "--profile", "1:" + "9" * 5000),
        ("train", "--config", "cpt-tiny", "--" + "a" * 5000, "1"),
        ("train", "--config", "cpt-tiny", "--a" + ".b" * 50_000, "1"),
        ("pairs", "--" + "a" * 5000),
        ("pairs", "--tier", "\n" * 50),
    ],
)
def test_numbers_within_texts_are_bounded(arguments, capsys):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 500


def test_an_error_that_says_nothing_is_told_by_its_type():
    assert first_line(ValueError("")) == first_line(ValueError(" \n ")) == "ValueError"
    assert first_line(ValueError("\n what it is \n and where"), most=7) == "what it"


def test_quoted_values_are_one_short_line():
    for value in ("a" * 10_000, list(range(10**5)), {str(n): n for n in range(999)}, 10**5000, "a\nb", [["a"] * 9] * 9):
        assert len(quoted(value)) <= 60 and "\n" not in quoted(value, str)

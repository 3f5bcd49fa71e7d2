"""What the reader of YAML does with what no config should be: one line that names the place, soon, and with code 2."""

import math
import os

import pytest

from medllm_jax.cli import main
from medllm_jax.config import schema_reader
from medllm_jax.config.load import load_run_config
from medllm_jax.config.schema_reader import parse_yaml, read_yaml_file
from medllm_jax.errors import UserError

LINE = "\n"
RUN = "run: x\nsteps: 5\nmodel: qwen2.5-tiny\ndata: {store: a}\n"


def _laughs(levels):
    """YAML of 9 ** levels values, by aliases of lists of aliases."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


BROKEN = {
    "no date": (RUN + "seed: 2026-13-45\n", "seed: expected a whole number, got '2026-13-45'"),
    "date": (RUN + "seed: 2026-01-02\n", "seed: expected a whole number, got '2026-01-02'"),
    "base 60": (RUN + "seed: 1:30\n", "seed: expected a whole number, got '1:30'"),
    "octal": (RUN + "seed: 010\n", "seed: expected a whole number, got '010'"),
    "list for a key": (RUN + "? [a]\n: 1\n", ":5: a key is text, and neither a list nor a mapping"),
    "mapping for a key": (RUN + "? {a: b}\n: 1\n", ":5: a key is text"),
    "number for a key": (RUN + "1: 2\n", "unknown key 1: known keys"),
    "key twice": (RUN + "steps: 6\n", ":5: the key 'steps' stands twice"),
    "long key twice": (f"{'k' * 900}: 1\n{'k' * 900}: 1\n", ":2: the key 'kkk"),
    "long key": (f"{'k' * 900}: 1\n", "unknown key kkk"),
    "merge": (RUN + "<<: {seed: 1}\n", "unknown key <<"),
    "lists": (RUN + "seed: " + "[" * 3000, ":5: nested more than 32 deep"),
    "mappings": (RUN + "seed: " + "{a: " * 3000, ":5: nested more than 32 deep"),
    "dashes": ("- " * 3000, ":1: nested more than 32 deep"),
    "questions": ("? " * 3000, ":1: nested more than 32 deep"),
    "digits": (RUN + "seed: " + "9" * 5000, ":5: 999"),
    "20 digits": (RUN + "seed: " + "9" * 20, "seed is 99999999999999999999: it must be at least 0 and at most"),
    "hexadecimal": (RUN + "seed: 0x" + "f" * 9000, ":5: 0xfff"),
    "exponent": (RUN + "seed: 1e999", "seed: expected a whole number, got inf"),
    "no whole number": (RUN + 'seed: !!int "abc"\n', ":5: the tag 'tag:yaml.org,2002:int' is not read here"),
    "no number": (RUN + 'seed: !!float "abc"\n', ":5: the tag"),
    "no truth value": (RUN + 'distributed: !!bool "abc"\n', ":5: the tag"),
    "binary": (RUN + "seed: !!binary aGk=\n", ":5: the tag"),
    "set": (RUN + "seed: !!set {a}\n", ":5: the tag"),
    "tag": (RUN + "seed: !" + "a" * 5000 + " 1\n", ":5: the tag '!aaa"),
    "text of a list": (RUN + "seed: !!str [a]\n", ":5: expected a scalar node"),
    "aliases": (_laughs(9) + RUN, ":6: the alias 'a4' repeats too much"),
    "aliases under a key": (RUN + f"init:\n  {_laughs(9).replace(LINE, LINE + '  ')}", ":11: the alias 'a4' repeats"),
    "in itself": (RUN + "init: &a [*a]\n", ":5: the alias 'a' repeats too much"),
    "long text again": (RUN + f"a: &a {'b' * 200_000}\nc: [{'*a, ' * 50}]\n", ":6: the alias 'a' repeats too much"),
    "no such anchor": (RUN + "seed: *a\n", ":5: not YAML (found undefined alias 'a')"),
    "half a character": (RUN + 'profile: "\\ud800"\n', "profile: expected text or null, got '\\ud800'"),
    "nul": (RUN + 'profile: "a\\0b"\n', "profile: expected text or null, got 'a\\x00b'"),
    "control character": (RUN + "seed: \x01\n", ":5: not YAML (the character '\\x01' can't be in it)"),
    "tab": (RUN + "\tseed: 1\n", ":5: not YAML"),
    "two documents": (RUN + "---\n" + RUN, "not YAML (but found another document)"),
    "characters": ("#" * (2**20 + 1), "has more than 1,048,576 bytes"),
    "list": ("- a\n", "a mapping of settings is expected, found list"),
    "long value": (RUN + f"seed: {'a' * 9000}\n", "seed: expected a whole number, got 'aaa"),
    "wide value": (RUN + f"seed: [{'a,' * 9000}]\n", "seed: expected a whole number, got ['a', 'a'"),
    "infinity": (RUN + "optimizer: {clip_norm: .inf}\n", "optimizer.clip_norm is inf: it must be at least 0"),
    "no number at all": (RUN + "optimizer: {clip_norm: .nan}\n", "optimizer.clip_norm: expected a number, got nan"),
    "negative": (RUN + "optimizer: {clip_norm: -1}\n", "optimizer.clip_norm is -1.0: it must be at least 0"),
}


@pytest.mark.parametrize(("text", "line"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_config_is_one_line(text, line, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text, "utf-8", "surrogatepass")
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}") and line in error
    assert error.count("\n") == 1 and len(error) - len(str(file)) < 300


def test_values_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(schema_reader, "_MAX_VALUES", 100)
    (tmp_path / "run.yaml").write_text(RUN + f"seed: [{'a,' * 101}]")
    with pytest.raises(UserError, match=r"run\.yaml:5: more than 100 values"):
        read_yaml_file(tmp_path / "run.yaml")


def test_what_means_something_is_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("\ufeff" + RUN.replace("{store: a}", "{store: [&a 2026-01-02, *a]}") + "seed: 0x1F\n", "utf-8")
    config = load_run_config(file)
    assert config.seed == 31 and config.data.store == ("2026-01-02", "2026-01-02")
    numbers = "[1, -1, 1_000, 0x1f, 1., .5, 1.5e3, 1e-5, .inf, -.Inf]"
    assert parse_yaml(numbers) == [1, -1, 1000, 31, 1.0, 0.5, 1500.0, 1e-5, math.inf, -math.inf]
    assert parse_yaml("[~, null, '', yes, Off, true]") == [None, None, "", True, False, True]
    texts = ["090", "1:30", "=", "0x", "_1", "2026-01-02", "a"]
    assert parse_yaml(f"[{', '.join(texts)}, !!str 1]") == [*texts, "1"]
    assert parse_yaml("") is None and parse_yaml(_laughs(3))["a2"][8][8][8] == "x"


@pytest.fixture
def places(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("folder", "is a folder: a YAML file is expected"),
        ("pipe", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("dangling", "is a link to nothing"),
        ("loop", "can't be read (Too many levels of symbolic links)"),
        ("file/a", "not exist"),
        ("nowhere", "not exist"),
        ("a" * 5000, "not exist"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_file_is_one_line(places, name, problem, capsys):
    for words in (("train",), ("rounds",), ("data", "cpt"), ("train", "--config", "cpt-tiny", "--model")):
        option = [] if "--model" in words else ["--config"]
        assert main([*words, *option, str(places / name)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 900
        assert problem in error or "can't be read" in error


def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may read everything
    with pytest.raises(UserError, match=r"run\.yaml can't be read \(permission denied\)"):
        read_yaml_file(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--optimizer.learning_rate=" + "[" * 3000, "optimizer.learning_rate: expected a number, got '[[["),
        ("--optimizer.learning_rate=" + "9" * 5000, "optimizer.learning_rate: expected a number, got '999"),
        ("--optimizer.learning_rate=0x" + "f" * 5000, "optimizer.learning_rate: expected a number, got '0xfff"),
        ("--seed=!!int abc", "seed: expected a whole number, got '!!int abc'"),
        ("--seed=2026-13-45", "seed: expected a whole number, got '2026-13-45'"),
        ("--seed=? [a]", "seed: expected a whole number, got '? [a]'"),
        ("--seed=&a [*a]", "seed: expected a whole number, got '&a [*a]'"),
        ("--run=\udcff", "run: expected text, got '\\udcff'"),
        ("--data.mix={[a]: 1}", "data.mix: expected a mapping of text to a number or null, got '{[a]: 1}'"),
        ("--" + "a." * 5000 + "b=1", "names no setting: it has 5000 dots"),
        ("--" + "a" * 5000, "has no value"),
        ("--.=1", "unknown key"),
    ],
    ids=lambda text: text[:40],
)
def test_overrides_are_one_line_too(override, line, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(UserError) as caught:
        load_run_config(tmp_path / "run.yaml", [override])
    assert line in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("corpora: [text]\n", "corpora: expected a list of"),
        ("corpora: text\n", "corpora: expected a list of"),
        ("corpora: [{name: a}]\n", "corpora[0]: input is not set"),
        ("tokenizer: [a]\n", "tokenizer: expected text or null, got ['a']"),
        ("output: [a]\n", "output: expected text or null, got ['a']"),
        ("pii_rate: 2\n", "pii_rate is 2.0: it must be at least 0 and at most 1"),
    ],
)
def test_a_config_of_corpora_is_checked_before_anything_is_read(text, line, tmp_path, capsys):
    (tmp_path / "corpora.yaml").write_text(text)
    assert main(["data", "cpt", "--config", str(tmp_path / "corpora.yaml")]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1

"""What the docs say is so: commands parse, settings exist, files of YAML are read, links lead somewhere.

CONTRIBUTING.md ("Docs") says how blocks are marked.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from medllm_jax.cli import make_parser
from medllm_jax.config.load import load_run_config
from medllm_jax.config.schema import RunConfig
from medllm_jax.config.schema_reader import documented_fields, dotted_keys, field_docs
from medllm_jax.config.shipped import shipped_configs
from medllm_jax.errors import UserError
from medllm_jax.terminal.parser import parse
from tools import docs_site

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# What people read on the site, and beside it.
READ = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
READ += [ROOT / "launch" / "README.md", ROOT / "tools" / "lm_eval_tasks" / "README.md"]

LANGUAGES = ("bash", "json", "python", "text", "yaml")
# A block's mark -> what a block without one is not.
MARKS = {
    "run": "one of the cheap ones: the slow test runs all of a page, in their order, in one folder",
    "interrupt": "the same, but Ctrl-C is pressed once the run has made a step",
    "tpu": "needs TPUs, or a cloud: not run; what can be run dry is",
    "corpora": "YAML: a file of corpora",
    "patterns": "YAML: patterns of personal data",
    "rounds": "YAML: a file of rounds",
}
# Programs beside ours that a page may start.
PROGRAMS = (
    *("bash", "cat", "cd", "cp", "docker", "eval", "export", "gcloud", "git", "grep", "hf", "kubectl", "lm_eval"),
    *("mkdir", "python", "source", "tensorboard", "vllm"),
)
# Commands of ours by other spellings -> the group of verbs they are.
SPELLINGS = {"tools.convert_hf": ["convert"], "launch": ["launch"], "medllm_jax.cli": []}


@dataclass(frozen=True)
class Block:
    """A block of code of a page. mark: of the comment `<!-- test: MARK -->` before it."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page: fenced ones, and indented ones, which are for a shell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    place, mark = 0, ""
    while place < len(lines):
        line = lines[place]
        start = place + 1
        if found := re.fullmatch(r"<!-- test: (\w+) -->", line.strip()):
            mark = found[1]
        elif found := re.fullmatch(r"( *)```(\S*).*", line):
            end = next(i for i in range(start, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(each.removeprefix(found[1]) for each in lines[start:end])
            yield Block(page, start, found[2], mark, text)
            place, mark = end, ""
        elif line.startswith("    ") and not lines[place - 1].strip() and not _in_a_list(lines[:place]):
            end = next(
                (i for i in range(place, len(lines)) if lines[i] and not lines[i].startswith("    ")), len(lines)
            )
            yield Block(page, start, "bash", mark, "\n".join(each[4:] for each in lines[place:end]))
            place, mark = end - 1, ""
        elif line.strip():
            mark = ""
        place += 1


def _in_a_list(before: list[str]) -> bool:
    """Whether an indented line belongs to a list: the last line that begins at the margin is an entry of one."""
    last = next((line for line in reversed(before) if line[:1].strip()), "")
    return bool(re.match(r"(\d+\.|[-*+]) ", last))


BLOCKS = [block for page in READ if page.name != "CHANGELOG.md" for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell's text as words, without comments, texts that stand in it (<<), and redirections."""
    text = re.sub(r"<<'?(\w+)'?(.*)\n(?:.*\n)*?\1(?=\n|$)", r"\2", text).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        skipped = False  # where a redirection leads
        for word in [*lexer, ";"]:
            if set(word) <= set("<>&|") and set(word) & set("<>"):
                words = words[:-1] if words[-1:] == ["2"] else words
                skipped = True
            elif set(word) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif skipped:
                skipped = False
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def test_blocks_are_of_known_kinds():
    assert len(BLOCKS) > 50
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: say the language of the block; `text` is for output"
        assert not block.mark or block.mark in MARKS, f"{block}: no mark is called {block.mark}"
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_commands_are_understood(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert list(commands(block.text)), "it has no command: is it output? Then its language is text"
    for words in commands(block.text):
        check_command(words, written_before=block.mark in ("run", "interrupt"))


def check_command(words: list[str], *, written_before: bool = False) -> None:
    """written_before: the page's commands before this one write its files."""
    program, *rest = words
    if program == "medllm":
        check_ours(rest, written_before=written_before)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif Path(program).name.startswith("python") and rest[0] == "-m":
        module = rest[1]
        if module in SPELLINGS:
            check_ours(SPELLINGS[module] + rest[2:])
        else:
            file = ROOT.joinpath(*module.split("."))
            assert module in ("venv", "pytest") or file.with_suffix(".py").is_file() or file.is_dir(), module
    elif Path(program).name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for named in re.findall(r"medllm_jax(?:-[\w.-]+\.whl)?\[([\w,]+)\]|^\.\[([\w,]+)\]", " ".join(rest)):
            assert set("".join(named).split(",")) <= set(extras)
    else:
        assert program in PROGRAMS, f"{program}: a program that no page started before; is it right?"


def check_ours(words: list[str], *, written_before: bool = False) -> None:
    from medllm_jax.cli.launch import prepare

    if words[-1] in ("--help", "--version"):
        return
    options = parse(make_parser(), words)
    if words[0] == "launch":
        prepare(options)
    elif options.takes_settings and not (written_before and not Path(options.config).is_file()):
        load_run_config(options.config, options.settings)


@pytest.mark.parametrize(
    "command",
    [
        "medllm trian --config cpt-tiny",
        "medllm train --config cpt-tiny --optimizer.lr 1.0e-4",
        "medllm train --config cpt-tiny --steps many",
        "medllm evaluate --run runs/x --exam e.jsonl --quick",
        "medllm launch gke --config cpt-7b-v5p-2x2x1 --topology v5p:9x9x9 --run gs://b/r --image I --dry-run",
        "make everything",
        "python -m benchmarks.nothing",
        "pip install 'medllm_jax[nothing]'",
        "medlm train",
    ],
)
def test_wrong_commands_are_found(command):
    (words,) = commands(command)
    with pytest.raises((UserError, AssertionError)):
        check_command(words)


def test_commands_of_a_shell_are_taken_apart():
    text = "A=1 medllm a --b 'c d' \\\n  -- --e f # no\ncat > x <<'END'\nmedllm no\nEND\nmake x && make y | cat 2> z"
    words = [["medllm", "a", "--b", "c d", "--", "--e", "f"], ["cat"], ["make", "x"], ["make", "y"], ["cat"]]
    assert list(commands(text)) == words


def test_wrong_links_are_found():
    for link in ("nowhere.md", "plan.md#nothing", "#nothing"):
        with pytest.raises(AssertionError):
            check_links(DOCS / "page.md", f"[text]({link})", {})


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_are_understood(page):
    """Such as `medllm plan --search`, which need not be whole: verbs, options and settings are there."""
    known = {words[1:]: parser for words, parser in docs_site.verbs(make_parser())}
    keys = set(dotted_keys(RunConfig))
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for span in re.findall(r"`medllm ([^`]+)`", text):
        words = span.split()
        if words[0] in ("VERB", "--help", "--version", "..."):
            continue
        if words[0] == "completion":
            continue
        verbs = [verb for verb in known if tuple(words[: len(verb)]) == verb]
        groups = [verb for verb in known if verb[0] == words[0]]
        assert verbs or (groups and (len(words) == 1 or not re.match(r"\w[\w-]*$", words[1]))), span
        options = {option for verb in verbs or groups for option in known[verb]._option_string_actions}
        for word in words[1:]:
            if word.startswith("--") and len(word) > 2:
                assert word in options or word[2:] in keys, f"{span}: {word}"


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml_is_read(block, tmp_path):
    from medllm_jax.cli.data import _Preparation
    from medllm_jax.config.schema_reader import build, parse_yaml
    from medllm_jax.data.prepare.corpus import Corpus, Recipe
    from medllm_jax.data.prepare.pii import Scanner
    from medllm_jax.recipes.rounds import RoundsConfig

    file = tmp_path / "block.yaml"
    file.write_text(block.text, encoding="utf-8")
    content = parse_yaml(block.text)
    if block.mark == "patterns":
        Scanner.load(file)
    elif block.mark == "rounds":
        build(RoundsConfig, content, str(block))
    elif block.mark == "corpora":
        beside = {name: content.pop(name) for name in ("corpora", "tokenizer", "output") if name in content}
        build(Recipe, content, str(block))
        for corpus in build(_Preparation, beside, str(block)).corpora:
            build(Corpus, corpus, str(block))
    else:  # all of a run config, or a part
        whole = yaml.safe_load(shipped_configs("runs")["cpt-tiny"].read_text()) | content
        file.write_text(yaml.safe_dump(whole))
        load_run_config(file)


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_read(block):
    for line in block.text.splitlines() if not block.text.startswith("{\n") else [block.text]:
        json.loads(line)


# --- links and navigation --------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\]\([^)]*\)", "", heading)).strip().lower()
        slug = re.sub(r"[-\s]+", "-", plain)
        number = 1
        while (each := slug if number == 1 else f"{slug}_{number - 1}") in found:
            number += 1
        found.add(each)
    return found


@pytest.fixture(scope="module")
def made():
    """Pages that are made when the site is: their paths in docs/ -> texts."""
    return {DOCS / place: text for place, text in docs_site.pages().items()}


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page, made):
    check_links(page, page.read_text(encoding="utf-8"), made if page.is_relative_to(DOCS) else {})


def test_links_of_made_pages_lead_somewhere(made):
    for page, text in made.items():
        check_links(page, text, made)


def check_links(page: Path, text: str, made: dict[Path, str]) -> None:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"(https?|mailto):", link):
            continue
        place, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / place)) if place else page
        assert target in made or target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            words = made[target] if target in made else text if target == page else target.read_text(encoding="utf-8")
            assert anchor in anchors(words), f"{page.name}: {link}: there is no such heading"


def test_every_page_is_in_the_navigation(made):
    def places(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from places(each)

    navigation = list(places(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = {str(page.relative_to(DOCS)) for page in [*PAGES, *made]}
    assert len(navigation) == len(set(navigation))
    assert set(navigation) == pages


def test_every_picture_is_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in READ)
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name})" in text, picture.name


# --- what is made of the code ----------------------------------------------------------------------------------------


def test_the_reference_has_every_command_and_setting(made):
    page = made[DOCS / "reference/commands.md"]
    for words, parser in docs_site.verbs(make_parser()):
        assert f"## {' '.join(words)}\n" in page
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        assert all(f"`{option}" in page for action in shown for option in action.option_strings)
    page = made[DOCS / "reference/settings.md"]
    for key, f, owner in documented_fields(RunConfig):
        assert f"- `{key}`: " in page
        assert field_docs(owner).get(f.name), f"{key} has no text"
    page = made[DOCS / "reference/configs.md"]
    assert all(f"### {name}\n" in page for kind in ("runs", "rounds", "model") for name in shipped_configs(kind))


# --- the first hour --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", sorted({block.page for block in BLOCKS if block.mark == "run"}), ids=lambda page: page.stem
)
def test_a_page_runs(page, tmp_path, monkeypatch):
    """A page's blocks in their order, as a reader would run them; of the demo, what MEDLLM_DEMO names is taken."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, words in (("medllm", "-m medllm_jax.cli"), ("python", "")):
        (bin / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (bin / name).chmod(0o755)
    here = tmp_path / "clone"
    here.mkdir()
    (here / "medllm_jax").symlink_to(ROOT / "medllm_jax")
    if made := os.environ.get("MEDLLM_DEMO"):
        (here / "demo-run").symlink_to(Path(made).resolve(strict=True))
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")

    for block in blocks(page):
        if block.mark == "run":
            script = "set -euo pipefail\n" + block.text
            done = subprocess.run(["bash", "-c", script], cwd=here, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        elif block.mark == "interrupt":
            assert interrupted(block, here) == 130, block


def test_the_first_hour_is_run():
    marks = [block.mark for block in blocks(DOCS / "first-hour.md") if block.language == "bash"]
    assert marks == ["", "run", "run", "run", "interrupt", "run", "run", "run"]  # all but the installation


def interrupted(block: Block, here: Path) -> int:
    """The exit code of a block that trains, with Ctrl-C pressed once it has made steps."""
    (run,) = re.findall(r"--run (\S+)", block.text)
    metrics = here / run / "metrics.jsonl"
    started = subprocess.Popen(["bash", "-c", f"exec {block.text}"], cwd=here, start_new_session=True)
    try:
        while started.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.1)
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGINT)
        return started.wait()
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)

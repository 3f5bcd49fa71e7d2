"""Pages of the site that are made of the code, as hooks of MkDocs (mkdocs.yml): nothing made here is committed.

The reference of commands walks the parser of `medllm`; that of settings reads the schema that checks configs.
"""

import argparse
import dataclasses
import html
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medllm_jax.cli import make_parser
from medllm_jax.config.schema import RunConfig
from medllm_jax.config.schema_reader import documented_fields, field_docs, metadata_along, type_name
from medllm_jax.config.shipped import shipped_configs
from medllm_jax.ranges import hints_with_ranges, ranges_in

ROOT = Path(__file__).parents[1]
# Files beside docs/ that are pages too -> their places on the site.
BESIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
# What a setting's metadata says about a run that goes on -> the same in words.
_ON_RESUME = {
    "free": "may change when a run goes on",
    "free if the schedule is constant": "may change when a run goes on, if the schedule is constant",
    "fixed": "never changes in a run",
}


def pages() -> dict[str, str]:
    """Places on the site -> texts of the pages that are made here."""
    made = {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/configs.md": configs(),
    }
    for name, place in BESIDE.items():
        if place != "index.md":
            made[place] = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
    return made


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here to those of docs/."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Without marks for tests; links to files beside docs/ lead to their pages, those to folders to their README."""
    markdown = re.sub(r"^ *<!-- test: .* -->\n", "", markdown, flags=re.MULTILINE)
    for name, place in BESIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({place}")
    return re.sub(r"\]\(((?:[\w.-]+/)+)\)", r"](\1README.md)", markdown)


# --- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """A page of every verb with its options."""
    lines = [
        "# Commands",
        "",
        "Made from the program itself: the same as `medllm VERB --help`. Exit codes: 0 done, 1 failure, 2 the input or",
        "the config is wrong, 42 preempted (SIGTERM) after saving, 130 interrupted (Ctrl-C) after saving.",
        "",
    ]
    for words, parser in verbs(make_parser()):
        lines += [f"## {' '.join(words)}", "", f"{_sentence(parser.description)}", ""]
        lines += ["```text", _usage(parser), "```", ""]
        lines += [f"- {line}" for line in map(_option, parser._actions) if line]
        lines += [""]
        if parser.get_default("takes_settings"):
            after = "after a `--`, " if parser.get_default("takes_settings") == "after --" else ""
            lines += [f"Every [setting](settings.md) can be given too, {after}as `--section.key value`.", ""]
    return "\n".join(lines)


def verbs(parser: argparse.ArgumentParser, *before: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words and the parser of each verb that runs something."""
    words = (*before, parser.prog.split()[-1])
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words, parser
    for group in groups:
        for sub in dict.fromkeys(group.choices.values()):
            yield from verbs(sub, *words)


def _usage(parser: argparse.ArgumentParser) -> str:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    return re.sub(r"(.{40,70}?) (?=[\[-])", r"\1\n    ", usage.replace(" [-h]", ""))


def _option(action: argparse.Action) -> str:
    """An option as an entry of a list; empty for what is not shown."""
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return ""
    value = ""
    if action.nargs != 0:
        value = f" {action.metavar or '|'.join(map(str, action.choices or ())) or action.dest.upper()}"
        value += " ..." if action.nargs in ("+", "*") else ""
    names = ", ".join(f"`{name}{value}`" for name in action.option_strings) or f"`{value.strip()}`"
    text = _plain((action.help or "") % {"default": action.default, "prog": "medllm"})
    given = action.default if isinstance(action.default, str | int | float) else None
    if given not in (None, "", True, False) and "default" not in text:
        text += f" (default {given})"
    return f"{names}: {text}{' (required)' if action.required and action.option_strings else ''}"


# --- settings --------------------------------------------------------------------------------------------------------


def settings() -> str:
    """A page of every setting of a run config, of rounds and of corpora."""
    from medllm_jax.data.prepare.corpus import Corpus, Recipe
    from medllm_jax.recipes.rounds import RoundsConfig

    lines = [
        "# Settings",
        "",
        "Made from the schema that checks every config. A setting stands in the YAML file of `--config`, or on the",
        "command line as `--section.key value`, which wins. `--print-config` shows all values of a run and where each",
        "comes from. Where nothing else is said, a setting may change in a run that goes on only with `--force`.",
        "",
    ]
    sections: dict[str, list[tuple[str, dataclasses.Field, type]]] = {}
    for key, f, owner in documented_fields(RunConfig):
        sections.setdefault(key.rpartition(".")[0], []).append((key, f, owner))
    for section, fields in sections.items():
        about = (fields[0][2].__doc__ or "").partition("\n")[0]
        lines += ["", f"## {section or 'The run'}", "", _plain(about), ""]
        lines += [f"- {_setting(*each, _on_resume(each[0]))}" for each in fields]
    lines += ["", "## A file of rounds", "", "What `medllm rounds --config` reads ([rounds](../rpo.md#rounds)).", ""]
    lines += [f"- {_setting(key, f, owner)}" for key, f, owner in documented_fields(RoundsConfig)]
    lines += ["", "## A file of corpora", "", "What `medllm data cpt --config` reads ([corpora](../corpora.md)).", ""]
    lines += [f"- {_setting(key, f, owner)}" for key, f, owner in documented_fields(Recipe)]
    lines += ["", "Each entry of its `corpora`:", ""]
    lines += [f"- {_setting(key, f, owner)}" for key, f, owner in documented_fields(Corpus)]
    return "\n".join([*lines, ""])


def _setting(key: str, f: dataclasses.Field, owner: type, more: str = "") -> str:
    kind = type_name(typing.get_type_hints(owner)[f.name])
    ranges = [f", {within}" for _, within in ranges_in(hints_with_ranges(owner)[f.name]) if within]
    text = _plain(field_docs(owner).get(f.name, ""))
    return f"`{key}`: {text} *({kind}{''.join(ranges)}; {_default(f)}{more})*"


def _default(f: dataclasses.Field) -> str:
    if f.default is dataclasses.MISSING:
        return "required" if f.default_factory is dataclasses.MISSING else "default empty"
    if isinstance(f.default, bool) or f.default is None:
        return f"default {({None: 'null', True: 'true', False: 'false'})[f.default]}"
    text = ", ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
    return f"default {text or 'empty'}"


def _on_resume(key: str) -> str:
    said = [metadata["resume"] for metadata in metadata_along(RunConfig, key) if "resume" in metadata]
    return f"; {_ON_RESUME[said[-1]]}" if said else ""


# --- configs ---------------------------------------------------------------------------------------------------------


def configs() -> str:
    """A page of the configs that come with the package, in whole."""
    lines = [
        "# Shipped configs",
        "",
        "`--config` takes these names from any folder. `medllm configs copy NAME` makes a file of one, to change it.",
    ]
    for kind, heading in (("runs", "Runs"), ("rounds", "Rounds"), ("model", "Shapes of models")):
        lines += ["", f"## {heading}"]
        for name, file in shipped_configs(kind).items():
            lines += ["", f"### {name}", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join([*lines, ""])


def _sentence(text: str | None) -> str:
    text = _plain(text or "")
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _plain(text: str) -> str:
    """A text of the code as Markdown that shows it as it is, but for `code`; names of pages become links."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = [part if part.startswith("`") else re.sub(r"([*_|\\[\]])", r"\\\1", html.escape(part)) for part in parts]
    return re.sub(r"docs/([\w-]+)\.md", lambda page: f"[{page[1]}](../{page[1]}.md)", "".join(plain))

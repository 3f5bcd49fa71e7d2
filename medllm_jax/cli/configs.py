"""`medllm configs list | show | copy`: the configs that come with the package."""

import argparse
import difflib
from pathlib import Path
from typing import Any

from medllm_jax.config.shipped import Kind, shipped_configs
from medllm_jax.errors import UserError
from medllm_jax.terminal.parser import group, verb


def add(verbs: Any) -> None:
    """The verbs."""
    parser = group(verbs, "configs", "list, show and copy the configs that come with the package")
    kinds = parser.add_subparsers(title="verbs", required=True, metavar="{list,show,copy}")
    verb(kinds, "list", _list, "list all shipped configs and what they are for")
    show = verb(kinds, "show", _show, "print a shipped config")
    show.add_argument("name", help="such as cpt-tiny; see `medllm configs list`")
    copy = verb(kinds, "copy", _copy, "copy a shipped config, to change it and give the file to --config")
    copy.add_argument("name", help="such as cpt-tiny; see `medllm configs list`")
    copy.add_argument("target", nargs="?", help="file, or folder (default: NAME.yaml here); nothing is overwritten")


# Kind -> what its configs are given to.
_KINDS: dict[Kind, str] = {
    "runs": "Runs: medllm train, reference, plan and launch take their names as --config",
    "model": "Shapes of models: `model:` of a run config",
    "rounds": "Rounds: medllm rounds --config",
}


def _list(options: argparse.Namespace) -> None:
    width = max(len(name) for kind in _KINDS for name in shipped_configs(kind))
    for kind, heading in _KINDS.items():
        print(f"{heading}\n")
        for name, file in shipped_configs(kind).items():
            print(f"  {name:<{width}}  {_about(file)}")
        print()
    print("medllm configs show NAME prints one, and medllm configs copy NAME makes a file of it to change.")


def _about(file: Path) -> str:
    """The first sentence of the comment that a shipped config begins with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return comment.replace(".yaml", "").partition(". ")[0].partition(": medllm")[0].rstrip(".")


def _show(options: argparse.Namespace) -> None:
    print(_find(options.name).read_text(encoding="utf-8"), end="")


def _copy(options: argparse.Namespace) -> None:
    file = _find(options.name)
    target = Path(options.target or ".")
    if target.is_dir():
        target /= file.name
    try:
        with target.open("x", encoding="utf-8") as copy:
            copy.write(file.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{target} exists: give another file, or remove it first") from None
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror}") from None
    print(f"{target}: change it, and give it as --config {target}")


def _find(name: str) -> Path:
    """The shipped config of a name, of whatever kind; a kind may stand before it where two have the name."""
    named: dict[str, list[Path]] = {}
    for kind in _KINDS:
        for each, file in shipped_configs(kind).items():
            named.setdefault(each, []).append(file)
            named.setdefault(f"{kind}/{each}", []).append(file)
    found = named.get(name.removesuffix(".yaml"), [])
    if len(found) == 1:
        return found[0]
    if found:
        places = " or ".join(f"{file.parent.name}/{name}" for file in found)
        raise UserError(f"several shipped configs have the name {name}: say {places}")
    near = difflib.get_close_matches(name, named, n=3)
    raise UserError(
        f"no shipped config is called {name}: "
        + (f"did you mean {', '.join(near)}?" if near else "see `medllm configs list`")
    )

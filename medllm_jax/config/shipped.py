"""Configs that come with the package, which are found by their names from any folder."""

import difflib
import os
import re
from pathlib import Path
from typing import Literal

from medllm_jax.errors import UserError, quoted

CONFIGS = Path(__file__).parents[1] / "configs"
Kind = Literal["runs", "model", "rounds"]


def shipped_configs(kind: Kind) -> dict[str, Path]:
    """The shipped files of one kind by their names, such as ``cpt-72b-v5p-4x4x4``; 7b comes before 32b."""
    files = {file.name.removesuffix(".yaml"): file for file in (CONFIGS / kind).glob("*.yaml")}
    return dict(sorted(files.items(), key=lambda entry: _natural(entry[0])))


def _natural(name: str) -> list[tuple[float, str]]:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", name)
    return [(float(part), "") if number % 2 else (-1.0, part) for number, part in enumerate(parts)]


def find_config(path_or_name: str | Path, kind: Kind, folder: Path = Path()) -> Path:
    """What stands at a path, relative to a folder, or the shipped one of that name; a file that is there comes first.

    Raises:
      UserError: there is neither; lists the near names, or all.
    """
    file = folder / path_or_name
    if os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        return file
    text, shipped = str(path_or_name), shipped_configs(kind)
    if text in shipped:
        return shipped[text]
    if os.path.lexists(file):  # a folder, a pipe, a link to nothing: what reads it says what it is
        return file
    file = quoted(file, str, most=300)
    near = difflib.get_close_matches(Path(text).name.removesuffix(".yaml"), shipped, n=3)
    if "/" in text or text.endswith((".yaml", ".yml")):
        hint = f"; shipped configs are given by name: {', '.join(near)}" if near else ""
        raise UserError(f"config file {file} does not exist{hint}")
    known = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(shipped)}"
    raise UserError(f"config file {file} does not exist, and no shipped config has that name: {known}")

"""docs/architecture.md names files and functions that are there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_walks_name_what_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9/]+\.py)(?::(\w+))?`", text))
    assert len(named) >= 30
    for file, name in named:
        tree = ast.parse((ROOT / "medllm_jax" / file).read_text(encoding="utf-8"))
        assert not name or name in {getattr(node, "name", None) for node in tree.body}, f"{file}:{name}"


def test_every_layer_of_the_contract_is_described():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nlayers = [")[2].partition("]")[0]
    rows = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The row layout")[0]
    layers = [set(re.findall(r"\w+", line)) for line in re.findall(r'"(.*)"', contract)]
    found = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows.splitlines() if row.startswith("| `")]
    assert found == layers

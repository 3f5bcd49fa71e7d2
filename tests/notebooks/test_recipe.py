"""The notebook is as a reader opens it: ten cells in order, nothing of a former run in it. `.ci/run` executes it."""

import ast
import json
from pathlib import Path

NOTEBOOK = json.loads((Path(__file__).parents[2] / "notebooks" / "recipe.ipynb").read_text("utf-8"))


def test_ten_cells_that_have_not_run():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    for number, cell in enumerate(cells, 1):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        text = "".join(cell["source"])
        assert text.startswith(f"# {number}. ")
        ast.parse(text.replace("%pip install --quiet {SOURCE}", "pass"))


def test_it_names_no_machine():
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert set(NOTEBOOK["metadata"]) == {"kernelspec", "language_info"}

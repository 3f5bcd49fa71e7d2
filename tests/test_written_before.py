"""What commit 0ed3873 wrote is read: runs resume, models load, stores open, results are compared.

tests/fixtures/written_by_0ed3873/README.md says what is there and how it was made.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.written_by_0ed3873.expect import expectation, processor

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0ed3873"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
# In one process: what they share is compiled once, and one device, as when the runs began.
COMMANDS = (
    ["train", "--config", "cpt.yaml"],
    ["train", "--config", "rpo.yaml"],
    ["evaluate", "--exam", "exam.jsonl", "--template", "template.yaml", "--output", "graded"],
    [
        "score",
        "--exam=questions",
        "--data=exam.jsonl",
        "--predictions=predictions",
        "--against=second",
        "--output=scored-again",
    ],
    ["report", "cpt", "rpo", "results", "scored/first", "scored/second", "--output", "report"],
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what was written; the base of the RPO run's adapters stands where its checkpoint says."""
    folder = tmp_path_factory.mktemp("written") / "copy"
    shutil.copytree(WRITTEN, folder)
    shutil.copytree(folder / "cpt", folder / "base")
    name_base(folder / "rpo" / "checkpoints" / "4", folder / "base")
    (folder / "predictions").mkdir()
    for system in ("first", "second"):
        (folder / f"{system}.jsonl").rename(folder / "predictions" / f"{system}.jsonl")
    (folder / "graded").mkdir()
    shutil.copy(folder / "results" / "samples.jsonl", folder / "graded")
    return folder


def name_base(checkpoint: Path, base: Path) -> None:
    """Has a checkpoint name another folder as its base, and seals again what it says of itself."""
    from medllm_jax.checkpoint.handle import open_checkpoint

    meta = dict(open_checkpoint(checkpoint.parents[1], 4).meta)  # its digest is checked
    meta["base"] = meta["base"] | {"checkpoint": str(base)}
    content = {name: value for name, value in meta.items() if name != "digest"}
    file = checkpoint / "meta" / "_strings.json"
    strings = json.loads(file.read_text())
    strings["base.checkpoint"] = str(base)
    strings["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(strings))


@pytest.fixture(scope="module")
def resumed(copy):
    """Another copy after `COMMANDS`, and what they printed."""
    folder = shutil.copytree(copy, copy.parent / "resumed")
    code = "import json, sys\nfrom medllm_jax.cli import main\nfor command in json.loads(sys.argv[1]):\n"
    code += "    if main(command): sys.exit(f'{command} failed')\n"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(WRITTEN.parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(COMMANDS)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("run", ["cpt", "rpo"])
def test_runs_resume_to_the_numbers_that_the_older_version_resumed_to(resumed, run):
    folder, _ = resumed
    found, expected = expectation(folder / run), EXPECTED[run]
    if EXPECTED["made_on"] == {"processor": processor(), "jaxlib": importlib.metadata.version("jaxlib")}:
        assert found == expected
    for row, wanted in zip(found["metrics"], expected["metrics"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    before = (WRITTEN / run / "metrics.jsonl").read_text()
    assert (folder / run / "metrics.jsonl").read_text().startswith(before)
    assert len((folder / run / "sessions.jsonl").read_text().splitlines()) == 2


def test_the_older_name_of_a_setting_is_read():
    from medllm_jax.config.load import to_plain
    from medllm_jax.storage.run_folder import recorded_config

    assert "limit: 3" in (WRITTEN / "cpt" / "config.yaml").read_text()
    guard = to_plain(recorded_config(WRITTEN / "cpt").guard)
    assert guard["max_skipped"] == 3


def test_models_are_loaded(copy):
    """Each weight has the digest that was written; adapters come with their base."""
    import jax

    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.checkpoint.load_model import load_model
    from medllm_jax.config.schema import MeshConfig, PrecisionConfig
    from medllm_jax.distributed.sharding import make_mesh

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    whole = load_model(open_checkpoint(copy / "base"), PrecisionConfig(compute="float32"), mesh)
    adapted = load_model(open_checkpoint(copy / "rpo"), PrecisionConfig(compute="float32"), mesh)
    assert whole.config == adapted.config and whole.config.hidden_size == 16
    assert len(jax.tree.leaves(whole.params)) == 14
    assert len(jax.tree.leaves(adapted.params)) == 14 + 2 * 7
    np.testing.assert_array_equal(whole.params["embed_tokens"]["weight"], adapted.params["embed_tokens"]["weight"])


def test_stores_and_reference_log_probabilities_are_read(copy):
    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.data.reference_log_probs import read_references
    from medllm_jax.data.rows import Rows
    from medllm_jax.data.store import verify

    documents, pairs = Rows.open([str(copy / "corpus")]), Rows.open([str(copy / "pairs")])
    for run, rows in (("base", documents), ("rpo", pairs)):
        assert open_checkpoint(copy / run, 4).meta["rows_digest"] == rows.digest
        assert verify(rows.stores[0].path).metadata.format_version == 3
    values = read_references(pairs, open_checkpoint(copy / "rpo", 4).meta["reference_model"])
    stored = np.load(next((WRITTEN / "pairs" / "reference").glob("*/values.npy")))
    np.testing.assert_array_equal(values, stored)
    assert (values < 0).any()


def test_results_are_graded_scored_and_reported_as_before(resumed):
    folder, printed = resumed
    for one, other in (("graded", "results"), ("scored-again/first", "scored/first")):
        files = [*WRITTEN.joinpath(other).glob("grades-*.jsonl"), WRITTEN / other / "scores.json"]
        assert len(files) >= 2
        for file in files:
            found, written = (folder / one / file.name).read_text(), file.read_text()
            if file.name == "scores.json":
                found, written = json.loads(found), json.loads(written)
                written.get("tiers", {}).pop("official", None)  # this exam has none, which was told as a score
            assert found == written, file
    assert "McNemar" in printed
    page = (folder / "report" / "report.html").read_text()
    assert "answer" in page and "second" in page

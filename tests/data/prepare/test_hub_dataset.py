import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_jax.cli import main
from medllm_jax.data.prepare.corpus import Corpus, prepare_corpus
from medllm_jax.data.prepare.files import RECORD_FILES, find_files
from medllm_jax.data.prepare.hub_dataset import HubDataset, local_inputs
from medllm_jax.data.prepare.instructions import prepare_instructions
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.data.prepare.store_report import report
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from medllm_jax.terminal.version import install_line
from tests.dataset_server import DatasetServer
from tests.tiny import write_json_lines

ROOT = Path(__file__).parents[3]
NAME = "someone/rows"
ROWS = [
    {"prompt": f"why {n}?", "chosen": " because", "rejected": " no", "response": "so", "text": f"{n}"} for n in range(3)
]
CONFIGS = """---
configs:
- {config_name: one, data_files: [{split: train, path: one.jsonl}]}
- {config_name: two, data_files: [{split: a, path: two.jsonl}, {split: b, path: one.jsonl}]}
---
"""

# Settings of the hub are read where its libraries are imported, so what asks a server is a process of its own.
IN_A_PROCESS = """
import json, sys
from medllm_jax.data.prepare.hub_dataset import local_inputs
from medllm_jax.errors import RunError, UserError

found = {}
for address in sys.argv[1:]:
    try:
        (found[address],) = local_inputs(address)
    except (UserError, RunError) as error:
        found[address] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def fetched(cache, endpoint, *addresses, **more):
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "hf"), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", IN_A_PROCESS, *addresses]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(ROOT)} | more, check=True, capture_output=True, text=True, timeout=240
    )
    return json.loads(done.stdout.splitlines()[-1])


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The cache of a machine that has read a dataset, the address with all that is known, and all answers."""
    cache = tmp_path_factory.mktemp("cache")
    commits = {
        "main": {"data/train.jsonl": lines(ROWS), "data/test.jsonl": lines(ROWS[:1])},
        "configs": {"README.md": CONFIGS.encode(), "one.jsonl": lines(ROWS[:2]), "two.jsonl": lines(ROWS)},
        "program": {"rows.py": b"raise SystemExit('this ran')"},
    }
    with DatasetServer(NAME, commits) as server:
        base = f"hf://datasets/{NAME}"
        addresses = [base, f"{base}@main?split=test", f"{base}@configs", f"{base}@configs?name=two", f"{base}@program"]
        addresses += [f"{base}@configs?name=two&split=b", f"{base}@none", f"{base}-not", f"{base}?split=dev"]
        found = fetched(cache, server.url, *addresses)
        commit = server.commit("main")
    return cache, f"{base}@{commit}?name=default&split=train", {key.removeprefix(base): found[key] for key in addresses}


def test_rows_of_one_commit_are_kept(hub):
    cache, whole, found = hub
    assert found[""] == f"{cache}/medllm_jax/datasets/{NAME}/{HubDataset.parse(whole).revision}/default/train.parquet"
    assert found["@main?split=test"].endswith("/default/test.parquet")
    assert found["@configs?name=two&split=b"].endswith("/two/b.parquet")
    kept = [path.name for path in cache.rglob("*") if path.is_file() and "medllm_jax" in path.parts]
    assert sorted(kept) == sorted(
        f"{name}.parquet{end}" for name in ("train", "test", "b") for end in ("", ".origin.json")
    )


def test_what_cannot_be_read_is_one_line(hub):
    _, _, found = hub
    wrong = {
        "@configs": "UserError: .* has several configs: choose with name= after \\?, of one, two",
        "@configs?name=two": "UserError: .* has several splits: choose with split= after \\?, of a, b",
        "?split=dev": "UserError: .* has no split dev: choose with split= after \\?, of train, test",
        "@none": "UserError: .* has no revision none",
        "-not": "UserError: .* is not on the hub, or needs a token that may read it",
        "@program": "UserError: .* is made by a program of its repository, and such programs are never run",
    }
    for address, message in wrong.items():
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(found[address])
        assert "\n" not in found[address]


def test_a_hub_out_of_reach_may_pass_and_offline_is_a_setting(hub):
    cache, whole, _ = hub
    nowhere = "http://127.0.0.1:9"
    found = fetched(cache, nowhere, f"hf://datasets/{NAME}", whole)
    assert found[f"hf://datasets/{NAME}"].startswith("RunError: ") and found[whole].endswith("train.parquet")
    found = fetched(cache, nowhere, f"hf://datasets/{NAME}", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in found[f"hf://datasets/{NAME}"]


def test_each_kind_of_store_is_that_of_the_same_rows_in_a_file(hub, tmp_path, tokenizer_dir, monkeypatch):
    cache, whole, _ = hub
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    file = write_json_lines(tmp_path / "rows.jsonl", ROWS)
    for name, prepare in {
        "pairs": lambda rows, store: prepare_pairs(rows, tokenizer_dir, store, 64),
        "sft": lambda rows, store: prepare_instructions([rows], tokenizer_dir, store, 64),
        "cpt": lambda rows, store: prepare_corpus([Corpus("corpus", rows)], tokenizer_dir, store),
    }.items():
        found, twin = prepare(whole, tmp_path / name), prepare(str(file), tmp_path / f"{name}-twin")
        assert found.digest == twin.digest and len(RowStore.open(tmp_path / name)) == len(
            RowStore.open(tmp_path / f"{name}-twin")
        )
        (listed,), (plain,) = found.corpora[0].manifest["files"], twin.corpora[0].manifest["files"]
        assert listed["origin"] == whole and "origin" not in plain
        assert f"holds {whole}" in report(found)


def test_without_the_extra_one_line_says_what_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = [
        "data",
        "pairs",
        "--tokenizer",
        "x",
        "--output",
        str(tmp_path / "store"),
        "--input",
        f"hf://datasets/{NAME}",
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: hf://datasets/{NAME} needs `datasets`: {install_line('datasets')}\n"


@pytest.mark.parametrize(
    "address",
    [
        "hf://someone/rows",
        "hf://datasets/squad",
        "hf://datasets/",
        "hf://datasets/a/b/c",
        "hf://datasets/../b",
        "hf://datasets/a/b@../x",
    ]
    + [f"hf://datasets/a/b?{query}" for query in ("splt=x", "split=", "split=../x", "split=..", "split=a&split=b")],
)
def test_an_address_has_one_form(address):
    with pytest.raises(UserError, match="is not hf://datasets/OWNER/NAME, with @REVISION"):
        HubDataset.parse(address)


def test_addresses_and_files_that_are_no_such():
    for address in ("hf://datasets/a/b", "hf://datasets/a/b@refs/pr/1?name=c d&split=e"):
        assert str(HubDataset.parse(address)) == address
    assert local_inputs(["a.jsonl", "gs://b/c"]) == ["a.jsonl", "gs://b/c"] and local_inputs(Path("a")) == ["a"]
    with pytest.raises(UserError, match="is read by `medllm data` alone"):
        find_files("hf://datasets/a/b", RECORD_FILES, RejectionCounts())

"""Models by their names on the hub are converted, compared and asked as folders are."""

import pytest

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.errors import UserError
from tests.conversion.hf_folders import run
from tests.hub_server import hub_of_its_own

NAME = "some/model"


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    """A hub with the model."""
    with hub_of_its_own(tmp_path, monkeypatch) as server:
        server.add(NAME, source)
        yield server


def test_a_name_is_converted_like_a_folder(hub, source, tmp_path, capsys):
    commit = hub.repositories[NAME].sha
    assert run("from-hf", f"{NAME}@main", tmp_path / "run") == 0
    assert f"downloading {NAME}@{commit[:12]} from the hub" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "run").meta["source"] == {"name": NAME, "commit": commit}
    assert run("verify", NAME, tmp_path / "run", "--by", "hash") == 0
    assert run("verify", source, NAME, "--by", "hash") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in text
    assert f"{NAME} (commit {commit[:12]})" in text


def test_an_export_on_the_hub_is_checked_by_its_sums(hub, source, tmp_path, capsys):
    assert run("from-hf", NAME, tmp_path / "run") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 0
    exported = hub.add("some/export", tmp_path / "out")
    exported.files["SHA256SUMS"] += b"0" * 64 + b"  weights.bin\n"  # which is never downloaded
    assert run("from-hf", "some/export", tmp_path / "again") == 0
    exported.files["model.safetensors"] = exported.files["model.safetensors"][:-1] + b"!"
    capsys.readouterr()
    assert run("from-hf", "some/export", tmp_path / "changed") == 2
    assert "SHA256SUMS says" in capsys.readouterr().err


def test_a_name_that_is_nowhere_blames_the_argument(hub, tmp_path, capsys):
    assert run("from-hf", "models/qwen", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SRC models/qwen: no folder of that name is here, and the hub (")
    assert run("verify", "models/qwen", tmp_path / "run") == 2
    assert "models/qwen: no folder of that name is here" in capsys.readouterr().err


def test_a_store_is_made_with_a_tokenizer_of_the_hub(hub, tmp_path):
    from medllm_jax.cli import main

    (tmp_path / "texts.jsonl").write_text('{"text": "fever and cough"}\n')
    more = ("--output", "store", "--sequence-length", "32", "--workers", "1")
    assert main(["data", "cpt", "--input", "texts.jsonl", "--tokenizer", NAME, *more]) == 0
    assert "model.safetensors" not in hub.downloads()


def test_a_name_is_asked_as_a_folder_is(hub, tmp_path):
    pytest.importorskip("torch")
    from medllm_jax.inference.samplers import folder_sampler

    how = {"batch_size": 1, "dtype": "float32", "chat": False}
    sampler = folder_sampler(NAME, **how)
    assert sampler.where == f"{NAME}@{hub.repositories[NAME].sha[:12]}"
    with pytest.raises(UserError, match="--hf models/qwen: no folder of that name is here"):
        folder_sampler("models/qwen", **how)

"""Exports are pushed to the hub, private unless asked otherwise, and a push that fails leaves the export as it is."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.hf_folders import names_in, run
from tests.hub_server import TOKEN, Repository, hub_of_its_own

NAME = "someone/export"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, which knows the token."""
    with hub_of_its_own(tmp_path, monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def refused(converted, tmp_path, capsys):
    """Tries to push; the one line of the error, before anything was exported."""

    def push(*more, name=NAME, target=tmp_path / "out"):
        assert run("to-hf", converted, target, "--push", name, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and TOKEN not in error
        assert not (tmp_path / "out").exists()
        return error

    return push


def test_an_export_is_pushed_whole_and_private(hub, converted, source, tmp_path, capsys):
    assert run("to-hf", converted, "out", "--push", NAME) == 0
    said = capsys.readouterr()
    assert f"{hub.url}/{NAME} (private) holds the export now" in said.out
    assert TOKEN not in said.out + said.err
    pushed = hub.repositories[NAME]
    assert pushed.private
    assert sorted(pushed.files.keys() - {".gitattributes"}) == names_in(Path("out"))
    assert pushed.files["model.safetensors"] == Path("out", "model.safetensors").read_bytes()
    assert run("verify", source, NAME, "--by", "hash") == 0


def test_public_is_asked_for(hub, converted, refused):
    hub.repositories[NAME] = Repository({".gitattributes": b""})
    assert "that repository is public: give --public too" in refused()
    assert run("to-hf", converted, "out", "--push", NAME, "--public") == 0
    assert not hub.repositories[NAME].private
    assert "config.json" in hub.repositories[NAME].files


def test_nothing_is_uploaded_to_what_turns_out_to_be_public(hub, converted, capsys):
    hub.makes_public = True
    assert run("to-hf", converted, "out", "--push", NAME) == 2
    assert "that repository is public" in capsys.readouterr().err
    assert hub.repositories[NAME].files.keys() == {".gitattributes"}


def test_what_is_there_is_replaced_only_where_that_is_asked_for(hub, converted, refused):
    before = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"", "notes.txt": b"kept"}
    hub.repositories[NAME] = Repository(dict(before), private=True)
    assert "holds files already: choose another name, or give --overwrite" in refused()
    assert run("to-hf", converted, "out", "--push", NAME, "--overwrite") == 0
    assert before.keys() & hub.repositories[NAME].files.keys() == {"notes.txt"}


def test_what_can_be_known_is_said_before_the_export(hub, converted, tmp_path, refused, monkeypatch, capsys):
    assert "a name on the hub, OWNER/NAME, is expected" in refused(name="export")
    assert "is in a bucket" in refused(target="gs://bucket/out")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "the hub refuses the token in use" in refused()
    monkeypatch.delenv("HF_TOKEN")
    assert "no token is there: set HF_TOKEN" in refused()
    assert run("to-hf", converted, "out", "--public") == 2
    assert "give --push OWNER/NAME too" in capsys.readouterr().err


def test_a_push_that_fails_leaves_the_export_and_says_what_pushes_it(hub, converted, tmp_path, capsys):
    hub.refuses_commits = True
    assert run("to-hf", converted, "out", "--push", NAME) == 2
    error = capsys.readouterr().err
    assert "the export in out is whole" in error and TOKEN not in error
    assert "config.json" in names_in(Path("out"))
    again = shlex.split(error.split("`")[1])
    assert again == ["hf", "upload", NAME, "out", ".", "--private"]
    hub.refuses_commits = False
    program = Path(sys.executable).with_name("hf")
    if program.exists():
        import os

        known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        subprocess.run([program, *again[1:]], env=os.environ | known, check=True, capture_output=True)
        assert "config.json" in hub.repositories[NAME].files

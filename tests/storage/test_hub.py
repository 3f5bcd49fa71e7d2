"""Models by their names on the hub, against a server on this machine that speaks its protocol."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as settings
import pytest

from medllm_jax.errors import RunError, UserError
from medllm_jax.storage.hub import MODEL, TOKENIZER, Found, find_folder, hub_name
from tests.hub_server import TOKEN, hub_of_its_own

NAME = "some/model"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"w" * 50_000,
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "tokenizer.json": b"{} ",
    "LICENSE": b"licence",
    "SHA256SUMS": b"sums",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_of_its_own(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def model(hub, tmp_path):
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return hub.add(NAME, folder)


def test_names_of_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("Qwen/Qwen2.5-7B") == ("Qwen/Qwen2.5-7B", None)
    assert hub_name("Qwen/Qwen2.5-7B@refs/pr/4") == ("Qwen/Qwen2.5-7B", "refs/pr/4")
    others = (
        "/a/b",
        "./a/b",
        "../a",
        "a",
        "a/b/c",
        "gs://a/b",
        "~/a",
        "a/..",
        "a/b--c",
        "a/b c",
        "模/型",
        "a/.b",
        "a/b.",
    )
    assert all(hub_name(each) is None for each in others)
    (tmp_path / "Qwen" / "Qwen2.5-7B").mkdir(parents=True)
    assert hub_name("Qwen/Qwen2.5-7B") is None
    with pytest.raises(UserError, match="a branch, a tag or a commit"):
        hub_name("Qwen/other@")


def test_only_what_is_read_is_downloaded_and_only_once(hub, model, caplog):
    with caplog.at_level(logging.INFO, "medllm_jax"):
        found = find_folder(NAME, MODEL)
    assert found[1:] == (NAME, model.sha)
    assert found.label == f"{NAME}@{model.sha[:12]}"
    wanted = ["LICENSE", "SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in Path(found.folder).iterdir()) == wanted
    assert hub.downloads() == wanted
    assert find_folder(f"{NAME}@{model.sha}", MODEL) == found
    assert hub.downloads() == wanted


def test_of_a_tokenizer_no_weights_are_downloaded(hub, model):
    find_folder(NAME, TOKENIZER)
    assert hub.downloads() == ["config.json", "tokenizer.json"]


def test_a_folder_stays_what_it_is(hub, tmp_path):
    assert find_folder(str(tmp_path), MODEL) == Found(str(tmp_path))
    assert find_folder("gs://bucket/model", MODEL) == Found("gs://bucket/model")
    assert not hub.requests


def refusal(source=NAME, kind=UserError, files=MODEL):
    with pytest.raises(kind) as caught:
        find_folder(source, files, option="--hf")
    text = str(caught.value)
    assert text.startswith(f"--hf {source}: ")
    assert "\n" not in text and len(text) < 500
    return text


def test_what_neither_is_here_nor_there_blames_the_argument(hub):
    text = refusal("models/qwen")
    assert "no folder of that name is here, and the hub" in text and "has no model models/qwen" in text
    assert "set HF_TOKEN" in text


def test_a_private_model_needs_a_token_that_is_never_shown(hub, model, monkeypatch, caplog):
    model.private = True
    assert "without HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_folder(NAME, MODEL).commit == model.sha
    assert "the token in use" in refusal("some/other")
    assert TOKEN not in caplog.text


def test_a_gated_model_says_what_to_do(hub, model):
    model.gated = True
    assert f"accept its licence at {hub.url}/{NAME}, and set HF_TOKEN" in refusal()


def test_a_revision_that_is_not_there(hub, model):
    assert f"{NAME} on the hub has no revision v9" in refusal(f"{NAME}@v9")


def test_pickles_are_refused_before_anything_is_downloaded(hub, model):
    del model.files["model.safetensors"]
    assert "has no weights in safetensors (pickles, .bin and .pt, are never read)" in refusal()
    del model.files["tokenizer.json"]
    assert "has no tokenizer: choose another" in refusal(files=TOKENIZER)
    assert not hub.downloads()


def test_offline_the_cache_is_taken_if_it_is_whole(hub, model, monkeypatch):
    find_folder(NAME, TOKENIZER)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal()
    assert find_folder(NAME, TOKENIZER).commit == model.sha
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    found = find_folder(NAME, MODEL)
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert find_folder(NAME, MODEL) == found


def test_without_a_network_the_cache_is_taken_and_said(hub, model, monkeypatch, caplog):
    found = find_folder(NAME, MODEL)
    monkeypatch.setattr(settings, "ENDPOINT", "http://127.0.0.1:1")  # where nothing listens
    monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/")
    assert find_folder(NAME, MODEL) == found
    assert "what is in its cache is taken" in caplog.text
    text = refusal("models/qwen")
    assert "no folder of that name is here, and the hub (http://127.0.0.1:1) can't be asked" in text


def test_a_hub_that_fails_may_answer_later(hub, model):
    hub.failing = 503
    assert "can't be asked for" in refusal(kind=RunError)


def test_a_download_that_breaks_off_goes_on(hub, model, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.cut_after = 20_000
    text = refusal(kind=RunError)
    assert "broke off" in text and "run the same command again" in text
    hub.cut_after = None
    assert (hub.requests.clear(), find_folder(NAME, MODEL).commit)[1] == model.sha
    assert "model.safetensors" in hub.downloads()


def test_a_disk_without_room_is_said_before(hub, model, monkeypatch):
    import shutil

    monkeypatch.setattr("medllm_jax.storage.hub.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 9))
    assert "HF_HUB_CACHE" in refusal()
    assert not hub.downloads()


def test_settings_are_those_of_huggingface_hub(hub, model, tmp_path):
    """Another process reads HF_ENDPOINT, HF_HOME and HF_TOKEN."""
    model.private = True
    code = f"from medllm_jax.storage.hub import *; print(find_folder({NAME!r}, MODEL).folder)"
    known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | known, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().startswith(str(tmp_path / "home" / "hub"))
    assert TOKEN not in done.stdout + done.stderr

"""`medllm doctor`: what is there, what is not, and what to do about it."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from medllm_jax.cli import doctor, main
from medllm_jax.distributed.compilation_cache import default_folder


@pytest.fixture
def findings(monkeypatch, capsys):
    """What it finds, by name; and its exit code."""
    monkeypatch.setattr(doctor, "_DEVICES", "print('[[\"cpu\", null]]')")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:1")

    def run(*words):
        code = main(["doctor", "--json", *map(str, words)])
        found = json.loads(capsys.readouterr().out)["findings"]
        return {each["what"]: each for each in found}, code

    return run


def test_a_machine_that_has_what_is_needed(findings, tmp_path):
    found, code = findings(tmp_path)
    assert code == 0 and not [each for each in found.values() if each["state"] == "missing"]
    assert metadata.version("jax") in found["packages"]["text"] and found["devices"]["text"] == "1 x cpu"
    assert "memory" in found["machine"]["text"] and found[str(tmp_path)]["state"] == "ok"
    assert "emulator" in found["STORAGE_EMULATOR_HOST"]["text"]


def test_where_programs_are_kept_is_no_setting_of_the_users(findings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "JAX_ENABLE_COMPILATION_CACHE", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "0")  # so that what the verb sets goes with the test
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    found, _ = findings()
    assert found["JAX_COMPILATION_CACHE_DIR"]["state"] == "note" and "compiled programs" not in found
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    found, _ = findings()
    assert found["compiled programs"]["text"] == f"kept in {default_folder()}"
    assert "JAX_COMPILATION_CACHE_DIR" not in found


def test_a_package_that_is_missing_or_old_comes_with_its_installation(findings, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name in ("optax", "wandb") else version(name))
    found, code = findings()
    assert code == 1 and found["optax"]["state"] == "missing"
    assert "0.1 is installed, >=" in found["optax"]["text"] and "pip install 'optax>=" in found["optax"]["remedy"]
    assert found["wandb"]["state"] == "absent" and "[wandb]" in found["wandb"]["remedy"]


def test_devices_that_do_not_come_are_no_wait_for_ever(findings, monkeypatch):
    monkeypatch.setattr(doctor, "_DEVICES", "import time; time.sleep(1000)")
    monkeypatch.setattr(doctor, "_SECONDS", 0.5)
    found, code = findings()
    assert (
        code == 1 and "JAX found none in" in found["devices"]["text"] and "JAX_PLATFORMS" in found["devices"]["remedy"]
    )
    monkeypatch.setattr(doctor, "_SECONDS", 60)
    monkeypatch.setattr(doctor, "_DEVICES", "raise RuntimeError('no backend')")
    assert "RuntimeError: no backend" in findings()[0]["devices"]["text"]


def test_a_folder_that_is_not_there(findings, tmp_path):
    found, code = findings(tmp_path / "nowhere")
    assert code == 1 and found[str(tmp_path / "nowhere")]["text"].startswith("absent: ")


def test_credentials_are_found_and_not_shown(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "_DEVICES", "print('[[\"cpu\", null]]')")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    file = tmp_path / "credentials.json"
    told = {"type": "authorized_user", "client_id": "a", "client_secret": "verysecret", "refresh_token": "moresecret"}
    file.write_text(json.dumps(told))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "Google credentials: found (oauth2.credentials)" in printed and "secret" not in printed
    file.unlink()
    main(["doctor"])
    assert "names no file" in capsys.readouterr().out


def test_it_runs_as_people_run_it():
    program = [sys.executable, "-m", "medllm_jax.cli", "doctor"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "devices: " in done.stdout and done.stderr == ""

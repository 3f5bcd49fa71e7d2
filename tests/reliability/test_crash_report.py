"""Reports of runs that failed: complete, and without secrets."""

import json

import pytest
from etils import epath

from medllm_jax.reliability.crash_report import redact, write_report

SECRETS = [
    "Authorization: Bearer ya29.a0AfH6SMBx-abcdefgh",
    "token=hf_abcdefghijklmnopqrst",
    "401 for https://storage.googleapis.com/b/o?X-Goog-Signature=0123456789abcdef&x=1",
    "cloning https://user:s3cr3tpassword@example.org/repo failed",
    '{"api_key": "0123456789abcdefghij"}',
    "AIzaSyA0123456789abcdefghijklmnopqrstu is not valid",
    "wandb: ERROR api_key 0123456789abcdef0123456789abcdef01234567 is not configured",
    "password: correct-horse-battery",
]
PARTS = ("ya29.a0", "hf_abc", "0123456789abc", "s3cr3t", "AIzaSy", "correct-horse")


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(text):
    found = redact(text, {})
    assert "[hidden]" in found and not any(part in found for part in PARTS)


def test_what_the_environment_keeps_secret_is_hidden():
    environment = {"WANDB_API_KEY": "open sesame", "MY_TOKEN": "short", "HOME": "/home/somebody"}
    text = "open sesame: a short way to /home/somebody, step 12 of 100, layers/self_attn/q_proj/weight, tokens 4096"
    assert redact(text, environment) == text.replace("open sesame", "[hidden]")


def test_a_report_says_where_what_and_with_what(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "in-the-environment")
    try:
        raise ValueError("no such host: in-the-environment")
    except ValueError as error:
        path = write_report(epath.Path(tmp_path), "step 12", error)
    report = json.loads(path.read_text())
    assert path.parent == epath.Path(tmp_path) / "crashes"
    assert (report["stage"], report["error"], report["process"]) == ("step 12", "ValueError", 0)
    assert "test_a_report_says" in "".join(report["traceback"]) and report["versions"]["jax"]
    assert "in-the-environment" not in path.read_text() and report["message"] == "no such host: [hidden]"

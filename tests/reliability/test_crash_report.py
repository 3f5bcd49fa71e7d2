"""Reports of runs that failed: complete, and without secrets."""

import json

import jax
from etils import epath

from medllm_jax.reliability.crash_report import write_report


def test_a_report_says_where_what_and_with_what(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "in-the-environment")
    try:
        raise ValueError("no such host: in-the-environment")
    except ValueError as error:
        path = write_report(epath.Path(tmp_path), "step 12", error)
    report = json.loads(path.read_text())
    assert path.parent == epath.Path(tmp_path) / "crashes"
    assert (report["stage"], report["error"], report["process"]) == ("step 12", "ValueError", jax.process_index())
    assert "test_a_report_says" in "".join(report["traceback"]) and report["versions"]["jax"]
    assert "in-the-environment" not in path.read_text() and report["message"] == "no such host: [hidden]"

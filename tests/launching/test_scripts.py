"""Shell scripts pass shellcheck, the loop on a TPU VM keeps to the exit codes, and the image holds no secrets."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.launching.fakes import ROOT

LOOP = ROOT / "medllm_jax" / "launching" / "run_on_host.sh"
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "medllm_jax").rglob("*.sh"))
SCRIPTS += [(ROOT / ".ci" / "run").relative_to(ROOT)]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_shellcheck_finds_nothing(script):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def loop(fakes, codes, image="medllm", restarts=2):
    """Exit code of the loop, and how often it ran a container that ends with each of the codes in turn."""
    fakes.answer("docker", *(f"{code} " for code in codes))
    command = ["bash", str(LOOP), image, str(restarts), "5", "medllm", "train"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PAUSE_SECONDS": "0"})
    return done.returncode, len([call for call in fakes.calls() if call["program"] == "docker"])


@pytest.mark.parametrize(
    ("codes", "ends", "runs"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([127], 127, 1),
        ([1, 0], 0, 2),
        ([1, 1, 1, 0], 1, 3),  # two restarts, no more
        ([137, 134, 0], 0, 3),
        ([42, 42, 42, 42, 1, 1, 0], 0, 7),  # preemptions don't count
        ([1, 42, 2], 2, 3),
    ],
)
def test_the_loop_does_what_exit_codes_ask_for(fakes, codes, ends, runs):
    assert loop(fakes, codes) == (ends, runs)


def test_an_image_without_a_registry_needs_no_login(fakes):
    loop(fakes, [0], image="medllm:1")
    assert not [call for call in fakes.calls() if call["program"] == "gcloud"]


def test_the_loop_passes_a_notice_to_end_on_and_does_not_restart(tmp_path, monkeypatch):
    """docker stop makes the container end with 42, which is the loop's exit code, and the end."""
    started, stop = tmp_path / "started", tmp_path / "stop"
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\n'
        f'if [ "$1" = stop ]; then touch {stop}; exit 0; fi\n'
        f"touch {started}\nwhile [ ! -e {stop} ]; do sleep 0.05; done\nexit 42\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    running = subprocess.Popen(["bash", str(LOOP), "medllm", "2", "5", "medllm", "train"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 42, out
    assert (tmp_path / "calls").read_text().splitlines() == [
        "run --rm --name medllm --privileged --network host medllm medllm train",
        "stop --time 5 medllm",
    ]


def test_the_loop_says_what_it_takes():
    done = subprocess.run(["bash", str(LOOP), "image"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_the_image_is_pinned_and_holds_no_secrets():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    (base,) = (line for line in lines if line.startswith("FROM"))
    assert re.fullmatch(r"FROM python:3\.1[123]-slim", base)
    assert "--constraint pinned.txt '.[tpu]'" in text
    assert "ARG user=medllm" in lines and lines.index("ARG user=medllm") < lines.index("USER ${user}")
    assert not re.search(r"://|token|secret|password|key", "\n".join(lines), re.IGNORECASE)
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())

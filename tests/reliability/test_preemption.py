"""A run that is told to end saves, ends with 42, and goes on to the numbers of one that was not."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.load import to_yaml
from medllm_jax.errors import PREEMPTED, Preempted
from medllm_jax.reliability.preemption import PreemptionHandler
from medllm_jax.training.loop import train
from tests.distributed.test_processes import start_processes
from tests.training.test_train import assert_equal_bits, config_of, params_of

SLOW = (
    "import medllm_jax.observability.progress as p, time; "
    "a = p.Progress.add; p.Progress.add = lambda *x: [time.sleep(0.2), a(*x)]; "
)
MEDLLM = f"{SLOW}import sys; from medllm_jax.cli import main; sys.exit(main())"  # slow enough to be interrupted


class Reader:
    """A process, and what it has printed so far."""

    def __init__(self, process):
        self.process, self.text = process, ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            self.text += line

    def wait_for(self, pattern, seconds=300):
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def end(self, seconds=120):
        code = self.process.wait(timeout=seconds)
        self._thread.join()
        return code


def start(config, folder):
    file = folder / "run.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-c", MEDLLM, "train", "--config", str(file)]
    return Reader(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def test_it_saves_and_goes_on(world, tmp_path, metrics_of):
    config = config_of(world, tmp_path / "run", steps=24, every=100)
    reader = start(config, tmp_path)
    reader.wait_for(r"step 6/24")
    told = time.monotonic()
    reader.process.send_signal(signal.SIGTERM)
    assert reader.end() == PREEMPTED, reader.text
    assert time.monotonic() - told < 30
    step = steps(tmp_path / "run")[-1]
    assert 6 <= step < 24 and f"preempted: step {step} of 24 is saved; run the same command to resume" in reader.text
    assert not list(tmp_path.glob("run/crashes/*")) and not (tmp_path / "run" / "writer.json").exists()
    train(config)
    train(config_of(world, tmp_path / "undisturbed", steps=24, every=100))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "undisturbed")
    assert_equal_bits(params_of(tmp_path / "run"), params_of(tmp_path / "undisturbed"))
    sessions = (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()
    assert len(sessions) == 2 and f'"step": {step}' in sessions[1]


def test_a_second_notice_ends_it_at_once(world, tmp_path):
    reader = start(config_of(world, tmp_path / "run", steps=60, every=2), tmp_path)
    reader.wait_for(r"step 3/60")
    while not steps(tmp_path / "run"):  # a save is asynchronous, and may take longer than a step
        assert reader.process.poll() is None, reader.text
        time.sleep(0.01)
    for _ in range(2):
        reader.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert reader.end() in (-signal.SIGTERM, PREEMPTED)
    assert steps(tmp_path / "run"), "what was saved before is whole"


def test_before_there_is_something_to_save_it_just_ends():
    with pytest.raises(Preempted, match="before its first step"), PreemptionHandler():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_of_two_processes_both_save_the_same_step(world, tmp_path, metrics_of):
    config = config_of(world, tmp_path / "run", steps=60, every=100, distributed=True)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    readers = [Reader(p) for p in start_processes("-c", MEDLLM, "train", "--config", str(tmp_path / "run.yaml"))]
    readers[0].wait_for(r"step 6/60")
    readers[1].process.send_signal(signal.SIGTERM)
    codes = [reader.end() for reader in readers]
    assert codes == [PREEMPTED] * 2, "\n".join(reader.text for reader in readers)
    (step,) = steps(tmp_path / "run")
    assert all(f"step {step} of 60 is saved" in reader.text for reader in readers)
    assert [path.name for path in sorted(Path(tmp_path / "run" / "logs").iterdir())] == [
        "process-0.log",
        "process-1.log",
    ]

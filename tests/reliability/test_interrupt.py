"""Ctrl-C in a terminal: whatever the run does, it saves what there is, says how to go on, and ends with 130."""

import os
import pty
import re
import shlex
import subprocess
import sys
import threading
import time

import pytest

from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.load import to_yaml
from medllm_jax.errors import INTERRUPTED
from medllm_jax.training.loop import train
from tests.training.test_train import assert_equal_bits, config_of, params_of

# The run stops where STAGE says, says so, and goes on when the Ctrl-C has come, however busy the machine is. While the
# compiler works, Python's code hears no signal: there the handler is called afterwards, and a real compilation goes on.
TOLD = """
import fcntl, functools, logging, os, signal, sys, termios, threading
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this terminal's Ctrl-C is for us
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
import jax
from medllm_jax.checkpoint.orbax import CheckpointWriter
from medllm_jax.observability.progress import Progress
from medllm_jax.reliability.preemption import PreemptionHandler
from medllm_jax.training import loop

came, heard, compiling, waiting = threading.Event(), threading.Event(), threading.Event(), []

def stop_before(function):
    def stop(*arguments, **more):
        print(STAGE, flush=True)
        came.wait(600)
        return function(*arguments, **more)
    return stop

def take(self, *given, take=PreemptionHandler._take):
    came.set()
    waiting.append(functools.partial(take, self, *given))
    if not compiling.is_set():
        waiting.pop()()

def hear(record):
    heard.set()
    return True

def compile(self, *arguments, compile=jax.stages.Lowered.compile, **more):
    threading.Thread(target=compile, args=(self, *arguments), kwargs=more, daemon=True).start()
    compiling.set()
    print(STAGE, flush=True)
    (threading.Event() if STAGE.endswith("TWICE") else heard).wait(600)
    compiling.clear()
    waiting.pop()()

STAGE = os.environ["STAGE"]
PreemptionHandler._take = take
logging.getLogger("medllm_jax.reliability.preemption").addFilter(hear)
if STAGE == "STARTING":
    loop.run_folder.open_run = stop_before(loop.run_folder.open_run)
elif STAGE == "STEPPING":
    Progress.add = stop_before(Progress.add)
elif STAGE == "SAVING":
    CheckpointWriter.save = stop_before(CheckpointWriter.save)
else:
    jax.stages.Lowered.compile = compile
from medllm_jax.cli import main
sys.exit(main())
"""
CTRL_C = b"\x03"


class Terminal:
    """`medllm train` in a terminal of its own, and what it has printed so far."""

    def __init__(self, config, folder, stage):
        self.command = ["train", "--config", str(folder / "run.yaml")]
        (folder / "run.yaml").write_text(to_yaml(config))
        self._own, its = pty.openpty()
        program = [sys.executable, "-c", TOLD, *self.command]
        streams = {"stdin": its, "stdout": its, "stderr": its}
        environment = os.environ | {"STAGE": stage}
        self._process = subprocess.Popen(program, start_new_session=True, env=environment, **streams)
        os.close(its)
        self.text = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        content = b""
        try:
            while read := os.read(self._own, 4096):
                content += read
                self.text = content.decode(errors="replace")
        except OSError:  # of a terminal that nobody has open any more
            pass

    def wait_for(self, pattern):
        deadline = time.monotonic() + 300
        while not re.search(pattern, self.text):
            assert self._process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def interrupt(self):
        os.write(self._own, CTRL_C)

    def end(self):
        code = self._process.wait(timeout=300)
        self._thread.join()
        os.close(self._own)
        assert code == INTERRUPTED and "Traceback" not in self.text, self.text
        return self.text


def test_at_the_start_it_just_ends(world, tmp_path):
    terminal = Terminal(config_of(world, tmp_path / "run", steps=4), tmp_path, "STARTING")
    terminal.wait_for("STARTING")
    terminal.interrupt()
    terminal.end()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_while_it_compiles_there_is_nothing_to_save_and_another_config_may_follow(world, tmp_path, times):
    stage = "COMPILING" if times == 1 else "COMPILING TWICE"
    terminal = Terminal(config_of(world, tmp_path / "run", steps=4), tmp_path, stage)
    terminal.wait_for(stage)
    for number in range(times):
        terminal.interrupt()
        if number + 1 < times:
            terminal.wait_for("Ctrl-C: the run ends as soon as it can; a second one ends it at once")
    text = terminal.end()
    assert ("nothing to save" if times == 1 else "ended at once") in text and steps(tmp_path / "run") == []
    other = config_of(world, tmp_path / "run", steps=4, seed=5)
    train(other)
    train(config_of(world, tmp_path / "undisturbed", steps=4, seed=5))
    assert_equal_bits(params_of(tmp_path / "run"), params_of(tmp_path / "undisturbed"))
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("stage", ["STEPPING", "SAVING"])
def test_in_a_step_or_a_save_the_step_is_saved_and_the_command_that_goes_on_is_told(world, tmp_path, stage):
    config = config_of(world, tmp_path / "run", steps=20, every=3)
    terminal = Terminal(config, tmp_path, stage)
    terminal.wait_for(stage)
    terminal.interrupt()
    text = terminal.end()
    step = steps(tmp_path / "run")[-1]
    said = f"interrupted: step {step} of 20 is saved; to resume: medllm {shlex.join(terminal.command)}"
    assert step < 20 and said in text
    assert not list(tmp_path.glob("run/crashes/*")) and not (tmp_path / "run" / "writer.json").exists()
    train(config)
    train(config_of(world, tmp_path / "undisturbed", steps=20, every=3))
    assert_equal_bits(params_of(tmp_path / "run"), params_of(tmp_path / "undisturbed"))

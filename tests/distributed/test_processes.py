"""Two processes of four devices train as one process of eight does: same rows, same numbers, one set of files."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.load import to_yaml
from medllm_jax.config.schema import WatchdogConfig
from medllm_jax.distributed.processes import join
from medllm_jax.errors import RunError, UserError
from medllm_jax.training.loop import train
from medllm_jax.training.reference import cache_reference
from tests.training.test_train import HALVES, config_of, parts_of


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start_processes(*arguments, processes=2, devices=4, **environment):
    """The same Python program in several processes that find each other here; standard error goes with the output."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # of two the last one counts
    env = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        **environment,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([sys.executable, *arguments], env=env | {"JAX_PROCESS_ID": str(number)}, **pipes)
        for number in range(processes)
    ]


def medllm_in_two(*arguments):
    return start_processes("-m", "medllm_jax.cli", *map(str, arguments))


@pytest.mark.parametrize(
    ("environment", "fails_with", "error", "line"),
    [
        ({}, ValueError("coordinator_address should be defined."), UserError, "no cluster .coordinator_address should"),
        ({}, jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: a\nb"), RunError, "did not find each other .DEADLINE_EXC"),
        ({"JAX_PROCESS_ID": "-1"}, None, UserError, "JAX_PROCESS_ID is '-1': a whole number is expected"),
        ({"JAX_NUM_PROCESSES": "two"}, None, UserError, "JAX_NUM_PROCESSES is 'two': a whole number is expected"),
    ],
)
def test_processes_that_can_not_join_say_why_in_a_line(monkeypatch, environment, fails_with, error, line):
    def initialize(**_):
        raise fails_with

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=line) as caught:
        join(100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_two_processes_equal_one(world, tmp_path, metrics_of, kind):
    data = {}
    if kind == "cpt":
        data = {"store": parts_of(world.token_store, tmp_path, HALVES), "mix": {"first": 1, "second": 3}}
    alone = config_of(world, tmp_path / "alone", kind, steps=4, **data)
    if kind == "rpo":
        cache_reference(alone)
    train(alone)
    together = config_of(world, tmp_path / "together", kind, steps=4, distributed=True, **data)
    (tmp_path / "run.yaml").write_text(to_yaml(together))
    workers = medllm_in_two("train", "--config", tmp_path / "run.yaml")
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    expected, found = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "together")
    assert list(found) == [1, 2, 3, 4]
    for step, row in found.items():
        assert row == pytest.approx(expected[step], abs=1e-4)
    assert "step 4/4" in outputs[0] and "step 4/4" not in outputs[1], "only process 0 reports"
    train(together)  # and one process reads what two have written: the run is complete, nothing is left to do


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_dies_all_end_and_say_so(world, tmp_path, metrics_of, victim):
    """In bounded time; and started again, they go on to the numbers of one that nothing happened to."""
    from tests.reliability.test_preemption import MEDLLM, Reader

    config = config_of(world, tmp_path / "run", steps=20, every=4, distributed=True)
    config = dataclasses.replace(config, watchdog=WatchdogConfig(heartbeat_seconds=10))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    readers = [Reader(p) for p in start_processes("-c", MEDLLM, "train", "--config", str(tmp_path / "run.yaml"))]
    readers[0].wait_for("step 9/20")
    while not steps(tmp_path / "run"):  # a save may take longer than some steps
        time.sleep(0.01)
    readers[victim].process.kill()
    other = readers[1 - victim]
    code = other.end(seconds=240)
    assert code not in (0, 2, 42), other.text
    clear = "lost each other", "coordination service", "distributed service", "heartbeat"  # ours, or JAX's own words
    assert any(word in other.text for word in clear), other.text
    assert 4 <= steps(tmp_path / "run")[-1] < 20
    workers = medllm_in_two("train", "--config", tmp_path / "run.yaml")
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    train(config_of(world, tmp_path / "alone", steps=20, every=20))
    expected, found = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "run")
    for step, row in found.items():
        assert row == pytest.approx(expected[step], abs=2e-4)

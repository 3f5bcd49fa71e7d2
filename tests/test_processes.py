"""Two processes of four devices train as one process of eight does: same rows, same numbers, one set of files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_jax.reference import cache_reference
from medllm_jax.settings import to_yaml
from medllm_jax.train import train
from tests.test_train import HALVES, config_of, parts_of

WORKER = """
import sys
import jax
config_file, port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
from medllm_jax.settings import load_run_config
from medllm_jax.train import train
train(load_run_config(config_file))
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_two_processes_equal_one(world, tmp_path, metrics_of, kind):
    data = {}
    if kind == "cpt":
        data = {"store": parts_of(world.token_store, tmp_path, HALVES), "mix": {"first": 1, "second": 3}}
    alone = config_of(world, tmp_path / "alone", kind, steps=4, **data)
    if kind == "rpo":
        cache_reference(alone)
    train(alone)
    together = config_of(world, tmp_path / "together", kind, steps=4, **data)
    (tmp_path / "run.yaml").write_text(to_yaml(together))
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "run.yaml"), str(free_port())]
    workers = [
        subprocess.Popen([*command, str(number)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for number in range(2)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    expected, found = metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "together")
    assert list(found) == [1, 2, 3, 4]
    for step, row in found.items():
        assert row == pytest.approx(expected[step], abs=1e-4)
    assert "step 4/4" in outputs[0] and "step" not in outputs[1], "only process 0 reports"
    train(together)  # and one process reads what two have written: the run is complete, nothing is left to do

"""What the loop of a run does beside its steps: it waits for the device where metrics are fetched, and nowhere else."""

import dataclasses
import traceback

import jax
import pytest
from jax._src.array import ArrayImpl

from medllm_jax.checkpoint.orbax import CheckpointWriter
from medllm_jax.config.schema import LoggingConfig
from medllm_jax.observability.metrics import Meter
from medllm_jax.observability.progress import Progress
from medllm_jax.training import setup
from medllm_jax.training.loop import train
from tests.training.test_train import config_of


@pytest.fixture
def waits(monkeypatch):
    """Names of functions on the stack of whatever brought an array to the host, or waited for one, while the loop ran.

    Nothing may go the other way but what is put there on purpose.
    """
    found, inside = [], []

    def seen(what):
        if inside:
            found.append({frame.name for frame in traceback.extract_stack()} | {what})

    value, wait = ArrayImpl._value, ArrayImpl.block_until_ready
    monkeypatch.setattr(ArrayImpl, "_value", property(lambda self: [seen("value"), value.fget(self)][1]))
    monkeypatch.setattr(ArrayImpl, "block_until_ready", lambda self: [seen("wait"), wait(self)][1])

    class Watched(Progress):
        def __enter__(self):
            inside.append(jax.transfer_guard_host_to_device("disallow"))
            inside[0].__enter__()
            return super().__enter__()

        def __exit__(self, *error):
            inside.pop().__exit__(*error)
            super().__exit__(*error)

    monkeypatch.setattr(setup, "Progress", Watched)
    return found


def test_the_loop_waits_only_where_metrics_are_fetched_and_saved(world, tmp_path, waits):
    config = config_of(world, tmp_path / "run", steps=24, every=10)
    train(dataclasses.replace(config, logging=LoggingConfig(every=8)))
    allowed = {Meter.take.__name__, CheckpointWriter.save.__name__}
    assert waits and all(stack & allowed for stack in waits), [stack for stack in waits if not stack & allowed][:1]
    fetches = sum("take" in stack for stack in waits)
    metrics = fetches / 6  # after step 1, 8, 16 and 24, and before the saves of 10 and 20
    assert metrics == int(metrics) < 30, "each fetch brings every metric once"


def test_a_wait_in_the_loop_would_be_seen(world, tmp_path, waits, monkeypatch):
    add = Progress.add

    def waiting(self, step, metrics, *rest):
        float(metrics["loss"])
        add(self, step, metrics, *rest)

    monkeypatch.setattr(Progress, "add", waiting)
    train(config_of(world, tmp_path / "run", steps=2, every=10))
    assert not all(stack & {"take", "save"} for stack in waits)

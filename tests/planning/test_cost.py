"""What a run comes to: the sums by hand, and what is said where something is not known."""

import dataclasses

import pytest

from medllm_jax.checkpoint.orbax import steps
from medllm_jax.config.load import load_run_config
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.planning.cost import as_lines, run_cost, seconds_at
from medllm_jax.training.loop import train
from medllm_jax.training.resolve import resolve
from tests.training.test_train import config_of

POD = parse_topology("v5p:4x4x4")


def cost_of(config, **more):
    return run_cost(config, POD, **{"sequence_length": 4096, "seconds": 20.0} | more)


def config_72b(*settings):
    return resolve(load_run_config("cpt-72b-v5p-4x4x4", list(settings)), elsewhere=True)


def test_hours_chip_hours_and_price():
    cost = cost_of(config_72b(), price=4.2, store_rows=1_000_000)
    assert (cost["steps"], cost["tokens_in_a_step"]) == (10_000, 256 * 4096)
    assert cost["tokens"] == 10_000 * 256 * 4096 and cost["epochs"] == pytest.approx(2.56)
    assert cost["hours"] == pytest.approx(10_000 * 20 / 3600) and cost["chip_hours"] == pytest.approx(
        cost["hours"] * 64
    )
    assert cost["price"] == pytest.approx(cost["chip_hours"] * 4.2)
    assert cost_of(config_72b(), tokens=10**9)["steps"] == 954


def test_the_parameters_of_72b_are_those_that_are_published():
    cost = cost_of(config_72b())
    assert cost["initial_weights_bytes"] == 2 * 72_706_203_648  # 72.7 billion, by its model card
    # Weights, and both moments of AdamW, in float32; counters and a key beside them.
    assert 0 < cost["checkpoint_bytes"] - 12 * 72_706_203_648 < 1000
    assert cost["kept_bytes"] == 3 * cost["checkpoint_bytes"]
    assert cost["read_seconds"] == pytest.approx(cost["initial_weights_bytes"] / 16 / 1e9)
    twice = cost_of(config_72b("--mesh.data", "2", "--mesh.fsdp", "32"))
    assert twice["read_seconds"] == pytest.approx(2 * cost["read_seconds"]), "two replicas, each read by half the hosts"


def test_a_step_at_an_mfu():
    """6 N a token, and 6 L H E S a token for causal attention, over what 64 chips can do."""
    config = config_72b()
    matrices = 72_706_203_648 - 152_064 * 8192  # the embedding is looked up
    of_a_token = 6 * matrices + 6 * 80 * 64 * 128 * 4096
    seconds = seconds_at(0.5, config, POD, 4096)
    assert seconds == pytest.approx(256 * 4096 * of_a_token / (0.5 * 64 * 459e12), rel=1e-3)


def test_what_is_not_known_is_said():
    config = config_72b("--data.epochs", "2")
    (run, _, start) = as_lines(cost_of(config, seconds=None))
    assert "its steps follow from data.epochs and the store, which was not read" in run
    assert "compiling, minutes" in start
    read = cost_of(config, store_rows=2_560, seconds=None, compile_seconds=75.0)
    assert read["steps"] == 20 and read["epochs"] == 2.0
    (run, _, start) = as_lines(read)
    assert "20 steps of 1,048,576 tokens: 20,971,520 tokens, 2.00 epochs of the store" in run
    assert (
        "9s of reading 145.4 GB of weights (bfloat16), 1 GB/s a host and 1m15s of compiling, as it took here" in start
    )
    random_weights = dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint=None))
    assert "weights" not in [*as_lines(cost_of(random_weights))][-1]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoint_is_as_large_as_it_is_said_to_be(world, tmp_path, adapter):
    """Against what lies in a run folder: its arrays, without compression, index and metadata."""
    config = config_of(world, tmp_path / "run", steps=1)
    if adapter:
        from medllm_jax.config.schema import AdapterConfig

        config = dataclasses.replace(config, adapter=AdapterConfig(rank=4))
    train(config)
    (step,) = steps(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / str(step)
    found = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    said = cost_of(resolve(config))["checkpoint_bytes"]
    assert 0.5 * said < found < said + 200_000

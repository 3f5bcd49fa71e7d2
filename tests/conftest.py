"""Eight virtual CPU devices for every test, and a tiny world shared by the tests that train."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# No cache of compiled programs: XLA for CPUs forgets the order of a program's collectives when it reads one back, and
# devices that wait for each other at different ones wait until the process is ended.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import json

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and dtypes that these modules annotate are checked at every call; before any of them is imported.
SHAPES_CHECKED = (
    "medllm_jax.data.batch",
    "medllm_jax.inference.generator",
    "medllm_jax.model.attention",
    "medllm_jax.model.quantize",
    "medllm_jax.model.qwen2",
    "medllm_jax.training.losses",
)
install_import_hook(SHAPES_CHECKED, "beartype.beartype")

settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tokenizer, a small corpus and pairs, their stores, and a random model as a run folder."""
    from tests.world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def metrics_of():
    """Reads a run's metrics: step -> row, without the timings."""

    def read(run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        timings = {"step_seconds", "tokens_per_second", "data_wait", "startup_seconds", "goodput", "host_memory_gib"}
        return {row["step"]: {k: v for k, v in row.items() if k not in timings} for row in rows}

    return read

"""Eight virtual CPU devices for every test, and a tiny world shared by the tests that train."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run for milliseconds and are compiled for seconds: the compiler is told to try less. What is set outside
# wins.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # A process ends at a flag it doesn't know: newer versions of XLA and libtpu don't have this one.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)
os.environ["MEDLLM_TRACEBACK"] = "1"  # an error that nobody foresaw fails its test, instead of being told in one line
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["OMP_NUM_THREADS"] = "1"  # of torch: several workers share few cores, and its threads wait by spinning
# No cache of compiled programs: XLA for CPUs forgets the order of a program's collectives when it reads one back, and
# devices that wait for each other at different ones wait until the process is ended.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import json
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from medllm_jax.terminal.log import show_messages
from tests import shapes

# Before any of the modules is imported.
install_import_hook(shapes.CHECKED, f"{shapes.__name__}.check")
show_messages()

settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("untimed")

# Files of tests that train, convert or start processes, the longest first: they are begun first, so that no worker is
# left alone with one at the end, and `make quick` leaves them out.
LONG = (
    *("distributed/test_processes", "training/test_train", "conversion/test_survives", "checkpoint/test_orbax"),
    *("training/test_step", "training/test_adapters", "reliability/test_preemption", "conversion/test_convert_hf"),
    *("storage/test_gcs", "conversion/test_peft", "checkpoint/test_handle", "data/test_gcs_faults"),
    *("test_fuzz", "test_written_before", "conversion/test_hf_weights"),
    *("inference/test_generator", "data/test_loader", "reliability/test_bad_steps"),
    *("cli/test_cli", "conversion/test_memory", "inference/test_likelihood", "model/test_splash"),
    *("recipes/test_rounds", "observability/test_observability", "test_wheel", "storage/test_lease"),
    *(
        "data/prepare/test_corpus",
        "data/prepare/test_hub_dataset",
        "checkpoint/test_fingerprint",
        "conversion/test_card",
        "training/test_loop",
    ),
    *("observability/test_sessions", "training/test_rpo_peers", "conversion/test_foreign_models"),
)
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Marks long tests, and spreads them over the beginnings of what each of two or three workers is given first."""
    places = {(_HERE / f"{name}.py").resolve(strict=True): place for place, name in enumerate(LONG)}
    for item in items:
        if item.path in places:
            item.add_marker("long")
    other = [item for item in items if item.path not in places]
    parts = 6  # workers are given consecutive items: halves and thirds all begin with long files, each of them whole
    size = -(-len(other) // parts)
    ordered = []
    for part in range(parts):
        long = [item for item in items if places.get(item.path, -1) % parts == part and item.path in places]
        ordered += sorted(long, key=lambda item: places[item.path])
        ordered += other[part * size : (part + 1) * size]
    items[:] = ordered


@pytest.fixture
def flags_of_libtpu(monkeypatch):
    """Processes that the test starts are given XLA flags that libtpu knows."""
    flags = os.environ["XLA_FLAGS"].split()
    known = [flag for flag in flags if not flag.startswith("--xla_cpu_use_fusion_emitters")]
    monkeypatch.setenv("XLA_FLAGS", " ".join(known))


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

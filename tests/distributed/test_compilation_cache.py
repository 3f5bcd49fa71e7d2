"""Which environment keeps compiled programs, and that a second process finds those of the first."""

import os
import subprocess
import sys

import pytest

from medllm_jax.distributed.compilation_cache import default_folder, keep_programs

PROGRAM = """
import sys
from medllm_jax.distributed.compilation_cache import keep_programs
keep_programs()
import jax, jax.numpy as jnp
compiled = []
jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name.rsplit("/", 1)[-1]))
def f(x):
    for n in range(200):
        x = jnp.sin(x @ x) + n
    return x
print(float(jax.jit(f)(jnp.ones((8, 8))).sum()), len(jax.devices()))
print(compiled.count("cache_hits"), compiled.count("cache_misses"))
"""


@pytest.fixture
def environment(tmp_path):
    return {"HOME": str(tmp_path)}


def test_programs_are_kept_in_the_users_cache_folder(environment, tmp_path):
    folder = keep_programs(environment)
    assert folder == default_folder(environment)
    assert folder.is_relative_to(tmp_path / ".cache" / "medllm_jax" / "programs")
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) == 2 * 2**30
    moved = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "elsewhere")}
    assert keep_programs(moved).is_relative_to(tmp_path / "elsewhere" / "medllm_jax")


@pytest.mark.parametrize(
    "said",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/some/where"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        {"JAX_NUM_CPU_DEVICES": "8"},
        {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=12"},
    ],
)
def test_what_is_said_of_the_cache_stays(environment, said):
    environment |= said
    before = dict(environment)
    assert keep_programs(environment) is None
    assert environment == before


@pytest.mark.parametrize(
    "said", [{"JAX_NUM_CPU_DEVICES": "1"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}]
)
def test_one_device_keeps_its_programs(environment, said):
    environment |= said
    assert keep_programs(environment) == default_folder(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(default_folder(environment))


def test_a_home_that_nobody_may_write_keeps_nothing(environment, tmp_path):
    (tmp_path / "file").write_text("")
    assert keep_programs({"HOME": str(tmp_path / "file" / "home")}) is None


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    plain |= {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    plain.pop("XDG_CACHE_HOME", None)

    def run(**more) -> list[list[float]]:
        command = [sys.executable, "-c", PROGRAM]
        lines = subprocess.run(command, env=plain | more, capture_output=True, text=True, check=True).stdout
        return [[float(word) for word in line.split()] for line in lines.splitlines()]

    first, second = run(), run()
    assert first[0] == second[0]
    assert first[1][0] == 0
    assert second[1][0] >= 1
    assert list(default_folder(plain).iterdir())
    assert run(JAX_ENABLE_COMPILATION_CACHE="false")[1] == [0, 0]

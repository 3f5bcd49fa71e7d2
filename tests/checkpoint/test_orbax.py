"""Checkpoints that are damaged are found out, set aside, and never trained on or passed on."""

import dataclasses
import gc
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from medllm_jax.checkpoint import orbax
from medllm_jax.checkpoint.handle import DamagedError, open_checkpoint
from medllm_jax.checkpoint.orbax import steps
from medllm_jax.cli.convert import main as convert
from medllm_jax.config.load import to_yaml
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import RunError
from medllm_jax.model.abstract import abstract_model
from medllm_jax.reliability.supervision import restore
from medllm_jax.reliability.watchdog import Watchdog
from medllm_jax.training.loop import train
from medllm_jax.training.programs import train_program
from medllm_jax.training.resolve import resolve
from tests.training.test_train import assert_equal_bits, config_of, params_of
from tests.world import tiny_config

# Orbax leaves coroutines behind where it fails.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run with checkpoints 4 and 6, the shapes of its state, and what each checkpoint holds."""
    run = tmp_path_factory.mktemp("finished") / "run"
    config = config_of(world, run)
    train(config)
    abstract = train_program(resolve(config), make_mesh(config.mesh)).abstract
    return run, abstract, {step: jax.device_get(open_checkpoint(run, step).load_state(abstract)) for step in (4, 6)}


def files_of(run, step):
    return sorted(path for path in (Path(run) / "checkpoints" / str(step)).rglob("*") if path.is_file())


def flip(file, rng):
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_or_harmless(finished, tmp_path, capsys):
    run, abstract, states = finished
    rng, found = random.Random(0), []
    for number, file in enumerate(files_of(run, 6)):
        for again in range(3 if "/d/" in str(file) else 1):  # the arrays' data
            if not file.stat().st_size:
                continue
            copy = shutil.copytree(run, tmp_path / f"{number}-{again}")
            flip(copy / file.relative_to(run), rng)
            restored = restore(copy, abstract, Watchdog(0))
            assert_equal_bits(jax.device_get(restored.state), states[restored.step])
            said = capsys.readouterr().err
            assert (restored.step == 4) == ("warning: checkpoint 6 of" in said)
            assert (restored.step == 4) == (copy / "damaged" / "6").exists() == (steps(copy) == [4])
            found.append((restored.step, file.name))
            shutil.rmtree(copy)
    assert {step for step, _ in found} == {4, 6}
    assert sum(step == 4 for step, _ in found) > len(found) / 3


@pytest.mark.parametrize("part", ["params", "training", "meta"])
@pytest.mark.parametrize("how", ["cut", "removed"])
def test_what_was_lost_is_found(finished, tmp_path, part, how, capsys):
    run, abstract, states = finished
    copy = shutil.copytree(run, tmp_path / "copy")
    files = (path for path in files_of(copy, 6) if f"/6/{part}/" in str(path))
    largest = max(files, key=lambda path: path.stat().st_size)
    if how == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        largest.unlink()
    restored = restore(copy, abstract, Watchdog(0))
    assert restored.step == 4 and "warning: checkpoint 6" in capsys.readouterr().err
    assert_equal_bits(jax.device_get(restored.state), states[4])


def test_a_run_goes_on_from_the_good_one_to_the_same_end(world, finished, tmp_path, metrics_of, capsys):
    copy = shutil.copytree(finished[0], tmp_path / "run")
    spoil_arrays(copy, 6)
    train(config_of(world, copy))
    assert "warning: checkpoint 6" in capsys.readouterr().err
    assert metrics_of(copy) == metrics_of(finished[0]) and steps(copy) == [4, 6]
    assert_equal_bits(params_of(copy), params_of(finished[0]))
    spoil_arrays(copy, 6)  # once more: what was set aside before is not lost
    train(config_of(world, copy))
    assert {path.name for path in (copy / "damaged").iterdir()} == {"6", "6-1"}


def spoil_arrays(run, step):
    """Other bytes in arrays that Orbax reads without noticing."""
    rng = random.Random(1)
    for file in files_of(run, step):
        if "/d/" in str(file) and "meta" not in str(file):
            for _ in range(20):
                flip(file, rng)


@pytest.mark.parametrize(
    ("note", "is_aside"),
    [
        ('{"item_handlers": Infinity}', True),
        ('{"commit_timestamp_nsecs": "today"}', True),
        (f'{{"item_handlers": {{}}, "commit_timestamp_nsecs": {10**40}}}', True),
        ("[" * 100_000, True),
        ("", False),  # Orbax does without, where it lists
    ],
)
def test_an_older_checkpoint_that_would_end_the_writer_is_set_aside(world, finished, tmp_path, capsys, note, is_aside):
    copy = shutil.copytree(finished[0], tmp_path / "run")
    (copy / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text(note)
    longer = dataclasses.replace(config_of(world, copy), steps=7)
    train(longer, force=True)
    assert (steps(copy) == [6, 7]) and (copy / "damaged" / "4").exists() == is_aside
    said = capsys.readouterr().err
    assert ("checkpoint 4 of" in said and "the run goes on from step 6" in said) == is_aside


@pytest.mark.parametrize("name", ["meta/_strings.json", "params/_sharding", "training/_sharding"])
def test_what_nests_without_end_is_not_given_to_libraries(finished, tmp_path, name):
    """One of them would end the process."""
    copy = shutil.copytree(finished[0], tmp_path / "run")
    (copy / "checkpoints" / "6" / name).write_text('{"digest": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(DamagedError, match=name.rpartition("/")[2]):
        open_checkpoint(copy).load_state(finished[1])


def test_several_arrays_that_cannot_be_read_are_one_warning(finished, tmp_path, capsys, monkeypatch):
    """Orbax leaves readings behind, of which Python tells with tracebacks."""
    run, abstract, _ = finished
    copy, told = shutil.copytree(run, tmp_path / "copy"), []
    for file in files_of(copy, 6):
        if "/6/params/" in str(file) and "/d/" in str(file):
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", told.append)
        orbax._leave_out_readings.cache_clear()
        assert restore(copy, abstract, Watchdog(0)).step == 4
        gc.collect()
    orbax._leave_out_readings.cache_clear()
    assert not told and capsys.readouterr().err.count("\n") == 1


def test_where_none_is_good_nothing_is_begun_again(world, finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "run")
    for step in (4, 6):
        spoil_arrays(copy, step)
    with pytest.raises(RunError, match=r"none of the checkpoints of .* \(6, 4\) can be read"):
        train(config_of(world, copy))
    with pytest.raises(RunError):  # nor at the next start
        train(config_of(world, copy))


def test_nobody_else_takes_a_damaged_model(finished, tmp_path, capsys):
    copy = shutil.copytree(finished[0], tmp_path / "run")
    wrong = changed_weights(copy)
    plan = abstract_model(tiny_config(), PrecisionConfig(), make_mesh(MeshConfig()))
    with pytest.raises(DamagedError, match=f"checkpoint 6 of .* holds other bytes in params/{wrong} than were written"):
        open_checkpoint(copy).load_params(plan.abstract)
    assert convert(["to-hf", str(copy), str(tmp_path / "export")]) == 1
    assert f"other bytes in params/{wrong}" in capsys.readouterr().err and not (tmp_path / "export").exists()


def changed_weights(run):
    """Writes a checkpoint again with one weight that is another, and what it says of itself as it was."""
    import json

    from orbax.checkpoint import v1 as ocp

    folder = (Path(run) / "checkpoints" / "6").absolute()
    items = ocp.load_checkpointables(folder)
    items["params"]["norm"]["weight"] = np.nextafter(np.asarray(items["params"]["norm"]["weight"]), 2)
    assert json.dumps(items["meta"]) == json.dumps(open_checkpoint(run, 6).meta)
    shutil.rmtree(folder)
    ocp.save_checkpointables(folder, items)
    return "norm/weight"


WITH_LITTLE_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from medllm_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_ends_the_run_in_one_line_and_spoils_nothing(world, finished, tmp_path, metrics_of):
    config = config_of(world, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", WITH_LITTLE_DISK, "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    last = done.stderr.strip().splitlines()[-1]  # what comes before it is Orbax's
    assert done.returncode == 1 and last.startswith("error: ")
    assert "no space is left" in last and "the run goes on from its last checkpoint" in last
    train(config)
    assert metrics_of(tmp_path / "run") == metrics_of(finished[0])

"""Conversions that are killed, run out of disk, or use a bucket that answers badly, end as undisturbed ones do."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medllm_jax.checkpoint.chunk_files import ChunkFiles
from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.orbax import steps
from medllm_jax.cli.convert import main
from medllm_jax.conversion import folders, from_hf, run_weights, shards
from medllm_jax.conversion.hf_weights import HFFolder, open_hf
from medllm_jax.errors import RunError, UserError
from tests.gcs import Faults, Gcs, be_impatient
from tests.gcs_programs import Python, faults_crash_python, run
from tests.tiny_hf import make_hf_folder
from tests.warm import WarmPython

FAULTS = Faults(unavailable=0.08, reset=0.03, slow=0.05, delay_seconds=0.02)
_PAUSE = 0.03  # seconds for each slice, in processes that are to be killed


# How slices are read: from buckets, and of local files that are copied by each verb.
READING = {
    "from-hf": (ChunkFiles, "fill"),
    "to-hf": (ChunkFiles, "copy"),
    "from a bucket, in HF's format": (HFFolder, "read"),
    "from a run in a bucket": (run_weights.RunWeights, "read"),
}


def of_this_file(function, *arguments):
    """What Python is to be started with, so that it calls a function of this file."""
    name = function.__name__
    return (
        "-c",
        f"import sys; from tests.conversion.test_survives import {name}; {name}(*sys.argv[1:])",
        *map(str, arguments),
    )


# --- in processes of their own ---------------------------------------------------------------------------------------


def convert_slowly(*arguments):
    """A conversion that takes long enough to be killed in, and notes often what is done."""
    for side, name in READING.values():
        setattr(side, name, _pausing(getattr(side, name)))
    folders._SECONDS = 0.05
    shards._UPLOAD_BYTES = 256 << 10
    be_impatient()
    sys.exit(main(arguments))


def _pausing(read):
    def after_a_pause(*arguments):
        time.sleep(_PAUSE)
        return read(*arguments)

    return after_a_pause


def convert_with_little_disk(size, *arguments):
    """A conversion that cannot write a file beyond a size: what a full disk looks like to it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    sys.exit(main(arguments))


# --- what is compared ------------------------------------------------------------------------------------------------


def is_complete(folder, expected):
    """Whether all of it is there: it was killed after the last file was written, and before it was put in its place."""
    found = {name: data for name, data in contents(folder).items() if not name.startswith(".conversion-")}
    return found == contents(expected)


def contents(folder):
    """Name -> bytes of all files below a folder, and what a checkpoint in it says of itself.

    Of Orbax's own files, one notes the time and some have random names.
    """
    files = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    ours = {name for name in files if "/meta/" not in name and not name.endswith("_CHECKPOINT_METADATA")}
    found = {name: files[name].read_bytes() for name in sorted(ours)}
    return found | ({"meta": open_checkpoint(folder).meta} if steps(folder) else {})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`hf`, `run` and `out`: a checkpoint, and what undisturbed conversions make of it and of that."""
    root = tmp_path_factory.mktemp("undisturbed")
    make_hf_folder(root / "hf", dtype="bfloat16", tied=False, shards=3, layers=4)
    for step in steps_in(root):
        assert main(step) == 0
    return root


def steps_in(root, source=None):
    """The arguments of both conversions."""
    source = source or root
    return (
        ["from-hf", f"{source}/hf", f"{root}/run"],
        ["to-hf", f"{source}/run", f"{root}/out", "--max-shard-size", "40KB"],
    )


def assert_not_loadable(folder):
    for open_it in (open_hf, open_checkpoint):
        with pytest.raises((UserError, RunError)):
            open_it(folder)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["from-hf", "to-hf"])
def test_killed_and_resumed_is_as_if_undisturbed(place, tmp_path, verb, kills):
    step = next(step for step in steps_in(tmp_path, place) if step[0] == verb)
    target, name = tmp_path / Path(step[2]).name, Path(step[2]).name
    rng, killed, resumed = random.Random(verb), 0, 0
    while killed < kills or not target.exists():
        if target.exists():
            assert contents(target) == contents(place / name)
            shutil.rmtree(target)
        going_on = folders.unfinished_folder(target).exists()
        more = ["--resume"] if going_on else []
        process = WarmPython(*of_this_file(convert_slowly, *step, *more), stdout=subprocess.PIPE)
        process.stdout.readline()  # it says what it takes, and begins
        if killed < kills:
            time.sleep(rng.uniform(0, 0.7))
            process.kill()
        resumed += going_on
        if process.wait() == -signal.SIGKILL:
            killed += 1
            unfinished = folders.unfinished_folder(target)
            if not target.exists() and not is_complete(unfinished, place / name):
                assert_not_loadable(unfinished)
        else:
            assert process.returncode == 0
        process.stdout.close()
    assert contents(target) == contents(place / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert resumed > 0


def test_sigterm_keeps_what_is_done(place, tmp_path):
    step = steps_in(tmp_path, place)[1]
    code = (
        "import sys; from tests.conversion import test_survives as t; from medllm_jax.cli import convert as m;"
        "t.ChunkFiles.copy = t._pausing(t.ChunkFiles.copy); t._PAUSE = 0.05; sys.exit(m.main())"
    )
    process = WarmPython("-c", code, *step, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume goes on with it" in said
    assert main([*step, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(place / "out")


# --- begun, and gone on with otherwise -------------------------------------------------------------------------------


@pytest.fixture
def begun(place, tmp_path, monkeypatch):
    """Both conversions, broken off when some of their units are done: slices, or a shard."""

    def breaking_off(note, left):
        def note_or_break(*unit):
            nonlocal left
            left -= 1
            if left < 0:
                raise InterruptedError
            note(*unit)

        return note_or_break

    for units, step in zip((20, 1), steps_in(tmp_path, place), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(folders.ResumableFolder, "note", breaking_off(folders.ResumableFolder.note, units))
            with pytest.raises(InterruptedError):
                main(step)
    return tmp_path


def test_what_was_begun_is_not_begun_again_unasked(place, begun, capsys):
    before = contents(begun)
    for step in steps_in(begun, place):
        capsys.readouterr()
        assert main(step) == 2
        assert "--resume goes on with it" in capsys.readouterr().err
    assert contents(begun) == before


@pytest.mark.parametrize(("verb", "option"), [(0, ["--mesh", "fsdp=2"]), (1, ["--dtype", "float32"])])
def test_what_was_begun_otherwise_is_not_mixed(place, begun, capsys, verb, option):
    before = contents(begun)
    assert main([*steps_in(begun, place)[verb], *option, "--resume"]) == 2
    assert "is another conversion" in capsys.readouterr().err
    assert contents(begun) == before


def test_a_source_that_changed_meanwhile_is_not_mixed(place, begun, tmp_path, capsys):
    source = shutil.copytree(place / "hf", tmp_path / "other")
    os.utime(source / "model-00002-of-00003.safetensors", (0, 0))
    step = ["from-hf", str(source), str(begun / "run"), "--resume"]
    assert main(step) == 2
    assert "source differ" in capsys.readouterr().err


def test_nothing_is_converted_twice(place, begun, monkeypatch):
    reads = []
    for step in steps_in(begun, place):
        side, name = READING[step[0]]
        monkeypatch.setattr(side, name, counting(getattr(side, name), reads))
        assert main([*step, "--resume"]) == 0
        assert contents(begun / Path(step[2]).name) == contents(place / Path(step[2]).name)
    slices = 2 * len(open_hf(place / "hf").tensors)
    assert slices - 75 < len(reads) < slices - 15


def removed(shard, _):
    shard.unlink()


def cut(shard, _):
    os.truncate(shard, 1000)


def not_noted(_, notes):
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"done": {}}))


@pytest.mark.parametrize("lost", [removed, cut, not_noted])
def test_a_shard_that_was_lost_or_not_noted_is_written_again(place, begun, lost):
    """As where the machine stopped before it was on the disk, or the conversion before it was noted."""
    unfinished = folders.unfinished_folder(begun / "out")
    lost(Path(min(unfinished.glob("*.safetensors"))), Path(unfinished / ".conversion-0.json"))
    assert main([*steps_in(begun, place)[1], "--resume"]) == 0
    assert contents(begun / "out") == contents(place / "out")


def test_a_replacement_that_was_stopped_between_its_renames_is_gone_on_with(place, tmp_path, monkeypatch):
    """The old folder was put aside, and the new one not yet in its place."""
    shutil.copytree(place / "out", tmp_path / "out")
    step, rename = steps_in(tmp_path, place)[1], Path.rename

    def only_aside(path, target):
        if path.name == ".out.unfinished":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_aside)
        assert main([*step, "--overwrite"]) == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.replaced", ".out.unfinished"]
    assert main([*step, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(place / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


NOTES = [
    "",
    "[]",
    '{"what": 1}',
    '{"what": {}, "finished": 0, "done": {}}',
    '{"done": {"x": 5}, "what": {}, "finished": true}',
]


@pytest.mark.parametrize("text", NOTES)
def test_damaged_notes_are_one_line(place, tmp_path, capsys, text):
    unfinished = folders.unfinished_folder(tmp_path / "out")
    unfinished.mkdir()
    (unfinished / ".conversion-0.json").write_text(text)
    assert main([*steps_in(tmp_path, place)[1], "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"these notes are damaged: remove {unfinished} and begin anew" in error and error.count("\n") == 1


def counting(read, reads):
    def counted(*arguments):
        reads.append(arguments[1])
        return read(*arguments)

    return counted


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [0, 1])
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(place, tmp_path, verb):
    step = steps_in(tmp_path, place)[verb]
    limit = (5000, 30_000)[verb]
    program = of_this_file(convert_with_little_disk, limit, *step)
    process = WarmPython(*program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert said.count("\n") == 1
    assert "the disk is full" in said or "no space is left" in said  # there, or where a tokenizer is tried
    target = Path(step[2])
    assert not target.exists()
    assert_not_loadable(folders.unfinished_folder(target))
    more = ["--resume"] if folders.unfinished_folder(target).exists() else []
    assert main([*step, *more]) == 0
    assert contents(target) == contents(place / target.name)


def test_too_little_room_is_said_before_anything_is_written(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    for step in steps_in(tmp_path, place):
        assert main(step) == 2
        assert "are needed and the disk of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- several processes -----------------------------------------------------------------------------------------------


def test_shares_of_several_processes_make_the_same_folder(place, tmp_path, capsys):
    step = steps_in(tmp_path, place)[0]
    assert main([*step, "--part", "2/3"]) == 0
    assert "the last part to be ready completes it" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    programs = [WarmPython("-m", "tools.convert_hf", *step, "--part", part) for part in ("1/3", "3/3")]
    assert [program.wait(timeout=120) for program in programs] == [0, 0]
    assert contents(tmp_path / "run") == contents(place / "run")
    assert main([*step, "--part", "4/3"]) == 2


@pytest.fixture
def parts(place, tmp_path):
    """Does part number of two, which is done already if the folder is not yet there; the parts of one conversion."""

    def convert(number):
        from_hf.from_hf(f"{place}/hf", f"{tmp_path}/run", part=(number, 2), resume=True)

    convert(1)
    assert not (tmp_path / "run").exists()
    yield convert
    assert contents(tmp_path / "run") == contents(place / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_part_that_is_ready_while_another_completes_leaves_it_to_that(parts, monkeypatch, capsys):
    finish_model, said = from_hf.finish_model, []

    def finish_while_the_other_tries(*arguments):
        capsys.readouterr()
        parts(1)
        said.append(capsys.readouterr().out)
        finish_model(*arguments)

    monkeypatch.setattr(from_hf, "finish_model", finish_while_the_other_tries)
    parts(0)
    assert len(said) == 1
    assert "part 2 of 2 is done" in said[0]


def test_a_part_that_finds_all_done_when_another_has_completed_it_ends_well(parts, monkeypatch, capsys):
    finish, waiting = folders.ResumableFolder.finish, [True]

    def finish_and_be_late(filling):
        all_done = finish(filling)
        if all_done and waiting.pop():
            waiting.append(False)
            parts(1)
        return all_done

    monkeypatch.setattr(folders.ResumableFolder, "finish", finish_and_be_late)
    parts(0)
    assert "part 1 of 2 is done" in capsys.readouterr().out


def test_notes_that_vanish_while_they_are_read_say_that_another_part_completed(parts, monkeypatch):
    read = folders.ResumableFolder._read

    def read_late(filling, file):
        monkeypatch.setattr(folders.ResumableFolder, "_read", read)
        parts(1)
        return read(filling, file)

    def finish(filling):
        monkeypatch.setattr(folders.ResumableFolder, "finish", whole_finish)
        monkeypatch.setattr(folders.ResumableFolder, "_read", read_late)
        return whole_finish(filling)

    whole_finish = folders.ResumableFolder.finish
    monkeypatch.setattr(folders.ResumableFolder, "finish", finish)
    parts(0)


def test_files_that_another_part_renames_meanwhile_are_no_trouble(tmp_path, monkeypatch):
    unfinished = folders.unfinished_folder(tmp_path / "run")
    unfinished.mkdir()
    (unfinished / "there").write_bytes(b"0" * 10_000)
    walk = os.walk(unfinished)
    monkeypatch.setattr(folders.os, "walk", lambda _: [(path, [], [*names, "gone"]) for path, _, names in walk])
    folders.check_room(tmp_path / "run", 1)


# --- in a bucket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gcs(place):
    with Gcs("bucket") as server:
        server.upload(place / "hf", "gs://bucket/hf")
        server.faults = FAULTS
        yield server


def assert_same_in_the_bucket(gcs, place, tmp_path):
    for name in ("run", "out"):
        for file in gcs.names(f"gs://bucket/{name}/"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(gcs.get(f"gs://bucket/{name}/{file}"))
        assert contents(tmp_path / name) == contents(place / name)


@faults_crash_python
def test_a_bucket_that_answers_badly_gets_the_same_folders(gcs, place, tmp_path):
    for step in steps_in("gs://bucket"):
        run(gcs, *of_this_file(convert_slowly, *step))
    checked = run(gcs, *of_this_file(convert_slowly, "verify", "gs://bucket/hf", "gs://bucket/out", "--by", "hash"))
    assert checked.endswith("agree\n")
    assert {entry.fault for entry in gcs.log} == {None, "unavailable", "lost", "reset", "cut", "slow"}
    assert_same_in_the_bucket(gcs, place, tmp_path)


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_in_a_bucket_and_resumed(gcs, place, tmp_path, kills):
    gcs.faults = Faults()
    rng = random.Random(0)
    for step, whole in zip(
        steps_in("gs://bucket"), ("commit_success.txt", "model.safetensors.index.json"), strict=True
    ):
        name, killed = step[2].removeprefix("gs://bucket/"), 0
        while not is_whole(gcs, name, whole):
            begun = any(key.startswith(f"{name}/.conversion-") for key in gcs.buckets["bucket"])
            process = Python(gcs, *of_this_file(convert_slowly, *step, *(["--resume"] if begun else [])))
            while killed < kills and process.poll() is None and count(gcs, name) < (killed + 1) * 8:
                time.sleep(0.01)
            if killed < kills and process.poll() is None:
                time.sleep(rng.uniform(0, 0.2))
                process.kill()
                killed += 1
            output = process.output()
            assert process.returncode in (0, -signal.SIGKILL), output
        assert killed
        if process.returncode:  # killed when all was there but the notes, which --resume then clears
            run(gcs, *of_this_file(convert_slowly, *step, "--resume"))
    assert_same_in_the_bucket(gcs, place, tmp_path)


def is_whole(gcs, name, last):
    return any(key.startswith(f"{name}/") and key.endswith(last) for key in gcs.buckets["bucket"])


def count(gcs, name):
    return sum(key.startswith(f"{name}/") for key in gcs.buckets["bucket"])


def test_overwriting_in_a_bucket_takes_away_first_what_makes_a_folder_whole(gcs, place, tmp_path):
    gcs.faults = Faults()
    for name in ("run", "out"):
        gcs.upload(place / name, f"gs://bucket/{name}")
    gcs.put("gs://bucket/out/stale.safetensors", b"")
    step = steps_in("gs://bucket")[1]
    refused = Python(gcs, *of_this_file(convert_slowly, *step))
    assert "exists and is not empty" in refused.output()
    gcs.log.clear()
    run(gcs, *of_this_file(convert_slowly, *step, "--overwrite"))
    removed = [entry.path for entry in gcs.log if entry.method == "DELETE"]
    assert "model.safetensors.index.json" in removed[0]
    assert "stale.safetensors" not in gcs.names("gs://bucket/out/")
    assert_same_in_the_bucket(gcs, place, tmp_path)

"""One writer at a time: the lease of a folder, or of another output, local and in a bucket."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from medllm_jax.cli import main
from medllm_jax.conversion.from_hf import from_hf, from_peft
from medllm_jax.conversion.to_hf import to_hf
from medllm_jax.data.prepare.corpus import prepare_corpus
from medllm_jax.data.prepare.instructions import prepare_instructions
from medllm_jax.data.prepare.preference_pairs import prepare_pairs
from medllm_jax.errors import RunError, UserError
from medllm_jax.evaluation.download import fetch
from medllm_jax.evaluation.samples import sample_exam
from medllm_jax.recipes.demo.recipe import run_demo
from medllm_jax.report.page import write_page
from medllm_jax.storage import lease as module
from medllm_jax.storage.lease import FILE, Lease
from tests.gcs import Gcs
from tests.gcs_programs import run

QUICK = 0.6  # seconds


def test_one_program_has_it_and_gives_it_back(tmp_path):
    folder = tmp_path / "run"
    with Lease(folder, seconds=QUICK) as lease:
        with pytest.raises(RunError, match="is being written by process") as caught, Lease(folder, seconds=QUICK):
            pass
        assert str(os.getpid()) in str(caught.value)
        lease.check()
        (folder / "config.yaml").write_text("")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    with Lease(folder, seconds=QUICK):
        pass


def test_a_folder_that_was_made_for_it_alone_goes_with_it(tmp_path):
    with Lease(tmp_path / "run", seconds=QUICK):
        assert (tmp_path / "run" / FILE).exists()
    assert not (tmp_path / "run").exists()


def test_that_of_a_program_which_was_killed_here_is_free_at_once(tmp_path):
    code = f"from medllm_jax.storage.lease import Lease; Lease({str(tmp_path)!r}).__enter__(); print('has it')"
    command = [sys.executable, "-u", "-c", f"import time; {code}; time.sleep(600)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lease(tmp_path, seconds=1e6):  # it would wait for ever
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_one_that_goes_on_is_known_at_once_and_one_elsewhere_when_it_renews(tmp_path, monkeypatch):
    with Lease(tmp_path, seconds=1e6):  # it would wait for ever
        with pytest.raises(RunError, match="is being written by"):
            Lease(tmp_path, seconds=1e6).__enter__()
        monkeypatch.setattr(module, "_machine", lambda: ["elsewhere", "x", "y"])
    with (
        Lease(tmp_path, seconds=QUICK),
        monkeypatch.context() as here,
        pytest.raises(RunError, match="on elsewhere"),
    ):
        here.setattr(module, "_machine", lambda: ["here", "x", "y"])
        Lease(tmp_path, seconds=1e6).__enter__()


HOLDERS = {
    "elsewhere": b'{"machine": ["elsewhere", "x", "y"], "pid": 1, "started": "1"}',
    "nothing": b"{}",
    "torn": b'{"machine": ["elsewhe',
    "deep": b"[" * 10**5,
    "a long number": b"1" * 5000,
    "not UTF-8": b'{"id": "\xff"}',
    "a list": b"[1]",
    "another type": b'{"machine": 5, "written": {}}',
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_that_of_a_program_which_died_elsewhere_is_free_after_a_while(tmp_path, holder):
    (tmp_path / FILE).write_bytes(holder)
    began = time.monotonic()
    with Lease(tmp_path, seconds=0.1):
        assert time.monotonic() - began > 0.1


def test_a_program_that_lost_it_hears_of_it(tmp_path):
    with pytest.raises(RunError, match="written by another program now"), Lease(tmp_path, seconds=QUICK) as lease:
        (tmp_path / FILE).write_text(json.dumps({"id": "another"}))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lease.check()
            time.sleep(0.01)
    assert json.loads((tmp_path / FILE).read_text()) == {"id": "another"}, "what another holds is left alone"


def test_a_program_that_was_stopped_past_its_lease_looks_before_it_writes(tmp_path, monkeypatch):
    clock = {"now": 1000.0}
    monkeypatch.setattr(module, "now", lambda: clock["now"])
    with Lease(tmp_path, seconds=60) as lease:
        clock["now"] += 3600  # it was stopped, and nobody came
        before = (tmp_path / FILE).read_text()
        lease.check()
        assert (tmp_path / FILE).read_text() != before, "renewed"
    with pytest.raises(RunError, match="written by another program now"), Lease(tmp_path, seconds=60) as lease:
        clock["now"] += 3600
        (tmp_path / FILE).write_text(json.dumps({"id": "another"}))
        lease.check()
    (tmp_path / FILE).unlink()
    with pytest.raises(RunError, match="written by another program now"), Lease(tmp_path, seconds=60):
        (tmp_path / FILE).write_text(json.dumps({"id": "another"}))
        clock["now"] += 3600  # and it never asked: what it did is not called done


STOPPED = """
import os, signal, sys
from pathlib import Path
from medllm_jax.storage.lease import Lease

folder = Path(sys.argv[1])
with Lease(folder, seconds=float(sys.argv[2])) as lease:
    for number in range(2):
        lease.check()
        (folder / "content").write_text(f"the first, {number}")
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_program_that_was_stopped_and_goes_on_writes_nothing_more(tmp_path):
    """A real one, stopped by a real signal until another has its place."""
    first = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path), str(QUICK)], stderr=subprocess.PIPE, text=True
    )
    try:
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert (tmp_path / "content").read_text() == "the first, 0"
        while True:  # it counts as at work until its lease has run out
            with contextlib.suppress(RunError), Lease(tmp_path, seconds=QUICK) as lease:
                (tmp_path / "content").write_text("the second")
                first.send_signal(signal.SIGCONT)
                assert "written by another program now: this one ends" in first.communicate(timeout=60)[1]
                lease.check()
                break
            time.sleep(0.05)
    finally:
        first.kill()
    assert first.returncode == 1 and (tmp_path / "content").read_text() == "the second"


def _refused(write, output, *, beside):
    """Refused while another program writes it; allowed to look at its arguments, which are wrong, before and after."""
    with Lease.beside(output) if beside else Lease(output), pytest.raises(RunError, match="is being written by"):
        write(str(output))
    with pytest.raises((UserError, OSError, AttributeError, TypeError)):
        write(str(output))


@pytest.mark.parametrize(
    "write",
    [
        lambda output: prepare_corpus([], "nowhere", output),
        lambda output: prepare_pairs([], "nowhere", output, 8),
        lambda output: prepare_instructions([], "nowhere", output, 8),
        lambda output: from_hf("nowhere", output),
        lambda output: from_peft("nowhere", output, base="nowhere"),
        lambda output: to_hf("nowhere", output),
        lambda output: sample_exam(None, None, [], output, None, None),
    ],
)
def test_what_is_put_in_its_place_when_it_is_whole_has_one_writer(tmp_path, write):
    _refused(write, tmp_path / "folder" / "output", beside=True)
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.parametrize(
    "write",
    [lambda output: fetch({"a": "0"}, "nowhere", output, ""), lambda output: run_demo(output, 0, None)],
)
def test_a_folder_that_is_filled_has_one_writer(tmp_path, write):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "something").touch()
    _refused(write, tmp_path / "output", beside=False)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["something"]


def test_parts_of_a_conversion_are_written_beside_each_other(tmp_path):
    with Lease.beside(tmp_path / "run", "part-1"):
        with pytest.raises(RunError, match="is being written by"):
            from_hf("nowhere", str(tmp_path / "run"), part=(0, 2))
        with pytest.raises(UserError, match="nowhere"):
            from_hf("nowhere", str(tmp_path / "run"), part=(1, 2))


def test_a_report_is_written_where_a_run_is_and_two_reports_are_not(tmp_path):
    with Lease(tmp_path), Lease(tmp_path, "report"), pytest.raises(RunError, match="is being written by"):
        write_page([], [], tmp_path)
    with Lease(tmp_path):
        write_page([], [], tmp_path)


def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
    with Lease.beside(tmp_path / "pairs.jsonl"):
        assert main(["pairs", "--exam", "nowhere", "--output", str(tmp_path / "pairs.jsonl")]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"pairs.jsonl is being written by process {os.getpid()}" in error[0]


BUCKET = """
import json, threading, time
import tensorstore as ts
from medllm_jax.errors import RunError
from medllm_jax.storage.lease import Lease

folder, outcomes = "gs://bucket/run", []

def take(number):
    try:
        with Lease(folder, seconds=3):
            outcomes.append(number)
            time.sleep(4)
    except RunError as error:
        outcomes.append(str(error))

threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
won = [outcome for outcome in outcomes if isinstance(outcome, int)]
assert len(won) == 1 and len(outcomes) == 3, outcomes
assert ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "run/"}).result().list().result() == []
"""


def test_in_a_bucket_of_several_that_want_it_one_gets_it(tmp_path):
    with Gcs("bucket") as gcs:
        run(gcs, "-c", BUCKET)

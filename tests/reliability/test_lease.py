"""One writer at a time: the lease of a run folder, local and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from medllm_jax.errors import RunError
from medllm_jax.reliability.lease import FILE, Lease
from tests.gcs import Gcs
from tests.gcs_programs import run

QUICK = 0.6  # seconds


def test_one_program_has_it_and_gives_it_back(tmp_path):
    folder = tmp_path / "run"
    with Lease(folder, seconds=QUICK) as lease:
        with pytest.raises(RunError, match="is being written by process") as caught, Lease(folder, seconds=QUICK):
            pass
        assert str(os.getpid()) in str(caught.value)
        time.sleep(2 * QUICK)
        lease.check()  # renewed meanwhile, though another wanted it
        (folder / "config.yaml").write_text("")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    with Lease(folder, seconds=QUICK):
        pass


def test_a_folder_that_was_made_for_it_alone_goes_with_it(tmp_path):
    with Lease(tmp_path / "run", seconds=QUICK):
        assert (tmp_path / "run" / FILE).exists()
    assert not (tmp_path / "run").exists()


def test_that_of_a_program_which_was_killed_here_is_free_at_once(tmp_path):
    code = f"from medllm_jax.reliability.lease import Lease; Lease({str(tmp_path)!r}).__enter__(); print('has it')"
    command = [sys.executable, "-u", "-c", f"import time; {code}; time.sleep(600)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lease(tmp_path, seconds=1e6):  # it would wait for ever
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("holder", [{"machine": ["elsewhere", "x", "y"], "pid": 1, "started": "1"}, {}, "damaged"])
def test_that_of_a_program_which_died_elsewhere_is_free_after_a_while(tmp_path, holder):
    (tmp_path / FILE).write_text(holder if isinstance(holder, str) else json.dumps(holder))
    began = time.monotonic()
    with Lease(tmp_path, seconds=QUICK):
        assert time.monotonic() - began > QUICK


def test_a_program_that_lost_it_hears_of_it(tmp_path):
    with Lease(tmp_path, seconds=QUICK) as lease:
        (tmp_path / FILE).write_text(json.dumps({"id": "another"}))
        deadline = time.monotonic() + 60
        with pytest.raises(RunError, match="written by another program now"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.01)
    assert json.loads((tmp_path / FILE).read_text()) == {"id": "another"}, "what another holds is left alone"


BUCKET = """
import json, threading, time
import tensorstore as ts
from medllm_jax.errors import RunError
from medllm_jax.reliability.lease import Lease

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

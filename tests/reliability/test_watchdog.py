"""A stage that lasts too long ends the process, which says where it was."""

import subprocess
import sys
import time

from medllm_jax.reliability.watchdog import Watchdog

HANGING = """
import time
from medllm_jax.reliability.watchdog import Watchdog

def report(what):
    print("reported:", what, flush=True)
    time.sleep({reporting})

with Watchdog(1.0, report=report) as watch:
    for step in range(4):
        watch.stage(f"step {{step}}")
        time.sleep(0.4)
    watch.stage("reading the batch of step 4")
    time.sleep(600)
"""


def test_what_hangs_is_ended_and_named():
    done = subprocess.run(
        [sys.executable, "-c", HANGING.format(reporting=0)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "nothing has moved for 1 s; the run was in: reading the batch of step 4" in done.stderr
    assert "time.sleep" in done.stderr or "line 14" in done.stderr, "the stack of each thread"
    assert done.stdout.startswith("reported: nothing has moved")


def test_what_gets_on_is_left_alone():
    with Watchdog(0.5) as watch:
        for step in range(10):
            watch.stage(f"step {step}")
            time.sleep(0.1)
    time.sleep(0.7)  # and nobody watches after the end


def test_nothing_is_too_long_where_none_is_asked_for():
    with Watchdog(0.0) as watch:
        assert watch.now == "starting"

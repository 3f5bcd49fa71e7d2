"""Some hundred wrong files, of fixed seeds, are read as `benchmarks.fuzz` and `benchmarks.damage` have them read."""

import dataclasses
import itertools
import subprocess
import sys
import time

import pytest
import yaml

from benchmarks import damage, fuzz, trials
from benchmarks.inputs import KINDS, kind_of, make_inputs
from benchmarks.readings import READINGS, Reading, files_of
from benchmarks.trial_worker import Worker
from benchmarks.trials import Replaced
from tests.warm import ROOT

# What is quick enough to be tried often; the rest, and what needs runs, is for the programs.
QUICK = [each for each in READINGS if not each.runs and each.weight >= 1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("fuzz") / "inputs", runs=False)


@pytest.fixture(scope="module")
def usual(inputs, tmp_path_factory):
    """Outcome of a reading with its files as they are."""
    found = {}

    def outcome_of(reading):
        if reading.name not in found:
            place = tmp_path_factory.mktemp("usual") / "place"
            found[reading.name] = trials.attempt(inputs, reading, trials.unchanged, place)
        return found[reading.name]

    return outcome_of


@pytest.mark.parametrize("reading", QUICK, ids=lambda reading: reading.name)
def test_wrong_files_are_refused_in_a_line(reading, inputs, usual, tmp_path):
    choose = fuzz.Chooser(inputs, [reading], seed=1)
    assert usual(reading).code == 0
    findings = []
    for given in map(choose, range(6)):
        change = Replaced(given.path, given.change.content)
        outcome = trials.attempt(inputs, reading, change, tmp_path / str(given.index))
        if finding := fuzz.finding_of(given, outcome, usual(reading)):
            findings.append(fuzz.line_of(fuzz.record(1, given, outcome, finding)))
    assert not findings, "\n".join(findings)


def test_damaged_files_are_refused_or_do_no_harm(inputs, usual, tmp_path):
    wrong = []
    for number, case in enumerate(itertools.islice(damage.cases(inputs, QUICK, seed=1), 60)):
        outcome = trials.attempt(inputs, case.reading, case.change, tmp_path / str(number))
        found = damage.class_of(case, outcome, usual(case.reading))
        if found in damage.BAD:
            wrong.append(damage.line_of(damage.record(case, found, outcome)))
    assert not wrong, "\n".join(wrong)


def _work():
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "seconds", "ended"),
    [
        (_work, 0.2, True),
        (lambda: time.sleep(600) or "", 0.2, True),
        (lambda: time.sleep(1.1) or "", 1.0, False),  # what is waited for, as on a busy machine, is no work
    ],
)
def test_a_trial_is_ended_by_its_work_or_much_later_by_the_clock(run, seconds, ended, tmp_path):
    trial = Reading("room: what", run, (), seconds=seconds)
    outcome = trials.attempt(tmp_path, trial, trials.unchanged, tmp_path / "place")
    assert outcome.error.startswith("HangError") == ended


def test_a_worker_goes_on_after_a_trial_that_had_to_be_ended(inputs, tmp_path):
    reading = next(each for each in QUICK if each.name == "conversion: from-hf")
    worker = Worker(inputs, tmp_path / "scratch")
    try:
        assert worker.attempt(reading, trials.unchanged).code == 0
        ended = worker.attempt(dataclasses.replace(reading, seconds=-5), trials.unchanged)
        assert ended.error == "HangError: killed"
        assert [worker.attempt(reading, trials.unchanged).code for _ in range(2)] == [0, 0]
        assert not [path for path in (tmp_path / "scratch").iterdir() if path.is_dir()]
    finally:
        worker.close()


def test_a_sweep_replaces_every_value_by_every_type(inputs):
    reading = next(each for each in QUICK if each.name == "config: rounds config")
    changes = {given.change.name for given in fuzz.sweep(inputs, [reading])}
    settings = yaml.safe_load((inputs / "rounds.yaml").read_text())
    assert {f"{key} = {value}" for key in settings for value in ("'-1'", "'{}'", "deep")} <= changes
    assert {"all = deep", "temperature.0 = 'x'"} <= changes and "temperature.1 = 'x'" not in changes


@pytest.mark.slow
@pytest.mark.parametrize("which", [["--inputs", "500", "--seed", "3"], ["--sweep", "--every", "401"]])
def test_hundreds_of_wrong_files_of_all_kinds(tmp_path, which):
    """Of runs and checkpoints, too."""
    command = [sys.executable, "-m", "benchmarks.fuzz", *which, "--jobs", "1"]
    command += ["--output", str(tmp_path / "findings.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_file_is_of_a_kind(inputs):
    files = [path for reading in QUICK for path in files_of(inputs, reading)]
    assert {kind_of(path)[0] for path in files} <= {name for _, name, _ in KINDS}

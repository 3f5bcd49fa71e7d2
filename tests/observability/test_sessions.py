"""Each start of a run is written down: with what it ran, and what was changed by force."""

import dataclasses
import json
import shutil

import pytest
import yaml
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.observability import sessions
from medllm_jax.observability.sessions import Goodput
from medllm_jax.training.loop import train
from tests.training.test_train import config_of


def lines_of(run):
    return [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """The config of a run of 4 steps that ended, with a constant schedule, so that it can go on."""
    config = config_of(world, tmp_path_factory.mktemp("begun") / "run", steps=4)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    train(config)
    return config


@pytest.fixture
def config(begun, tmp_path):
    """A copy of that run, elsewhere."""
    shutil.copytree(begun.run, tmp_path / "copy")
    return dataclasses.replace(begun, run=str(tmp_path / "copy"))


def test_a_start_says_what_ran(config, tmp_path):
    (line,) = lines_of(tmp_path / "copy")
    assert (line["step"], line["changes"], line["processes"]) == (0, {}, 1)
    assert line["devices"] == "8 x cpu" and line["versions"]["jax"] and line["code"] == sessions.code_version()


DAMAGED = [b'{"time": 1.0, "c\xffde": "a"}', b'{"time": "now", "code": "a"}', b'{"code": "a"}', b"[]", b'{"time": 1.0}']


@pytest.mark.parametrize("line", DAMAGED)
def test_starts_that_can_not_be_read_are_set_aside(tmp_path, line, capsys):
    content = b'{"time": 5.0, "code": "a"}\n' + line + b"\n"
    (tmp_path / "sessions.jsonl").write_bytes(content)
    first, now = sessions.begin(epath.Path(tmp_path), 3, {})
    assert first == {"time": 5.0, "code": "a"} and now["step"] == 3
    assert lines_of(tmp_path) == [first, now] and (tmp_path / "sessions.jsonl.damaged-1").read_bytes() == content
    assert "(line 2)" in capsys.readouterr().err


def test_starts_that_can_not_be_written_down_end_no_run(tmp_path, capsys):
    (tmp_path / "sessions.jsonl").mkdir()
    assert len(sessions.begin(epath.Path(tmp_path), 0, {})) == 1
    assert "sessions.jsonl can't be written" in capsys.readouterr().err


def test_force_goes_on_with_another_config_and_says_so(config, tmp_path, metrics_of, monkeypatch, capsys):
    faster = dataclasses.replace(config, steps=6, optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-3))
    with pytest.raises(UserError, match=r"learning_rate was 0\.001 and is now 0\.005; .*, or give --force"):
        train(faster)
    monkeypatch.setattr(sessions, "code_version", lambda: "another")
    train(faster, force=True)
    run = tmp_path / "copy"
    assert "the code was" in capsys.readouterr().out
    assert lines_of(run)[1]["changes"] == {"optimizer.learning_rate": [0.001, 0.005]}
    assert [row["learning_rate"] for row in metrics_of(run).values()][3:] == pytest.approx([0.001, 0.005, 0.005])
    rates = {
        file: yaml.safe_load((run / file).read_text())["optimizer"]["learning_rate"]
        for file in ("config-until-4.yaml", "config.yaml")
    }
    assert rates == {"config-until-4.yaml": 0.001, "config.yaml": 0.005}
    train(dataclasses.replace(faster, steps=7))  # which is its config now


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"precision": "params"}, r"precision\.params was 'float32' and is now 'bfloat16'"),
        ({"data": "batch_size"}, r"data\.batch_size was 8 and is now 16"),
    ],
)
def test_what_checkpoints_hold_no_force_changes(config, change, line):
    ((section, name),) = change.items()
    value = {"params": "bfloat16", "batch_size": 16}[name]
    other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
    with pytest.raises(UserError, match=line) as caught:
        train(other, force=True)
    assert "--force" not in str(caught.value)


def test_goodput_is_the_share_of_all_time_that_trained(monkeypatch):
    goodput = Goodput(began=1000.0, trained=30.0)
    goodput.add(20.0)
    monkeypatch.setattr(sessions.time, "time", lambda: 1100.0)
    assert goodput.share == 0.5

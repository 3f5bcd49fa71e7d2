"""What a run writes: every step once, also after an interruption; progress on a terminal and in a log."""

import errno
import json
import math
import os
import time

import jax.numpy as jnp
import pytest
from etils import epath

from medllm_jax.errors import RunError
from medllm_jax.observability.host_log import HostLog
from medllm_jax.observability.metrics import Meter, MetricsLog
from medllm_jax.storage import append
from medllm_jax.storage.run_folder import read_metrics
from medllm_jax.terminal.progress import Console


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, after, steps):
    log = MetricsLog(epath.Path(folder), after_step=after)
    log.write([{"step": step, "loss": float(step)} for step in steps])
    log.close()


def test_steps_after_the_checkpoint_are_written_anew(tmp_path):
    write(tmp_path, 0, range(1, 6))
    write(tmp_path, 3, range(4, 7))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(tmp_path).rows] == [1, 2, 3]
    write(tmp_path, 3, [4])
    assert steps_in(tmp_path) == [1, 2, 3, 4]


DAMAGED = {
    "a flipped byte": b'{"step": 2, "lo\xf3s": 2.0}',
    "a lost byte": b'{"step": 2 "loss": 2.0}',
    "no step": b'{"loss": 2.0}',
    "a step of another type": b'{"step": "2"}',
    "a number of another type": b'{"step": 2, "step_seconds": "2"}',
    "a number that no float holds": b'{"step": 2, "tokens": 1' + b"0" * 400 + b"}",
    "two lines in one": b'{"step": 1}{"step": 2}',
    "deep": b"[" * 10**5,
    "not an object": b"2",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_what_can_not_be_read_is_set_aside_and_the_rest_is_used(tmp_path, capsys, line):
    write(tmp_path, 0, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    damaged = b"\n".join([lines[0], line, lines[2], b""])
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    write(tmp_path, 3, [4])
    assert steps_in(tmp_path) == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == damaged
    assert "(line 2): it is kept as metrics.jsonl.damaged-1" in capsys.readouterr().err


def test_lines_are_json_and_what_is_no_finite_number_is_null(tmp_path):
    log = MetricsLog(epath.Path(tmp_path), after_step=0)
    log.write([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}])
    log.close()
    write(tmp_path, 3, [4])
    text = (tmp_path / "metrics.jsonl").read_text()
    read = [json.loads(line, parse_constant=pytest.fail)["loss"] for line in text.splitlines()]
    assert read == [None, None, 1.0, 4.0]
    assert [str(row["loss"]) for row in read_metrics(tmp_path).rows] == ["nan", "nan", "1.0", "4.0"]


def test_a_step_that_stands_twice_counts_as_it_was_last_made(tmp_path):
    lines = [(1, 1.0), (2, 2.0), (2, 3.0), (1, 4.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": {v}}}\n' for n, v in lines))
    assert read_metrics(tmp_path).rows == [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}]


def test_what_can_not_be_written_ends_no_run_and_is_written_later(tmp_path, capsys, monkeypatch):
    log = MetricsLog(epath.Path(tmp_path), after_step=0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(append, "_append", full)
        disk.setattr(log._events, "write_event", full)
        for step in (1, 2):
            log.write([{"step": step, "loss": 1.0}])
            log.settle()
    log.write([{"step": 3, "loss": 1.0}])
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].split()[0] for line in warnings] == ["tensorboard", "metrics.jsonl"], "each is told once"
    assert all("No space left on device" in line for line in warnings)


def test_a_log_that_can_not_be_opened_ends_no_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    write(tmp_path, 0, [1])
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_nothing_is_written_where_another_program_writes_now(tmp_path):
    def check():
        raise RunError("is written by another program now")

    log = MetricsLog(epath.Path(tmp_path), after_step=0, check=check)
    log.write([{"step": 1, "loss": 1.0}])
    with pytest.raises(RunError, match="by another program"):
        log.close()
    assert steps_in(tmp_path) == []
    HostLog(epath.Path(tmp_path), check=check).note("what it does")
    assert not list((tmp_path / "logs").iterdir())


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, 0, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    data, seen, at = events.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += 12 + length + 4
    assert seen == [(1, "loss", 1.0), (2, "loss", 2.0)]


def test_meter_fetches_in_order_with_speed():
    meter = Meter()
    for step in (1, 2):
        meter.add(step, {"loss": jnp.float32(step), "tokens": jnp.float32(100)})
    rows = meter.take()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0)]
    assert all(row["startup_seconds"] > 0 and "tokens_per_second" not in row for row in rows), "compiling is no speed"
    meter.add(3, {"loss": jnp.float32(3), "tokens": jnp.float32(100)})
    (row,) = meter.take()
    assert row["step"] == 3 and row["tokens_per_second"] > 0 and row["step_seconds"] > 0
    assert meter.take() == []


def test_meter_keeps_numbers_of_the_host_and_gives_the_share_of_waiting():
    meter, shares = Meter(), []
    for waited in (0.0, 0.01, 0.01):
        meter.add(1, {"loss": jnp.float32(1), "rows/a": 2**53, "epoch": 0.5})
        time.sleep(0.02)
        (row,) = meter.take(waited)
        assert (row["rows/a"], row["epoch"]) == (2**53, 0.5) and isinstance(row["rows/a"], int)
        shares.append(row.get("data_wait", 0))
    assert shares[0] == shares[2] == 0 < shares[1] <= 0.5


def test_plain_lines_in_a_log_and_silence_where_disabled(capsys):
    with Console("job", 4) as console:
        console.update(2, "loss 1.0")
        console.update(3, every_seconds=1000)
        console.update(4, every_seconds=1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "2/4  loss 1.0" in lines[0] and "left" in lines[0]
    assert "4/4" in lines[1] and "left" not in lines[1]
    with Console("job", 4, enabled=False) as console:
        console.update(4)
    assert capsys.readouterr().out == ""

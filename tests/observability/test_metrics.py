"""What a run writes: every step once, also after an interruption; progress on a terminal and in a log."""

import json
import time

import jax.numpy as jnp
from etils import epath

from medllm_jax.observability.metrics import Meter, MetricsLog
from medllm_jax.storage.json_lines import read_appended_rows
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
    assert [row["step"] for row in read_appended_rows(epath.Path(tmp_path / "metrics.jsonl"))] == [1, 2, 3]
    write(tmp_path, 3, [4])
    assert steps_in(tmp_path) == [1, 2, 3, 4]


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

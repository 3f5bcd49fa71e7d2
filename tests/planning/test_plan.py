"""`medllm plan`: what is wrong with a question is one line; with libtpu, a tiny run from end to end."""

import importlib.util
import json

import jax
import pytest

from medllm_jax.cli import main
from medllm_jax.config.load import load_run_config
from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.compiler_options import OPTIONS, compiler_options
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.planning.advice import advice
from medllm_jax.planning.report import as_text
from medllm_jax.planning.search import REMATS, try_settings
from medllm_jax.terminal.version import install_line

pytestmark = pytest.mark.usefixtures("flags_of_libtpu")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
HBM = 100 * 2**30


@pytest.fixture
def file(tmp_path):
    model = "{vocab_size: 512, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 3, head_dim: 128, "
    file = tmp_path / "run.yaml"
    file.write_text(
        f"run: {tmp_path / 'run'}\nsteps: 10\nmodel: {model}num_attention_heads: 4, num_key_value_heads: 2}}\n"
        "data: {store: none, batch_size: 8, accumulate: 2}\nmesh: {data: 1, fsdp: 2, tensor: 2}\nremat: full\n"
    )
    return file


def run(file, *arguments):
    return main(["plan", "--config", str(file), "--topology", "v5p:2x2x1", "--sequence-length", "256", *arguments])


def test_without_libtpu_it_says_what_to_install(file, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(file) == 2
    assert install_line("plan") in capsys.readouterr().err


def test_a_search_without_libtpu_tries_nothing(file, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(file, "--search") == 2
    assert install_line("plan") in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_search_has_times(file, capsys):
    assert run(file, "--search", "--memory-only") == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_search_in_which_all_is_refused_says_why(file):
    def plan(candidate, *, memory_only):
        raise UserError("the compiler knows no such topology")

    with pytest.raises(UserError, match="knows no such topology"):
        try_settings(load_run_config(file), plan, devices=4, slices=1, show=lambda line: None)


def test_an_unknown_topology_is_one_line(file, capsys):
    assert run(file, "--topology", "trillium:4x4") == 2
    assert "v6e:4x4" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_no_rows_are_refused(file, capsys):
    assert run(file, "--pairs-per-row", "0") == 2
    assert "--pairs-per-row: '0': a whole number is expected, at least 1" in capsys.readouterr().err


def test_programs_for_other_devices_have_no_options():
    assert compiler_options(make_mesh(MeshConfig())) == {}
    assert all(why for options in OPTIONS.values() for _, why in options.values())
    assert jax.devices()[0].device_kind not in OPTIONS


def report_of(config, peak, name="train"):
    memory = {"peak": peak, "temporaries": peak // 2, "hbm": HBM, "parameters": peak // 6, "optimizer": peak // 3}
    memory |= {"share": peak / HBM, "fits": peak <= HBM, "comfortable": peak <= 0.92 * HBM}
    memory |= {"gradients": peak // 6, "activations": peak // 4, "frozen": peak // 4}
    return {
        "slices": 1,
        "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "devices": 4,
        "rows": config.data.batch_size,
        "accumulate": config.data.accumulate,
        "sequence_length": 256,
        "programs": [{"name": name, "memory": memory, "roofline_seconds": 1.0, "refused": None}],
    }


def test_advice_names_what_would_make_it_fit(file):
    config = load_run_config(file, ["--remat", "attention", "--data.accumulate", "1"])
    assert advice(config, report_of(config, HBM // 2))[0].startswith("train fits: 50.0 of 100.0 GiB")
    verdict, *more = advice(config, report_of(config, 2 * HBM))
    assert "does not fit" in verdict and "100.0 GiB more" in verdict
    for setting in (
        "mesh.fsdp",
        "precision.params bfloat16",
        "state_dtype bfloat16",
        "data.accumulate",
        "remat full",
        "vocab_chunks",
        "adapters on a base in nf4",
    ):
        assert any(setting in line for line in more), setting
    *_, alone, where = advice(config, report_of(config, 3 * HBM))
    assert alone.startswith("208.0 GiB less would fit with room") and "--search" in where


def test_advice_says_what_is_enough(file):
    """10 GiB too many, of which 2 + 8 are the margin: half of 25 GiB of activations is enough, a half of 17 is not."""
    config = load_run_config(file, ["--remat", "attention", "--data.accumulate", "1"])
    verdict, *more = advice(config, report_of(config, 102 * 2**30))
    assert "does not fit" in verdict
    (rows,) = (line for line in more if "twice the data.accumulate" in line)
    (moments,) = (line for line in more if "precision.params" in line)
    assert rows.endswith("saves about 12.8 GiB, which is enough") and moments.endswith("saves about 8.5 GiB")
    tight, *_ = advice(config, report_of(config, 95 * 2**30))
    assert tight.startswith("train fits, but only 5.0 GiB are left on each device: 8% or more are safer")


def test_advice_is_for_adapters_and_other_programs_too(file):
    config = load_run_config(file, ["--adapter.base", "bfloat16", "--init.checkpoint", "base"])
    lines = advice(config, report_of(config, 110 * 2**30))
    assert any(line.startswith("adapter.base int8 saves about 12.9 GiB") for line in lines)
    assert any(line.startswith("adapter.base nf4 saves about 19.8 GiB, which is enough") for line in lines)
    assert not any("moments" in line or "instead" in line for line in lines)
    config = load_run_config(file)
    for name, half in (("reference", "precision.params bfloat16"), ("decode", "twice the data.accumulate")):
        verdict, *more = advice(config, report_of(config, 110 * 2**30, name))
        assert verdict.startswith(f"{name} does not fit") and any(line.startswith(half) for line in more)
        assert not any("remat" in line or "--search" in line for line in more)


def test_the_search_takes_the_fastest_of_what_fits(file):
    config = load_run_config(file)
    asked = []

    def plan(candidate, *, memory_only):
        asked.append((candidate.remat, memory_only))
        rows = 8 // candidate.data.accumulate // candidate.mesh.fsdp
        size = 80 * rows // (1 + REMATS.index(candidate.remat))  # GiB: each next remat holds less
        report = report_of(candidate, size * 2**30)
        program = report["programs"][0]
        # More rows at a time are faster, recomputing is slower, and so is splitting over tensor.
        speed = rows / (1 + 0.1 * REMATS.index(candidate.remat)) / candidate.mesh.tensor
        program["roofline_seconds"] = 1 / speed
        program["time"] = (
            None if memory_only else {"seconds": 1 / speed, "mfu_estimate": 0.5, "tokens_per_second": speed}
        )
        return report

    found = try_settings(config, plan, devices=4, slices=1, show=lambda line: None)
    assert found.overrides["mesh.fsdp"] == 4 and found.overrides["data.accumulate"] == 1
    assert found.overrides["remat"] == "attention_mlp"
    assert sum(not memory_only for _, memory_only in asked) == 2
    assert len(found.tried) == len(asked) - 2


@pytest.mark.slow
@needs_libtpu
def test_a_tiny_run_is_planned(file, capsys):
    assert run(file, "--json", "--tokens", "1000000", "--price", "2") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("compiling train for v5p:2x2x1, on this machine's CPU, to its end: minutes")
    report = json.loads(printed.out)
    cost = report["run"]
    assert cost["steps"] == 489 and cost["hours"] == pytest.approx(489 * cost["seconds_in_a_step"] / 3600)
    assert cost["price"] == pytest.approx(2 * 4 * cost["hours"]) and cost["compile_seconds"] > 0
    (program,) = report["programs"]
    assert (report["mesh"], report["chips"]) == ({"data": 1, "fsdp": 2, "tensor": 2}, 4)
    memory, flops, time = program["memory"], program["flops"], program["time"]
    assert memory["fits"] and memory["parameters"] > 0 and memory["peak"] > 3 * memory["parameters"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)
    # Full remat makes the blocks' forward products twice: 8 instead of 6 for all but the head.
    assert 1.2 < flops["compiled"] / flops["model"] < 1.6
    assert {loop["times"] for loop in time["loops"]} >= {2, 6}
    assert time["hours"] == pytest.approx(1e6 / time["tokens_per_second"] / 3600)
    assert time["mfu_if_products_reach"]["0.8"] <= time["mfu_if_products_reach"]["0.9"] <= time["mfu_estimate"]
    assert {"fsdp", "tensor"} <= {axis for c in program["collectives"] for axis in c["axes"]}
    assert "train fits" in as_text(report)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:4x4", "v6e:4x4", "tpu7x:2x2x1"])
def test_other_generations_are_planned(file, capsys, topology):
    """With their options of the compiler, which refuses what it does not know."""
    mesh = ["--mesh.fsdp", "-1", "--mesh.tensor", "1", "--data.batch_size", "32"]
    assert run(file, "--json", "--topology", topology, *mesh) == 0
    (program,) = json.loads(capsys.readouterr().out)["programs"]
    assert program["memory"]["fits"] and 0 < program["time"]["mfu_estimate"] < 1


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("program", ["reference", "generate"])
def test_other_programs_are_planned(file, capsys, program):
    assert run(file, "--json", "--program", program, "--new-tokens", "32", "--objective.name", "rpo") == 0
    report = json.loads(capsys.readouterr().out)
    names = {"reference": ["reference"], "generate": ["prefill", "decode"]}[program]
    assert [entry["name"] for entry in report["programs"]] == names
    assert all(entry["memory"]["fits"] and entry["time"]["seconds"] > 0 for entry in report["programs"])


@pytest.mark.slow
@needs_libtpu
def test_slices_lie_along_data(file, capsys):
    sizes = ["--data.accumulate", "1", "--mesh.tensor", "1", "--mesh.fsdp", "-1", "--mesh.data"]
    arguments = ["--json", "--slices", "2", *sizes]
    assert run(file, *arguments, "1") == 2
    assert "mesh.data 1 is not a multiple of the 2 slices" in capsys.readouterr().err
    assert run(file, *arguments, "2") == 0
    collectives = json.loads(capsys.readouterr().out)["programs"][0]["collectives"]
    assert {tuple(c["axes"]) for c in collectives if c["over"] == "dcn"} >= {("data",)}

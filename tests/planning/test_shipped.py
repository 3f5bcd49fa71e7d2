"""The shipped configs fit the slices that they are named after, and what the 72B step moves is what it should."""

import importlib.util
import json

import pytest

from benchmarks.plans import plan_of, shipped
from medllm_jax.cli import main
from medllm_jax.planning.flops import matrix_parameters
from medllm_jax.settings import load_run_config

SHIPPED = {config.file.stem: config for config in shipped()}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_fits_with_room(name):
    report = plan_of(SHIPPED[name], memory_only=True)
    (program,) = report["programs"]
    memory = program["memory"]
    assert memory["comfortable"], f"{memory['peak'] / 2**30:.1f} GiB"
    # Nothing that could be split over the mesh is whole on a device: weights and moments are its share of them.
    config = load_run_config(SHIPPED[name].file)
    if config.adapter is None:
        split = report["mesh"]["fsdp"] * report["mesh"]["tensor"]
        embedding = 0 if config.model.tie_word_embeddings else config.model.vocab_size * config.model.hidden_size
        whole = 4 * (matrix_parameters(config.model) + embedding)
        assert memory["parameters"] * split == pytest.approx(whole, rel=2e-3)
        assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)


def traffic(report) -> float:
    return sum(c["bytes"] * c["times"] for c in report["programs"][0]["collectives"])


def planned(capsys, name, *arguments):
    config = SHIPPED[name]
    command = ["plan", "--config", str(config.file), "--topology", config.topology, "--memory-only", "--json"]
    assert main([*command, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_rpo_moves_no_more_than_cpt(capsys):
    """With the reference cached, a step on pairs gathers the weights as often as one on documents of as many tokens."""
    same = ["--data.batch_size", "64", "--data.accumulate", "1"]
    cpt = planned(capsys, "cpt-72b-v5p-4x4x4", *same)
    rpo = planned(capsys, "rpo-72b-v5p-4x4x4", *same)
    assert cpt["remat"] == rpo["remat"] and cpt["rows"] == rpo["rows"]
    assert traffic(rpo) <= traffic(cpt) * 1.001


def test_a_deeper_model_is_no_larger_a_program(capsys):
    """Layers are a loop: 80 of them compile in the time of 8, and only its trips change."""
    few = planned(capsys, "cpt-72b-v5p-4x4x4", "--model.num_hidden_layers", "8")
    many = planned(capsys, "cpt-72b-v5p-4x4x4")
    assert len(few["programs"][0]["collectives"]) == len(many["programs"][0]["collectives"])
    compiled = [report["programs"][0]["flops"]["compiled"] for report in (few, many)]
    assert 5 < compiled[1] / compiled[0] < 10

"""The shipped configs fit the slices that they are named after, and what the 72B step moves is what it should."""

import importlib.util
import json

import jax
import pytest

from benchmarks.plans import shipped
from medllm_jax.cli import main
from medllm_jax.config.load import load_run_config
from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.distributed.flops import matrix_parameters
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.model.abstract import abstract_model
from medllm_jax.planning.compiling import compile_programs
from medllm_jax.planning.hlo import parse
from medllm_jax.planning.plan import PlanOptions, report_of, request_of

SHIPPED = {config.file.stem: config for config in shipped()}
pytestmark = [
    pytest.mark.usefixtures("flags_of_libtpu"),
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]


ROOM = {"v5p": 0.92 * 95 * 2**30}  # 8 % of what the chip is sold with, which is less than the compiler allows


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_fits_with_room_and_nothing_is_whole(name):
    shipped = SHIPPED[name]
    config, options = load_run_config(shipped.file), PlanOptions(parse_topology(shipped.topology, shipped.slices))
    (compiled,) = compile_programs(request_of(config, options), memory_only=True)
    (program,) = report_of(config, options, [compiled])["programs"]
    memory = program["memory"]
    gib = f"{memory['peak'] / 2**30:.1f} GiB"
    assert memory["comfortable"] and memory["peak"] <= ROOM[options.topology.generation], gib
    assert memory["gradients"] > 0 and memory["activations"] > 0
    assert memory["gradients"] + memory["activations"] < memory["temporaries"]
    check_nothing_is_whole(config, parse(compiled.hlo), shipped.slices)
    # Nor is there more of weights and moments on a device than its share of them.
    if config.adapter is None:
        embedding = 0 if config.model.tie_word_embeddings else config.model.vocab_size * config.model.hidden_size
        share = 4 * (matrix_parameters(config.model) + embedding) / (compiled.mesh["fsdp"] * compiled.mesh["tensor"])
        assert memory["parameters"] == pytest.approx(share, rel=2e-3)
        assert memory["optimizer"] == pytest.approx(2 * share, rel=2e-3)
        assert memory["other_arguments"] < 2**20


def check_nothing_is_whole(config, module, slices):
    """No array of the compiled program, which is that of one device, has the shape of a parameter: one layer at a time
    is gathered, and of the two tables of the vocabulary, which are no loop, copies in the compute dtype. (Of several
    slices, where gathers are written as all-reduces, a table is a sum with zeros first.)"""
    plan = abstract_model(config.model, config.precision, make_mesh(MeshConfig()), adapter=config.adapter)
    leaves = jax.tree.leaves((plan.abstract, plan.frozen))
    parameters = {dimensions(leaf.shape) for leaf in leaves if leaf.size > 2**20}
    tables = {dimensions((config.model.vocab_size, config.model.hidden_size))}
    assert tables < parameters
    arguments = [a for i in module.computations[module.entry] if i.opcode == "parameter" for a in i.arrays]
    assert not [a for a in arguments if dimensions(a.shape) in parameters]
    assert sum(a.bytes > 2**20 for a in arguments) >= (3 if config.adapter is None else 1) * 9
    everywhere = [a for instructions in module.computations.values() for i in instructions for a in i.arrays]
    whole = {(a.dtype, a.shape) for a in everywhere if dimensions(a.shape) in parameters}
    formats = {"bf16"} if slices == 1 else {"bf16", "f32"}
    assert all(dimensions(shape) in tables and dtype in formats for dtype, shape in whole), whole


def dimensions(shape):
    """In whatever order the compiler has put them."""
    return tuple(sorted(size for size in shape if size > 1))


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

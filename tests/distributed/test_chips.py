"""Topologies by name."""

import pytest

from medllm_jax.distributed.chips import CHIPS, chips_of, ici_bandwidth, parse_topology
from medllm_jax.errors import UserError


@pytest.mark.parametrize("name", [chip.example for chip in CHIPS.values()])
def test_examples_are_topologies(name):
    topology = parse_topology(name, 3)
    assert chips_of(topology) == 3 * 4 ** len(topology.sizes)


@pytest.mark.parametrize(
    ("name", "slices", "line"),
    [
        ("trillium:4x4", 1, "a name like one of v4:4x4x4, v5e:4x4, v5p:4x4x4"),
        ("v5p", 1, "a name like"),
        ("v5p:0x4x4", 1, "a name like"),
        ("v5p:4x4", 1, "v5p has 3 axes"),
        ("v5p:4x4x4", 0, "slices is 0"),
    ],
)
def test_other_names_are_refused(name, slices, line):
    with pytest.raises(UserError, match=line):
        parse_topology(name, slices)


def test_a_ring_has_two_links():
    topology = parse_topology("v5p:4x4x2")
    link = topology.chip.link
    assert ici_bandwidth(topology, [True, True, True]) == 5 * link
    assert ici_bandwidth(topology, [True, False, False]) == 2 * link
    assert ici_bandwidth(topology, [False, False, True]) == link

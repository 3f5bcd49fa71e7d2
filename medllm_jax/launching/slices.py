"""Slices as Google Cloud hands them out: how many hosts they have, and what GKE, xpk and Cloud TPU call them."""

import itertools
import math
from dataclasses import dataclass

from medllm_jax.distributed.chips import Topology, chips_of
from medllm_jax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """Names of a TPU generation.

    accelerator: GKE's label of its nodes; machine: its VMs, by chips of one; sold_as: in xpk's and Cloud TPU's names of
    types, which for TPU VMs count `cores` a chip; runtime: software of its TPU VMs.
    """

    accelerator: str
    machine: str
    sold_as: str
    cores: int
    runtime: str


GENERATIONS = {
    "v5e": Generation("tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-{}t", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "ct6e-standard-{}t", "v6e", 1, "v2-alpha-tpuv6e"),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of v5p, whose larger slices are made of cubes of 4x4x4
_MOST_CUBES = 140


@dataclass(frozen=True)
class TpuSlices:
    """Equal slices that one run takes; see `slices_of`."""

    topology: Topology

    @property
    def number(self) -> int:
        return self.topology.slices

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.topology.generation]

    @property
    def shape(self) -> str:
        """``4x4x4``, of one slice."""
        return self.topology.name.partition(":")[2]

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.topology.sizes)

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return chips_of(self.topology) * self.topology.chip.devices

    @property
    def chips_per_host(self) -> int:
        return min(self.chips, 4)

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.chips // self.chips_per_host

    @property
    def machine(self) -> str:
        return self.generation.machine.format(self.chips_per_host)

    @property
    def tpu_type(self) -> str:
        """As xpk names it, by its shape: ``v5p-4x4x4``."""
        return f"{self.generation.sold_as}-{self.shape}"

    @property
    def accelerator_type(self) -> str:
        """As Cloud TPU names it, by its size: ``v5p-128``. UserError where that size comes in another shape."""
        if self.topology.generation == "v5p" and self.chips >= 64:
            usual = "x".join(map(str, _most_compact(self.chips)))
            if self.shape != usual:
                raise UserError(
                    f"topology {self.topology.name}: TPU VMs are asked for by the number of chips; {self.chips} are "
                    f"v5p:{usual}; take that, or launch on GKE"
                )
        return f"{self.generation.sold_as}-{self.chips * self.generation.cores}"


def slices_of(topology: Topology) -> TpuSlices:
    """Slices of a topology; UserError if Google Cloud has none of that generation or shape."""
    generation, sizes = topology.generation, topology.sizes
    if generation not in GENERATIONS:
        raise UserError(f"topology {topology.name}: launched are {', '.join(GENERATIONS)}")
    slices = TpuSlices(topology)
    if generation != "v5p":
        possible, known = slices.shape in _FLAT, ", ".join(_FLAT)
    else:
        cubes = all(size % 4 == 0 for size in sizes) and slices.chips <= 64 * _MOST_CUBES
        possible = slices.shape in _BELOW_A_CUBE or (cubes and list(sizes) == sorted(sizes))
        known = f"{', '.join(_BELOW_A_CUBE)}, or multiples of 4 in ascending order, like 4x4x4 and 4x8x8"
    if not possible:
        raise UserError(f"topology {topology.name}: there are no such slices; {generation} has {known}")
    if topology.slices > 1 and slices.hosts == 1:
        raise UserError(
            f"{topology.slices} slices of {topology.name}: one host can't be joined with others; take a larger slice"
        )
    return slices


def _most_compact(chips: int) -> tuple[int, ...]:
    """Shape in multiples of 4 of so many chips that has the shortest sides."""
    sides = [4 * n for n in range(1, chips // 64 + 1) if chips // 64 % n == 0]
    shapes = (shape for shape in itertools.combinations_with_replacement(sides, 3) if math.prod(shape) == chips)
    return min(shapes, key=sum)

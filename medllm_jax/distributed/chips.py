"""TPU generations: what a chip holds and does, and which slices there are."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medllm_jax.errors import UserError, first_line, quoted
from medllm_jax.ranges import Ranged, Slices

GIB = 2**30
MARGIN = 0.08  # of HBM that is better left free: fragments, and what the runtime itself holds


@dataclass(frozen=True)
class Chip:
    """One JAX device of a generation; speeds are a second's, by its maker's specification unless said otherwise.

    hbm: bytes that the compiler lets a program have (it names them where a program is too large); flops: bfloat16;
    bandwidth: bytes from HBM; link: bytes over one ICI link in one direction; axes: of the torus; clock: of the
    TensorCore, cycles: peak FLOP/s over FLOPs of its matrix units a cycle; dcn: bytes sent to other slices; devices: of
    one physical chip.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    clock: float
    dcn: float
    example: str
    devices: int = 1
    config: str | None = None  # of the compiler, where its default is not how such chips are run


# FLOP/s and HBM bandwidth of a chip: cloud.google.com/tpu/docs, one page a generation (a tpu7x device is one of its
# chip's two dies). HBM: the compiler. Links, axes and DCN, of a host whose chips share its network:
# jax-ml.github.io/scaling-book, "How to Think About TPUs". Clock: v4 and v5p have 2 cores of 4 matrix units of
# 128 x 128, v5e 1 of 4; of v6e and tpu7x the one at which the compiler's cycles of a large product come to 80 to 90 %
# of the peak.
CHIPS = {
    "v4": Chip(30.5 * GIB, 275e12, 1228e9, 45e9, 3, 1.05e9, 6.25e9, "v4:4x4x4", config="megacore"),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 45e9, 2, 1.5e9, 3.125e9, "v5e:4x4"),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 90e9, 3, 1.75e9, 6.25e9, "v5p:4x4x4"),
    "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 90e9, 2, 1.75e9, 12.5e9, "v6e:4x4"),
    "tpu7x": Chip(94.75 * GIB, 1153.5e12, 3690e9, 90e9, 3, 2.2e9, 6.25e9, "tpu7x:4x4x4", devices=2),
}


# JAX's name of a device -> peak bfloat16 FLOP/s. Of GPUs by Nvidia's data sheets, without sparsity.
_PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a kind of device, as `jax.Device.device_kind` names it; None where it is not known."""
    return next((_PEAKS[name] for name in sorted(_PEAKS, key=len, reverse=True) if device_kind.startswith(name)), None)


@dataclass(frozen=True)
class Topology(Ranged):
    """Slices of one generation, as the compiler names them: ``v5p:4x4x4``."""

    name: str
    slices: Slices = 1

    @property
    def generation(self) -> str:
        return self.name.partition(":")[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.name.partition(":")[2].split("x"))

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    def devices(self) -> list[Any]:
        """Stand-ins for the slices' devices: programs can be compiled for them, and not run. UserError without libtpu,
        or where the compiler does not know the topology."""
        from jax.experimental import topologies

        # A dimension of 4 or more closes to a ring. The compiler does not assume it, and without rings every gather
        # over a whole slice becomes a synchronous all-reduce.
        wrap = tuple(size >= 4 for size in self.sizes) + (False,) * (3 - len(self.sizes))
        more: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.config:
            more["chip_config_name"] = self.chip.config
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=self.name, wrap=wrap, **more)
        except RuntimeError as error:
            raise UserError(f"the compiler knows no topology {self.name}: {first_line(error)}") from None
        return list(description.devices)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """A Topology of a name like ``v5p:4x4x4``; UserError, with the names there are, for another form or generation."""
    generation, _, shape = text.partition(":")
    if generation not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape):
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise UserError(
            f"topology {quoted(text)}: a name like one of {examples} is expected (generation:shape, in chips)"
        )
    topology = Topology(text, slices)
    if len(topology.sizes) != topology.chip.axes:
        raise UserError(f"topology {text!r}: {generation} has {topology.chip.axes} axes, as in {topology.chip.example}")
    return topology


def ici_bandwidth(topology: Topology, spans: Sequence[bool]) -> float:
    """Bytes a second that a chip can take in over the axes of its slice that are spanned: two links of an axis that is
    a ring, one of a line."""
    links = sum(2 if size >= 4 else 1 for size, span in zip(topology.sizes, spans, strict=True) if span)
    return max(links, 1) * topology.chip.link


def chips_of(topology: Topology) -> int:
    return math.prod(topology.sizes) * topology.slices

"""Estimates a compiled program's time on a chip, by the compiler's own estimates and by hand where it has none.

The instructions are replayed in the order they were scheduled in: the TensorCore's clock goes on by the compiler's
cycles; collectives travel beside it, one after the other; where a result is waited for, the clock waits. What this
leaves out is in docs/plan.md.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

from medllm_jax.distributed.chips import Topology, ici_bandwidth
from medllm_jax.planning.activations import phase_of
from medllm_jax.planning.hlo import COLLECTIVES, Array, Instruction, Module, first_match, group_of, product_flops

# Share of the links' sum that collectives reach: 270 GB/s of a v5p chip's six links of 90 GB/s.
ICI_EFFICIENCY = 0.5
# Seconds that a collective takes beside its bytes: by hand, a dozen hops of the torus there and back.
LATENCY = 1e-5
# Share of the peak that attention kernels reach, forward and backward together: 0.40 s for a row of 4096 tokens through
# 80 layers of 64 heads on v5p. With it the method gives a published step time within 3 % (see docs/plan.md).
KERNEL_EFFICIENCY = 0.54
# Bytes a second between a chip and its host's memory, over PCIe (jax-ml.github.io/scaling-book, "How to Think About
# TPUs"), and the number that such memory has in the compiler's text.
HOST_BANDWIDTH = 1.5e10
_HOST = 5
# Products that a kernel makes, by its name: so many over the width of q and k, so many over that of v, which is smaller
# where branches ride in further columns. Half of each is skipped by the causal rule.
_KERNEL_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}

# Take no time that could be seen; copies that are started and finished run beside the TensorCore.
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "iota"),
    *("opt-barrier", "add-dependency", "recv", "send-done", "copy-start", "copy-done", "slice-start", "slice-done"),
)


class Collective(NamedTuple):
    """Collectives of one kind: axes of the mesh they work over; over: "ici" or "dcn"; bytes: that one chip takes in
    each time; asynchronous: beside other work; in_loop: inside a loop, such as the layers'; source: what the program
    asked for; times: a run; waited: seconds a run that the TensorCore waits for them."""

    kind: str
    axes: tuple[str, ...]
    over: str
    bytes: float
    asynchronous: bool
    in_loop: bool
    source: str
    times: int
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one run of a program, and what they are made of.

    busy: (phase, kind) -> seconds of the TensorCore; waits: seconds that it waits for what runs beside it; loops:
    (source, times, seconds each time); flops: of the products in the program, and by hand of its kernels; hbm_bytes:
    read and written; unknown: opcode -> times that an instruction has no estimate.
    """

    busy: dict[tuple[str, str], float]
    waits: float
    loops: list[tuple[str, int, float]]
    collectives: list[Collective]
    flops: float
    kernel_flops: float
    hbm_bytes: float
    unknown: dict[str, int]

    @property
    def seconds(self) -> float:
        return sum(self.busy.values()) + self.waits


class Machine(NamedTuple):
    """What a program runs on. mesh: axis -> size; places: (x, y, z, slice) of each device, in the mesh's order."""

    topology: Topology
    mesh: dict[str, int]
    places: list[list[int]]


def estimate(module: Module, machine: Machine) -> TimeEstimate:
    """The TimeEstimate of a program that was compiled to the end."""
    replay = _Replay(module, machine)
    replay.run(module.entry, times=1, phase="rest", in_loop=False)
    return TimeEstimate(
        dict(replay.busy),
        replay.waits,
        replay.loops,
        _summed(replay.collectives),
        replay.flops,
        replay.kernel_flops,
        replay.hbm_bytes,
        dict(replay.unknown),
    )


def _summed(collectives: list[Collective]) -> list[Collective]:
    """Sums up equal collectives; those with the most bytes a run come first."""
    alike: dict[Collective, list[Collective]] = defaultdict(list)
    for c in collectives:
        alike[c._replace(times=0, waited=0.0)].append(c)
    summed = (c._replace(times=sum(o.times for o in of), waited=sum(o.waited for o in of)) for c, of in alike.items())
    return sorted(summed, key=lambda c: -c.bytes * c.times)


class _Transfer(NamedTuple):
    """Something that goes on beside the TensorCore: its seconds, its number among the collectives if it is one, and
    the links that it takes."""

    seconds: float
    number: int | None
    over: str


class _Links:
    """The links of one device, and what is underway on them: one after the other on links of one kind."""

    def __init__(self):
        self._free: dict[str, float] = defaultdict(float)
        self._prepared: dict[str, _Transfer] = {}
        self._arrivals: dict[str, tuple[float, int | None]] = {}

    def prepare(self, name: str, transfer: _Transfer) -> None:
        self._prepared[name] = transfer

    def begin(self, prepared: str, name: str, clock: float) -> None:
        """Lets what was prepared go, under the name that it will be waited for by."""
        if transfer := self._prepared.get(prepared):
            self.share(transfer, clock)
            self._arrivals[name] = self._free[transfer.over], transfer.number

    def share(self, transfer: _Transfer, clock: float) -> None:
        """Takes the time of a transfer from the links: what is underway, or comes later, is late by as much."""
        self._free[transfer.over] = max(clock, self._free[transfer.over]) + transfer.seconds

    def arrival(self, name: str) -> tuple[float, int | None] | None:
        """When it is there, and its number among the collectives; None for what never began."""
        return self._arrivals.get(name)


class _Replay:
    def __init__(self, module: Module, machine: Machine):
        self._module, self._machine = module, machine
        self.busy: dict[tuple[str, str], float] = defaultdict(float)
        self.loops: list[tuple[str, int, float]] = []
        self.collectives: list[Collective] = []
        self.unknown: Counter[str] = Counter()
        self.waits = self.flops = self.kernel_flops = self.hbm_bytes = 0.0

    def run(self, name: str, *, times: int, phase: str, in_loop: bool) -> float:
        """Seconds of one run of a computation, all of whose parts are added up `times` times."""
        clock, links = 0.0, _Links()
        local = {i.name: i for i in self._module.computations[name]}
        for i in local.values():
            at = phase_of(i.source, phase)
            begins = i.opcode.removesuffix("-start")
            if i.opcode in ("while", "call", "conditional"):
                clock += self._inner(i, times, at, in_loop)
            elif i.opcode == "async-start" or (begins != i.opcode and begins in COLLECTIVES):
                links.prepare(i.name, self._collective(i, times, in_loop, asynchronous=True))
                if i.operands:  # else they, and the start, come with the update
                    links.begin(i.name, i.name, clock)
            elif i.opcode == "async-update":
                links.begin(i.operands[0], i.name, clock)
            elif i.opcode == "send":  # the same name on both sides
                links.prepare(_rendezvous(i), self._between_slices(i, times, in_loop))
                links.begin(_rendezvous(i), _rendezvous(i), clock)
            elif i.opcode == "recv-done":
                clock = self._wait(clock, links.arrival(_rendezvous(local[i.operands[0]])), times)
            elif i.opcode.endswith("-done") and i.operands and links.arrival(i.operands[0]):
                clock = self._wait(clock, links.arrival(i.operands[0]), times)
            elif i.opcode in COLLECTIVES:
                clock = self._synchronous(i, clock, links, times, in_loop)
            elif i.name.startswith("async-collective-start") and (inner := self._fused(i)):
                links.prepare(i.name, self._collective(inner, times, in_loop, asynchronous=True))
                links.begin(i.name, i.name, clock)
            elif i.name.startswith("async-collective-done"):
                clock = self._wait(clock, links.arrival(i.name.replace("done", "start")), times)
            elif i.cycles is None and (inner := self._fused(i)):
                clock = self._synchronous(inner, clock, links, times, in_loop)
            elif i.opcode not in _FREE and "AllocateBuffer" not in i.attributes:
                kind, seconds = self._work(i, local, times, in_loop)
                self.busy[at, kind] += seconds * times
                clock += seconds
        return clock

    def _fused(self, i: Instruction) -> Instruction | None:
        """The collective in a fusion, if there is one. A fusion without cycles does nothing else; one with cycles is a
        step, beside a product, of a collective that has started."""
        if i.opcode != "fusion":
            return None
        return next((inner for inner in self._module.inside(i) if inner.opcode in COLLECTIVES), None)

    def _synchronous(self, i: Instruction, clock: float, links: _Links, times: int, in_loop: bool) -> float:
        """The clock after a collective that is waited for."""
        transfer = self._collective(i, times, in_loop, asynchronous=False)
        links.share(transfer, clock)
        return self._wait(clock, (clock + transfer.seconds + LATENCY, transfer.number), times)

    def _wait(self, clock: float, arrival: tuple[float, int | None] | None, times: int) -> float:
        """The clock once something is there; the wait is added to all waits, and to the collective's own."""
        until, number = arrival or (clock, None)
        waited = max(until - clock, 0.0) * times
        self.waits += waited
        if number is not None:
            c = self.collectives[number]
            self.collectives[number] = c._replace(waited=c.waited + waited)
        return max(clock, until)

    def _inner(self, i: Instruction, times: int, phase: str, in_loop: bool) -> float:
        if i.opcode == "while":
            trips = self._module.trips(i)
            seconds = self.run(i.called("body")[0], times=times * trips, phase=phase, in_loop=True)
            self.loops.append((i.source, trips * times, seconds))
            return trips * seconds
        branches = i.called("to_apply") + i.called("branch_computations") + i.called("true_computation")
        # Of branches the first is counted: training has none, and no other rule is better.
        return sum(self.run(name, times=times, phase=phase, in_loop=in_loop) for name in branches[:1])

    def _work(self, i: Instruction, local: dict[str, Instruction], times: int, in_loop: bool) -> tuple[str, float]:
        """What the TensorCore does in an instruction, and for how long."""
        chip = self._machine.topology.chip
        moved = self._moved(i, local)
        self.hbm_bytes += moved * times
        if 'custom_call_target="tpu_custom_call"' in i.attributes:
            flops = _kernel_flops(i, local)
            if flops is None:
                self.unknown["kernel"] += times
                return "kernels", moved / chip.bandwidth
            self.kernel_flops += flops * times
            return "kernels", max(flops / (chip.flops * KERNEL_EFFICIENCY), moved / chip.bandwidth)
        flops = self._product_flops(i, local)
        self.flops += flops * times
        kind = "matrix products" if flops else "everything else"
        if i.cycles is not None:
            return kind, i.cycles / chip.clock
        if moved > 2**20:  # smaller ones cost nothing that could be seen
            self.unknown[i.opcode] += times
        return kind, max(moved / chip.bandwidth, flops / chip.flops)

    def _product_flops(self, i: Instruction, local: dict[str, Instruction]) -> float:
        if i.opcode in ("dot", "convolution"):
            return product_flops(i, [local[name].arrays[0] for name in i.operands])
        total = 0.0
        for attribute in ("calls", "called_computations"):
            for name in i.called(attribute):
                inner = {j.name: j for j in self._module.computations.get(name, ())}
                total += sum(self._product_flops(j, inner) for j in inner.values())
        return total

    def _moved(self, i: Instruction, local: dict[str, Instruction]) -> float:
        """Bytes that an instruction reads from and writes to HBM; of what it slices, the slice."""
        arrays = [_of(local[name].arrays) for name in i.operands if name in local]
        out = _of(i.arrays)
        if i.opcode == "dynamic-slice":
            return 2 * out
        if i.opcode == "dynamic-update-slice":
            return 2 * arrays[1]
        if i.opcode != "fusion":
            return sum(arrays) + out
        body = i.called("calls")[0]
        for number, size in enumerate(arrays):
            read = self._sliced(body, number)
            arrays[number] = size if read is None else min(size, read)
        for update in self._updates(body):  # writes a part of an array that is there
            whole, part = _of(update.arrays), self._part(body, update)
            out -= max(whole - part, 0.0) if out >= whole else 0.0
        return sum(arrays) + out

    def _sliced(self, body: str, number: int) -> float | None:
        """Bytes that a fusion reads of an operand of which it only takes slices; None where it reads all of it."""
        local = self._module.computations[body]
        names = {i.name for i in local if i.opcode == "parameter" and i.literal == str(number)}
        read = 0.0
        for i in local:
            if not names & set(i.operands):
                continue
            if i.opcode == "bitcast":
                names.add(i.name)
            elif i.opcode == "dynamic-slice":
                read += _of(i.arrays)
            elif i.opcode == "fusion":
                inner = self._sliced(
                    i.called("calls")[0], next(n for n, name in enumerate(i.operands) if name in names)
                )
                if inner is None:
                    return None
                read += inner
            elif i.opcode != "dynamic-update-slice" or i.operands[0] not in names:
                return None
        return read

    def _updates(self, body: str) -> list[Instruction]:
        return [i for i in self._module.computations[body] if i.opcode == "dynamic-update-slice"]

    def _part(self, body: str, update: Instruction) -> float:
        return _of(next(i for i in self._module.computations[body] if i.name == update.operands[1]).arrays)

    def _collective(self, i: Instruction, times: int, in_loop: bool, *, asynchronous: bool) -> _Transfer:
        """Notes a collective."""
        inner = i
        if i.opcode == "async-start":
            found = [j for j in self._module.inside(i) if j.opcode in COLLECTIVES]
            if not found:
                return self._copy(i)
            inner = found[0]
        kind = inner.opcode.removesuffix("-start")
        group = group_of(inner) or list(range(len(self._machine.places)))
        received = _payload(inner, kind, started=inner.opcode != kind) * _share(kind, len(group))
        over, bandwidth = self._network(group)
        axes = _axes(group, self._machine.mesh)
        source = inner.source or i.source
        self.collectives.append(Collective(kind, axes, over, received, asynchronous, in_loop, source, times))
        return _Transfer(received / bandwidth, len(self.collectives) - 1, over)

    def _copy(self, i: Instruction) -> _Transfer:
        """Something else that runs beside the TensorCore: a slice on its way to or from the host, a gather from HBM."""
        if any(array.space == _HOST for array in i.arrays):  # the slice, and the stack that it is one of
            return _Transfer(min(array.bytes for array in i.arrays if array.shape) / HOST_BANDWIDTH, None, "host")
        moved = sum(array.bytes for array in i.arrays[-2:])
        return _Transfer(moved / self._machine.topology.chip.bandwidth, None, "hbm")

    def _between_slices(self, i: Instruction, times: int, in_loop: bool) -> _Transfer:
        """Notes a collective between slices, which the compiler writes as a send to the hosts and a recv from them."""
        slices = self._machine.topology.slices
        kind = re.split(r"[._]", _rendezvous(i))[0]
        sent = i.arrays[0].bytes
        # `_share` goes by the whole array that a gather makes, and by the part that a scatter leaves.
        received = {"all-gather": sent * slices, "reduce-scatter": sent / slices}.get(kind, sent) * _share(kind, slices)
        self.collectives.append(Collective(kind, ("data",), "dcn", received, True, in_loop, i.source, times))
        return _Transfer(received / self._machine.topology.chip.dcn, len(self.collectives) - 1, "dcn")

    def _network(self, group: list[int]) -> tuple[str, float]:
        topology = self._machine.topology
        places = [self._machine.places[number] for number in group]
        if len({place[-1] for place in places}) > 1:
            return "dcn", topology.chip.dcn
        spans = [len({place[axis] for place in places}) > 1 for axis in range(len(topology.sizes))]
        return "ici", ici_bandwidth(topology, spans) * ICI_EFFICIENCY


def _rendezvous(i: Instruction) -> str:
    """The name by which a send finds its recv: ``all-reduce.121_0``."""
    return first_match(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes).group(1)


def _of(arrays: list[Array]) -> float:
    return sum(array.bytes for array in arrays if array.space == 0)


def _payload(i: Instruction, kind: str, *, started: bool) -> float:
    """Bytes of the whole array that a collective makes (all-gather) or takes (reduce-scatter), or of both alike."""
    arrays = i.arrays
    if started and len(arrays) > 1:  # (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind in ("all-gather", "all-reduce") else arrays[1:2]
    return sum(array.bytes for array in arrays)


def _share(kind: str, group: int) -> float:
    """Bytes that one of a group takes in, by `_payload`: rings, each of whose links carries every part once."""
    return {
        "all-gather": (group - 1) / group,
        "reduce-scatter": group - 1.0,
        "all-reduce": 2 * (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "ragged-all-to-all": (group - 1) / group,
        "collective-permute": 1.0,
    }[kind]


def _axes(group: list[int], mesh: dict[str, int]) -> tuple[str, ...]:
    """Names of the mesh's axes along which the members of a group differ."""
    names, sizes = list(mesh), list(mesh.values())
    steps = [math.prod(sizes[n + 1 :]) for n in range(len(sizes))]
    return tuple(
        name
        for name, size, step in zip(names, sizes, steps, strict=True)
        if len({place // step % size for place in group}) > 1
    )


def _kernel_flops(i: Instruction, local: dict[str, Instruction]) -> float | None:
    """FLOPs of an attention kernel, causal, from its name and its largest operand [..., heads, S, E]."""
    found = re.search(r"(?:splash|flash)\w*?_(fwd|dq|dkv)", i.source + i.name + i.attributes)
    operands = [a for name in i.operands for a in local[name].arrays if len(a.shape) >= 3]
    if not found or not operands:
        return None
    query = max(operands, key=lambda array: array.bytes)
    *_, length, wide = query.shape
    narrow = min(a.shape[-1] for a in operands if a.dtype == query.dtype)
    products, of_values = _KERNEL_PRODUCTS[found.group(1)]
    if found.group(1) == "dkv" and any(len(out.shape) > len(query.shape) for out in i.arrays):
        products += 1  # dq comes out of the same kernel, in parts
    scores = math.prod(query.shape[:-2]) * length * length / 2
    return 2.0 * scores * (products * wide + of_values * narrow)

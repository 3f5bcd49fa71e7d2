"""The compiler's dumps as data: scheduled instructions, and the allocations of memory."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]\d+\w*)\[([\d,<= ]*)\](?:\{[^}]*?S\((\d+)\)[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_UNKNOWN_CYCLES = 2**63 - 1  # what the compiler writes where it has no estimate


class Array(NamedTuple):
    """space: the memory it is in; 0 is HBM."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        return self.size * _BYTES.get(self.dtype, int(digits.group()) / 8 if digits else 0)


def arrays_of(text: str) -> list[Array]:
    """All arrays of a type, in order: one, or those of a tuple."""
    return [
        Array(dtype, tuple(int(size.lstrip("<= ")) for size in sizes.split(",") if size), int(space or 0))
        for dtype, sizes, space in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. attributes: what stands after the operands, as text."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        return arrays_of(self.type)

    @property
    def cycles(self) -> int | None:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(found.group(1)) if found else 0
        return cycles if 0 < cycles < _UNKNOWN_CYCLES else None

    @property
    def source(self) -> str:
        """Where the program's text asked for it: ``jit(train_step)/jvp()/while/body/...``."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute such as ``body``, ``calls`` or ``called_computations``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", found.group(1)) if found else []


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations as lists of instructions, those that run in the order they run in."""

    computations: dict[str, list[Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """How often a while's body runs: what its condition compares the counter with, which starts from 0."""
        condition = self.computations[loop.called("condition")[0]]
        everything = [*condition, *(inner for i in condition for inner in self.inside(i))]
        literals = [i.literal for i in everything if i.opcode == "constant"]
        return max((int(literal) for literal in literals if literal.isdigit()), default=1)

    def inside(self, i: Instruction) -> Iterator[Instruction]:
        """All instructions of the computations that an instruction calls, and of those that these call."""
        for attribute in ("calls", "called_computations"):
            for name in i.called(attribute):
                for inner in self.computations.get(name, ()):
                    yield inner
                    yield from self.inside(inner)


def parse(text: str) -> Module:
    """A Module of HLO text."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            current.append(_instruction(start.group(2), line[start.end() :]))
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    # Metadata of kernels holds line breaks: what begins neither an instruction nor a computation goes on the line.
    pending = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _HEADER.match(line) or line.startswith("}") or not line.strip():
            if pending:
                yield pending
            pending = line
        else:
            pending += " " + line
    yield pending


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end + 1 :].partition("(")
    open_at = end + 1 + len(opcode)
    close_at = _closing(rest, open_at)
    literal = rest[open_at + 1 : close_at]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, rest[:end], opcode.strip(), operands, literal, rest[close_at + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def first_match(pattern: str, text: str) -> re.Match[str]:
    """The first match in a compiler's text; ValueError where it has another form than the one read here."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f"the compiler's text has no {pattern}: this libtpu writes another form than the one read here"
        )
    return found


# --- products and collectives ------------------------------------------------------------------------------------


def product_flops(i: Instruction, operand: list[Array]) -> float:
    """FLOPs of a dot or convolution, two for each multiplication that is not with padding; 0 for other instructions.

    operand: its left and right input.
    """
    out = i.arrays[0]
    if i.opcode == "dot":
        contracted = first_match(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        sizes = [operand[0].shape[int(d)] for d in contracted.group(1).split(",") if d]
        return 2.0 * out.size * math.prod(sizes)
    if i.opcode != "convolution":
        return 0.0
    lhs, rhs, result = first_match(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    spatial = [label for label in rhs if label.isdigit()]
    size = {label: operand[1].shape[n] for n, label in enumerate(rhs)}
    input_size = {label: operand[0].shape[n] for n, label in enumerate(lhs)}
    output_size = {label: out.shape[n] for n, label in enumerate(result)}
    flops = 2.0 * output_size["b"] * output_size["f"] * size["i"]
    window = _window(i.attributes, len(spatial))
    for number, label in enumerate(sorted(spatial)):
        flops *= _valid_places(input_size[label], output_size[label], size[label], *window[number])
    return flops


def _window(attributes: str, dimensions: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, input dilation, kernel dilation) of every spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def column(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * dimensions

    stride, padding = column("stride", "1"), column("pad", "0_0")
    left, right = column("lhs_dilate", "1"), column("rhs_dilate", "1")
    return [
        (int(s), int(p.split("_")[0]), int(a), int(b)) for s, p, a, b in zip(stride, padding, left, right, strict=True)
    ]


def _valid_places(inputs: int, outputs: int, kernel: int, stride: int, low: int, dilate_in: int, dilate_kernel: int):
    """Pairs of output and kernel place that meet an input and not padding or a hole."""
    if kernel == 1 and low == 0 and dilate_in == 1:
        return outputs
    place = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None, :] * dilate_kernel - low
    return int(np.sum((place >= 0) & (place % dilate_in == 0) & (place < inputs * dilate_in)))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


def group_of(i: Instruction) -> list[int]:
    """Partitions of the first group that a collective works in."""
    text = i.attributes
    if i.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", first_match(r"source_target_pairs=\{(.*?)\}\}", text).group(0))
        return sorted({int(place) for place in pairs[0]}) if pairs else []
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        over = re.findall(r"'(\w+)'", named.group(2))
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in over else 0 for name in sizes)
        return np.atleast_1d(places[index]).flatten().tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape = [int(n) for n in iota.group(3).split(",")]
        places = np.arange(math.prod(shape)).reshape(shape)
        if iota.group(4):
            places = places.transpose([int(n) for n in iota.group(4).split(",")])
        return places.reshape(int(iota.group(1)), int(iota.group(2)))[0].tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return [int(n) for n in listed.group(1).split(",")] if listed else []


# --- memory ------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of HBM that a program asks for: its arguments, and one piece for all that lives while it runs.

    largest: the biggest parts of that piece, each (bytes, what lies there in turn); parts that lie there at different
    times share bytes, so that they don't add up.
    """

    arguments: int
    temporaries: int
    largest: list[tuple[int, str]]

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries


def read_memory(assignment: str, report: str) -> Memory:
    """Memory of a program from its dumps ``*buffer-assignment.txt`` and ``*memory-usage-report.txt``."""
    arguments = temporaries = 0
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", assignment, flags=re.MULTILINE):
        if "color" in rest or "thread-local" in rest:  # other memories, and parts of the one piece
            continue
        if re.search(r"\bparameter\b", rest):
            arguments += int(size)
        elif "constant" not in rest:
            temporaries += int(size)
    return Memory(arguments, temporaries, _largest(report))


def _largest(report: str) -> list[tuple[int, str]]:
    unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    table = report.partition("----\n")[2].partition("\n\n")[0]
    rows = re.findall(r"\(\s*\d+%\);\s*([\d.]+)(B|KiB|MiB|GiB);\s*\d+;\s*\d+; (.*)", table)
    return [(round(float(number) * unit[name]), shapes.strip()) for number, name, shapes in rows]

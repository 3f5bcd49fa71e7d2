"""Tells activations and gradients apart among a training step's temporaries, by the loops of the compiled program.

A loop over layers stacks a result of each layer: activations in the forward pass, gradients in the backward pass. A
loop over micro-batches carries the sums of gradients.
"""

import re
from typing import NamedTuple

from medllm_jax.planning.hlo import Array, Instruction, Module


class StepMemory(NamedTuple):
    """Bytes of HBM. All of them are held at once while the layers' backward pass runs."""

    activations: float
    gradients: float


def phase_of(source: str, default: str) -> str:
    """The part of a step that an instruction belongs to, found by its place in the program."""
    if "rematted_computation" in source:
        return "recomputation"
    if "transpose(" in source:
        return "backward"
    if "jvp(" in source:
        return "forward"
    return default


def step_memory(module: Module) -> StepMemory:
    """The StepMemory of a compiled step; zeros for a program without a backward pass."""
    found = {"forward": 0.0, "backward": 0.0, "rest": 0.0}
    loops = [i for instructions in module.computations.values() for i in instructions if i.opcode == "while"]
    for loop in loops:
        phase, trips = _phase_of_loop(module, loop), module.trips(loop)
        for array in _changed(module, loop):
            if phase == "rest" or array.shape[:1] == (trips,):
                found[phase] += array.bytes
    if not found["backward"]:
        return StepMemory(0.0, 0.0)
    return StepMemory(found["forward"], found["backward"] + found["rest"])


def _phase_of_loop(module: Module, loop: Instruction) -> str:
    if loop.source:
        return phase_of(loop.source, "rest")
    # Where the compiler takes a loop apart and puts it together again, only what is in it knows where it came from.
    inside = {phase_of(i.source, "rest") for i in module.computations[loop.called("body")[0]]}
    return next((phase for phase in ("backward", "forward") if phase in inside), "rest")


def _changed(module: Module, loop: Instruction) -> list[Array]:
    """The arrays in HBM that a loop carries and changes."""
    body = module.computations[loop.called("body")[0]]
    local = {i.name: i for i in body}
    handed = [local[name] for name in body[-1].operands]
    return [
        array
        for place, (i, array) in enumerate(zip(handed, loop.arrays, strict=True))
        if array.space == 0 and not (i.opcode == "get-tuple-element" and re.search(rf"\bindex={place}\b", i.attributes))
    ]

"""What loops carry, of a program as the compiler writes it."""

import pytest

from medllm_jax.planning.activations import StepMemory, step_memory
from medllm_jax.planning.hlo import parse

# Two layers: forward stacks an activation, backward a gradient; three micro-batches are added up around both.
TEXT = """
%three (a: s32[]) -> pred[] {{
  %bound.3 = s32[] constant(3)
}}
%two (b: s32[]) -> pred[] {{
  %bound.2 = s32[] constant(2)
}}
%layer (c: (f32[2,8], bf16[4], bf16[2,4])) -> (f32[2,8], bf16[4], bf16[2,4]) {{
  %c = (f32[2,8], bf16[4], bf16[2,4]) parameter(0)
  %weights = f32[2,8] get-tuple-element(%c), index=0
  %x = bf16[4] fusion(%c), calls=%none, metadata={{op_name="transpose(jvp())/add"}}
  %stacked = bf16[2,4] fusion(%c), calls=%none
  ROOT %out = (f32[2,8], bf16[4], bf16[2,4]) tuple(%weights, %x, %stacked)
}}
%micro (d: (f32[2,8], f32[2,8])) -> (f32[2,8], f32[2,8]) {{
  %d = (f32[2,8], f32[2,8]) parameter(0)
  %same = f32[2,8] get-tuple-element(%d), index=0
  %f = (f32[2,8], bf16[4], bf16[2,4]{space}) while(%d), condition=%two, body=%layer, metadata={{op_name="jit(f)/jvp()"}}
  {backward}
  %sum = f32[2,8] fusion(%d), calls=%none
  ROOT %sums = (f32[2,8], f32[2,8]) tuple(%same, %sum)
}}
ENTRY %main (x: f32[2,8]) -> f32[2,8] {{
  %m = (f32[2,8], f32[2,8]) while(%x), condition=%three, body=%micro, metadata={{op_name="jit(f)/while"}}
}}
"""
BACKWARD = "%g = (f32[2,8], bf16[4], f32[2,8]) while(%d), condition=%two, body=%layer"
NAMED = BACKWARD + ', metadata={op_name="transpose(jvp())"}'


@pytest.mark.parametrize("backward", [NAMED, BACKWARD], ids=["named", "by what is in it"])
def test_stacks_are_activations_and_gradients_and_the_rest_of_a_loop_is_neither(backward):
    found = step_memory(parse(TEXT.format(space="", backward=backward)))
    assert found == StepMemory(activations=2 * 2 * 4, gradients=4 * 2 * 8 + 4 * 2 * 8)


def test_what_is_on_the_host_is_not_in_hbm():
    assert step_memory(parse(TEXT.format(space="{1,0:T(8,128)S(5)}", backward=BACKWARD))).activations == 0


def test_a_program_without_a_backward_pass_keeps_nothing():
    assert step_memory(parse(TEXT.format(space="", backward=""))) == StepMemory(0, 0)

"""Reading the compiler's text: excerpts of what it writes for v5p."""

import pytest

from medllm_jax.planning.hlo import Array, arrays_of, group_of, parse, product_flops, read_memory

TEXT = """HloModule jit_step, is_scheduled=true

%fused.1 (p0: bf16[64,256], p1: bf16[64,256]) -> bf16[64,64] {
  %p0 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_oi->bf
}

%cond (c: (s32[], bf16[64,64])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(80)
  %c = (s32[]{:T(128)}, bf16[64,64]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.9), direction=LT
}

ENTRY %main (a: bf16[64,256]) -> bf16[64,64] {
  %a = bf16[64,256]{1,0} parameter(0)
  %fusion.1 = bf16[64,64]{1,0:T(8,128)} fusion(%a, %a), kind=kOutput, calls=%fused.1, metadata={op_name="jit(f)/jvp(
two lines)/x"}, backend_config={"window_config":{"estimated_cycles":"2944"}}
  %tuple.1 = (s32[], bf16[64,64]{1,0}) tuple(%fusion.1)
  ROOT %while.1 = (s32[], /*index=1*/bf16[64,64]{1,0}) while(%tuple.1), condition=%cond, body=%body
}
"""


def test_a_module_is_read():
    module = parse(TEXT)
    assert (module.entry, set(module.computations)) == ("main", {"fused.1", "cond", "main"})
    _, fusion, _, loop = module.computations["main"]
    assert (fusion.opcode, fusion.operands, fusion.cycles) == ("fusion", ("a", "a"), 2944)
    assert "two lines" in fusion.source
    assert (loop.opcode, loop.called("body"), module.trips(loop)) == ("while", ["body"], 80)
    product = list(module.inside(fusion))[-1]
    assert product_flops(product, [p.arrays[0] for p in module.computations["fused.1"][:2]]) == 2 * 64 * 64 * 256


def test_arrays_have_their_memory():
    assert arrays_of("(bf16[2,<=3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}, f8e4m3fn[], pred[7]{0:T(8)})") == [
        Array("bf16", (2, 3), 1),
        Array("s4", (5,)),
        Array("f8e4m3fn", ()),
        Array("pred", (7,)),
    ]
    assert [array.bytes for array in arrays_of("bf16[2,3], s4[5], f8e4m3fn[9], f32[2]")] == [12, 2.5, 9, 8]


@pytest.mark.parametrize(
    ("convolution", "flops"),
    [
        # A batched product as the compiler writes it: each of 8 places of the window meets one of the batch.
        (
            "%c = f32[8,16,32]{2,1,0} convolution(%x, %y), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
            "dim_labels=0bf_0io->0bf",
            2 * 8 * 16 * 32 * 64,
        ),
        ("%c = f32[16,32]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 16 * 32 * 64),
    ],
)
def test_products_are_counted_without_padding(convolution, flops):
    batched = "0bf" in convolution
    x, y = ((8, 16, 64), (8, 64, 32)) if batched else ((16, 64), (64, 32))
    (product,) = parse(f"ENTRY %e (a: f32[]) -> f32[] {{\n  {convolution}\n}}\n").computations["e"]
    assert product_flops(product, [Array("f32", x), Array("f32", y)]) == flops


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [0, 4]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups={{0,3},{1,2}}", [0, 3]),
    ],
)
def test_groups_of_collectives(groups, first):
    line = f"  %g = bf16[8]{{0}} all-gather(%x), channel_id=1, {groups}, dimensions={{0}}"
    (gather,) = parse(f"ENTRY %e (a: f32[]) -> f32[] {{\n{line}\n}}\n").computations["e"]
    assert group_of(gather) == first


def test_memory_is_arguments_and_the_one_piece():
    assignment = """BufferAssignment:
allocation 0: size 134217728, page 0, thread-local:
allocation 6: size 1000, page 0, parameter 4, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
allocation 7: size 24, page 0, parameter 5, shape |f32[6]| at ShapeIndex {}:
allocation 8: size 512, page 0, constant:
allocation 9: size 5000, page 0, preallocated-temp:
allocation 10: size 9999, color 1, page 0, preallocated-temp:
"""
    report = """Memory Space: default (color=0)
Total bytes: 6024 (5.8KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    1.00KiB( 60%);    1.00KiB;            0;                2; 2×f32[256]
     600B(100%);     600B;         1024;                1; f32[150]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
"""
    memory = read_memory(assignment, report)
    assert (memory.arguments, memory.temporaries, memory.peak) == (1024, 5000, 6024)
    assert memory.largest == [(1024, "2×f32[256]"), (600, "f32[150]")]

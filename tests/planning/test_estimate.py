"""The replay of a schedule, on programs whose time can be told by hand."""

import pytest

from medllm_jax.distributed.chips import parse_topology
from medllm_jax.planning.estimate import HOST_BANDWIDTH, ICI_EFFICIENCY, LATENCY, Machine, estimate
from medllm_jax.planning.hlo import parse

V5P = parse_topology("v5p:4x4x4")
PLACES = [[x, y, z, 0] for x in range(4) for y in range(4) for z in range(4)]
MACHINE = Machine(V5P, {"data": 1, "fsdp": 16, "tensor": 4}, PLACES)

# Gathers over fsdp: 15/16 of 2^30 bytes, over two rings of 90 GB/s links.
GATHER = 2**30 * 15 / 16 / (4 * 90e9 * ICI_EFFICIENCY)
GROUPS = "replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}"


def work(name, cycles, source="jit(f)/jvp()/mul"):
    return (
        f"  %{name} = bf16[8]{{0:T(8)S(1)}} fusion(), kind=kLoop, calls=%empty, "
        f'metadata={{op_name="{source}"}}, backend_config={{"estimated_cycles":"{cycles}"}}\n'
    )


def program(body):
    return parse(
        "%empty () -> bf16[8] {\n}\n"
        "%gather (g: bf16[8]) -> bf16[536870912] {\n"
        f"  %gathered = bf16[536870912]{{0}} all-gather(%g), {GROUPS}, dimensions={{0}}\n}}\n"
        "%offloaded (o: bf16[8]) -> bf16[536870912] {\n"
        "  %call = bf16[536870912]{0} custom-call(%o), called_computations={%gather}\n}\n"
        "%condition (c: s32[]) -> pred[] {\n  %bound = s32[] constant(10)\n}\n"
        f"%body (b: s32[]) -> s32[] {{\n{body}}}\n"
        "ENTRY %main (x: s32[]) -> s32[] {\n"
        '  %loop = s32[] while(%x), condition=%condition, body=%body, metadata={op_name="jit(f)/jvp()/while"}\n}\n'
    )


START = "  %s = ((), (), s32[]) async-start(), calls=%offloaded\n  %u = (bf16[8]) async-update(%s, %x)\n"


def test_what_is_beside_other_work_costs_what_is_left_of_it():
    busy = 1e-3
    estimated = estimate(program(START + work("w", 1_750_000) + "  %d = bf16[8] async-done(%u)\n"), MACHINE)
    assert estimated.busy == {("forward", "everything else"): pytest.approx(10 * busy)}
    assert estimated.waits == pytest.approx(10 * (GATHER - busy))
    (gather,) = estimated.collectives
    assert (gather.axes, gather.times, gather.asynchronous, gather.in_loop) == (("fsdp",), 10, True, True)
    hidden = estimate(program(START + work("w", 10**9) + "  %d = bf16[8] async-done(%u)\n"), MACHINE)
    assert hidden.waits == 0


def test_what_is_synchronous_is_waited_for():
    line = f"  %g = bf16[536870912]{{0}} all-gather(%x), {GROUPS}, dimensions={{0}}\n"
    estimated = estimate(program(work("w", 1750) + line), MACHINE)
    assert estimated.waits == pytest.approx(10 * (GATHER + LATENCY))
    assert estimated.seconds == pytest.approx(10 * (GATHER + LATENCY + 1e-6))
    assert not estimated.collectives[0].asynchronous


def fused(name, cycles=None):
    config = f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles else ""
    return f"  %{name} = bf16[8]{{0:T(8)S(1)}} fusion(%x), kind=kLoop, calls=%gather{config}\n"


def test_a_collective_in_steps_of_fusions_is_one():
    """As on v5e: it starts in one fusion, goes on in others, and is done in a last one."""
    steps = fused("async-collective-start.2") + fused("f.1", 875_000) + fused("f.2", 875_000)
    estimated = estimate(program(steps + fused("async-collective-done.2")), MACHINE)
    (gather,) = estimated.collectives
    assert (gather.times, gather.asynchronous) == (10, True)
    assert estimated.waits == pytest.approx(10 * (GATHER - 1e-3))


def test_a_collective_that_a_fusion_does_alone_is_waited_for():
    estimated = estimate(program(work("w", 1750) + fused("f")), MACHINE)
    assert estimated.waits == pytest.approx(10 * (GATHER + LATENCY))
    assert not estimated.collectives[0].asynchronous


def test_slices_talk_over_the_network_of_the_data_centre():
    machine = Machine(parse_topology("v5p:2x2x2", 2), {"data": 2, "fsdp": 8}, [[0, 0, 0, n // 8] for n in range(16)])
    name = '_xla_host_transfer_rendezvous="all-reduce.1_0"'
    lines = (
        f"  %s = (f32[1000], u32[], token[]) send(%x, %t), is_host_transfer=true, frontend_attributes={{{name}}}\n"
        f"  %r = (f32[1000], u32[], token[]) recv(%t), is_host_transfer=true, frontend_attributes={{{name}}}\n"
        "  %sd = token[] send-done(%s)\n  %rd = (f32[1000], token[]) recv-done(%r)\n"
    )
    (reduce,) = estimate(program(lines), machine).collectives
    assert (reduce.kind, reduce.over, reduce.axes, reduce.bytes) == ("all-reduce", "dcn", ("data",), 4000)
    assert reduce.waited == pytest.approx(10 * 4000 / V5P.chip.dcn)


def test_what_is_kept_on_the_host_comes_back_slowly():
    """A slice out of a stack there: as the compiler writes what a remat policy offloads."""
    types = "((bf16[80,4096,1024]{2,1,0:T(8,128)S(5)}, s32[], s32[]), bf16[1,4096,1024]{2,1,0:T(8,128)}, u32[])"
    lines = f"  %s = {types} async-start(%x, %n), calls=%empty\n" + work("w", 1750)
    done = "  %d = bf16[1,4096,1024]{2,1,0:T(8,128)} async-done(%s)\n"
    waited = estimate(program(lines + done), MACHINE).waits
    assert waited == pytest.approx(10 * (4096 * 1024 * 2 / HOST_BANDWIDTH - 1e-6))


def test_phases_come_from_where_the_program_asked():
    sources = {
        "forward": "jit(f)/jvp()/mul",
        "backward": "jit(f)/transpose(jvp())/mul",
        "recomputation": "jit(f)/transpose(jvp())/checkpoint/rematted_computation/mul",
    }
    lines = "".join(work(name, 1750, source) for name, source in sources.items())
    assert {phase for phase, _ in estimate(program(lines), MACHINE).busy} == set(sources)


def test_kernels_are_counted_by_hand():
    line = (
        "  %q = bf16[8,8,4096,128]{3,2,1,0} parameter(0)\n"
        '  %splash_mqa_fwd.1 = bf16[8,8,4096,128]{3,2,1,0} custom-call(%q), custom_call_target="tpu_custom_call"\n'
    )
    once = 2 * 2 * 64 * 4096**2 / 2 * 128
    assert estimate(program(line), MACHINE).kernel_flops == 10 * once

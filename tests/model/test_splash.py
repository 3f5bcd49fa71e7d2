"""The TPU kernel against attention's definition: its own run on the CPU, and its compilation for a TPU."""

import ast
import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.sharding import ACTIVATIONS, make_mesh
from medllm_jax.model import splash
from medllm_jax.model.attention import RESIDUALS, TokenLayout
from tests.model.test_attention import arrays, attend_at_once, place

ROWS, HEADS, KV_HEADS = 4, 4, 2
QUICK = {
    # mesh, width of a head, dtype, branches, copies of each of a row's 16 tokens: 24 make 3 blocks, 20 are padded to 3
    ((1, 1, 1), 64, "float32", False, 24),
    ((2, 2, 2), 128, "float32", True, 20),
    ((1, 1, 1), 64, "bfloat16", True, 20),
    ((2, 2, 2), 128, "bfloat16", False, 24),
}
ALL = itertools.product([(1, 1, 1), (2, 2, 2)], [64, 128], ["float32", "bfloat16"], [False, True], [20, 24])
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL]


def make(sizes=(1, 1, 1), *, branches: bool):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    return splash.make_splash(mesh, ACTIVATIONS["heads"], branches=branches, interpret=True)


def rows(repeat: int, *, branches: bool) -> TokenLayout:
    where = place(ROWS, repeat)
    return where if branches else where._replace(branch_ids=jnp.zeros_like(where.branch_ids))


def weighted(function, q, k, v, where: TokenLayout):
    """Output, and gradients of its sum weighted by numbers that no two elements share, 0 on padding."""

    def total(q, k, v):
        out = function(q, k, v, where, where).astype(jnp.float32)
        weights = jnp.sin(jnp.arange(out.size).reshape(out.shape)) * (where.segment_ids > 0)[..., None, None]
        return jnp.sum(out * weights), out

    quickly_compiled = {"xla_backend_optimization_level": 0}
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), compiler_options=quickly_compiled)
    (_, out), gradients = run(q, k, v)
    return [np.asarray(x.astype(jnp.float32)) for x in (out, *gradients)]


@pytest.mark.parametrize(("sizes", "width", "dtype", "branches", "repeat"), CASES)
def test_splash_is_the_definition(sizes, width, dtype, branches, repeat):
    where = rows(repeat, branches=branches)
    inputs = [x.astype(dtype) for x in arrays(ROWS, 16 * repeat, HEADS, KV_HEADS, width)]
    ours = weighted(make(sizes, branches=branches), *inputs, where)
    exact = weighted(attend_at_once, *(x.astype(jnp.float32) for x in inputs), where)
    padding = np.asarray(where.segment_ids) == 0
    assert padding.any()
    for mine, theirs in zip(ours, exact, strict=True):
        tolerance = {"float32": 2e-6, "bfloat16": 1e-2}[dtype] * np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, atol=tolerance)
    for gradient in ours[1:]:
        assert not gradient[padding].any()


def test_the_backward_pass_of_long_rows_is_the_same(monkeypatch):
    """Rows of many blocks have two kernels for it."""
    where = rows(24, branches=True)
    inputs = arrays(ROWS, 384, HEADS, KV_HEADS, 64)
    fused = weighted(make(branches=True), *inputs, where)
    monkeypatch.setattr(splash, "_TOO_MANY_PARTS", 1)
    for one, other in zip(fused, weighted(make(branches=True), *inputs, where), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("branches", "highest"), [(False, 0), (True, splash.MAX_BRANCH)])
def test_branches_that_splash_was_not_made_for_are_not_a_number(branches, highest):
    where = place(ROWS, 8)
    where = where._replace(branch_ids=where.branch_ids + (where.branch_ids == 2) * (splash.MAX_BRANCH - 1))
    out = make(branches=branches)(*arrays(ROWS, 128, HEADS, KV_HEADS, 64), where, where)
    beyond = np.asarray(where.branch_ids) > highest
    assert beyond.any()
    np.testing.assert_array_equal(np.isnan(out).any(axis=(2, 3)), beyond)


def test_a_remat_policy_can_keep_what_the_backward_pass_needs():
    """Beside its arguments: the output and one float32 a query and head."""
    where, (q, k, v) = rows(8, branches=True), arrays(ROWS, 128, HEADS, KV_HEADS, 64)
    sizes = {}
    for names in ((), (RESIDUALS,)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        kept = jax.checkpoint(lambda *qkv: make(branches=True)(*qkv, where, where), policy=policy)
        pullback = jax.eval_shape(lambda *qkv, f=kept: jax.vjp(f, *qkv)[1], q, k, v)
        leaves = jax.tree.leaves(pullback)
        sizes[names] = [
            sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, kind))
            for kind in (jnp.floating, jnp.integer)
        ]
    (kept, tables), (recomputed, all_tables) = sizes[RESIDUALS,], sizes[()]
    assert kept - recomputed == q.size + q.size // q.shape[-1]
    # Of the kernel's tables of blocks, the forward pass's are not kept where nothing runs it again (from JAX 0.12 on).
    assert tables <= all_tables


# One process can't hold a TPU's compiler and the virtual devices of the other tests.
COMPILE = """
    import jax, jax.numpy as jnp, re
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from medllm_jax.config.schema import MeshConfig, PrecisionConfig
    from medllm_jax.model.abstract import attention_on
    from medllm_jax.model.attention import TokenLayout
    from medllm_jax.model.qwen2 import REMAT_POLICIES
    from medllm_jax.distributed.sharding import ACTIVATIONS, make_mesh, rows_over

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)

    def kernels(remat, branches, dtype, length=4096, width=128):
        attend = attention_on(mesh, "auto", PrecisionConfig(), branches=branches)

        def block(x, segments):
            place = TokenLayout(jnp.arange(length), segments, 0 * segments)
            return x + attend(x, x[:, :, ::8], x[:, :, ::8], place, place)

        def total(x, segments):
            body = jax.checkpoint(lambda x, _: (block(x, segments), None), policy=REMAT_POLICIES[remat])
            return jnp.sum(jax.lax.scan(body, x, length=2)[0].astype(jnp.float32))

        heads = NamedSharding(mesh, ACTIVATIONS["heads"])
        x = jax.ShapeDtypeStruct((2, length, 16, width), dtype, sharding=heads)
        segments = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows_over(mesh))
        text = jax.jit(jax.grad(total)).lower(x, segments).compile().as_text()
        return re.findall(r"%splash_mqa_(fwd|dkv|dq)\\S* = ", text)

    print(kernels("full", False, jnp.bfloat16))
    print(kernels("attention", False, jnp.bfloat16))
    print(kernels("attention", True, jnp.bfloat16))
    print(kernels("attention", True, jnp.float32))
    print(kernels("attention", True, jnp.bfloat16, length=16384))
    print(kernels("attention", True, jnp.bfloat16, length=1000, width=64))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (the extra `plan`)")
@pytest.mark.usefixtures("flags_of_libtpu")
def test_splash_compiles_for_a_tpu():
    """With each kernel once where the policy keeps what it made, and the forward one again where it does not."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [sorted(ast.literal_eval(line)) for line in done.stdout.splitlines() if line.startswith("[")]
    once = ["dkv", "fwd"]
    assert found == [["dkv", "fwd", "fwd"], once, once, once, ["dkv", "dq", "fwd"], once]

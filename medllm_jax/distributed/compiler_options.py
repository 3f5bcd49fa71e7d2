"""Options of the TPU compiler, by kind of device: what `train` runs is compiled with them, and so what `plan` looks at.

On other devices there are none.
"""

from typing import Any

from jax.sharding import Mesh

_SPARSE_CORE = "the SparseCores run collectives beside the TensorCore, which otherwise waits for every one of them"
_OFFLOAD: dict[str, tuple[Any, str]] = {
    f"xla_tpu_enable_sparse_core_collective_offload_{collective}": (True, _SPARSE_CORE)
    for collective in (
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "2d_all_gather",
        "3d_all_gather",
        "nd_reduce_scatter",
    )
}
# What a fusion may use of a core's on-chip memory, KiB; others run v5p and v6e with this value. By the compiler's own
# cycles the default leaves the products of the 72B at 75 to 85 % of the peak, and this brings them to 96 %. Compiling
# takes twice as long.
_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": (50000, "larger tiles of matrix products")}
# Without it 32B's gathers over 32 chips become loops of small products, at a quarter of the speed.
_WHOLE = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": (
        1_000_000,
        "weights are gathered whole, a layer ahead, instead of piece by piece inside a loop of small products",
    )
}
_FUSE = "has no SparseCore: collectives go on inside fusions, step by step; the compiler refuses this elsewhere"
_FUSION: dict[str, tuple[Any, str]] = {
    "xla_tpu_enable_async_collective_fusion": (True, _FUSE),
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": (True, _FUSE),
    "xla_tpu_enable_async_collective_fusion_multiple_steps": (True, _FUSE),
}
# Device kind -> option -> (value, why). Only those of v5p were chosen by estimates (see docs/plan.md).
OPTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "TPU v5": _OFFLOAD | _MEMORY | _WHOLE,  # v5p
    "TPU v6 lite": _OFFLOAD | _MEMORY | _WHOLE,
    "TPU7x": _OFFLOAD | _WHOLE,
    "TPU v5 lite": _FUSION | _WHOLE,
}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Options to compile a program with that runs on a mesh's devices: `jax.jit(..., compiler_options=...)`."""
    options = OPTIONS.get(mesh.devices.flat[0].device_kind, {})
    return {name: value for name, (value, _) in options.items()}

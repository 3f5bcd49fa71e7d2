"""Where every array lives: one table for parameters, one for activations, over the axes data, fsdp and tensor."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medllm_jax.config.schema import MeshConfig, ModelConfig
from medllm_jax.distributed.mesh_sizes import mesh_sizes
from medllm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Parameter path -> PartitionSpec. Weights are [out, in], those of blocks [L, out, in]. Every parameter matches exactly
# one row. Column-parallel layers split `out` over tensor, row-parallel ones `in`; fsdp takes the other dimension.
PARAMETERS: tuple[tuple[str, P], ...] = (
    (r"(embed_tokens|lm_head)/weight", P("tensor", "fsdp")),
    (r"layers/self_attn/[qkv]_proj/weight", P(None, "tensor", "fsdp")),
    (r"layers/self_attn/[qkv]_proj/bias", P(None, "tensor")),
    (r"layers/self_attn/o_proj/weight", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(gate|up)_proj/weight", P(None, "tensor", "fsdp")),
    (r"layers/mlp/down_proj/weight", P(None, "fsdp", "tensor")),
    (r"layers/(input|post_attention)_layernorm/weight", P(None, None)),
    (r"norm/weight", P(None)),
    # A quantised base lies in whole rows where it can: a row may have too few blocks to be split.
    (r"layers/(self_attn/[qkv]|mlp/(gate|up))_proj/(codes|absmax)", P(None, ("tensor", "fsdp"), None)),
    (r"layers/(self_attn/[qkv]|mlp/(gate|up))_proj/absmax_(low|step)", P(None, ("tensor", "fsdp"))),
    (r"layers/(self_attn/o|mlp/down)_proj/(codes|absmax)", P(None, "fsdp", "tensor")),
    (r"layers/(self_attn/o|mlp/down)_proj/absmax_(low|step)", P(None, "fsdp")),
    # Adapters, [L, rank, in] and [L, out, rank]: the one long dimension is split over all there is.
    (r"layers/(self_attn|mlp)/\w+_proj/lora_A", P(None, None, ("tensor", "fsdp"))),
    (r"layers/(self_attn|mlp)/\w+_proj/lora_B", P(None, ("tensor", "fsdp"), None)),
)

ACTIVATIONS: Mapping[str, P] = {
    "hidden": P(BATCH_AXES, None, None),  # [B, S, D]
    "heads": P(BATCH_AXES, None, "tensor", None),  # [B, S, heads, E]
    "mlp": P(BATCH_AXES, None, "tensor"),  # [B, S, F]
    "factor": P(None, None),  # [rank, in] or [out, rank] of an adapter
    "columns": P("tensor"),  # [out, ...] of a quantised weight, gathered over fsdp
    "rows": P(None, "tensor"),  # [out, in] of one whose `in` is split, o_proj and down_proj
    "row_scales": P(None),  # [out] of such a one
    "embedding": P("tensor", None),  # [V, D] gathered over fsdp before the look-up, which can't be split over D
}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh of (data, fsdp, tensor) over all devices; UserError if the sizes don't multiply to their number.

    Several TPU slices lie along data, which has the least traffic: between slices it takes the data centre's network.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(mesh_sizes(config, len(devices)).values())
    auto = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        # Two chips of a ring of four may share an axis of the mesh, which is slower than a whole ring and no error.
        return Mesh(create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES, auto)
    if sizes[0] % slices:
        raise UserError(f"mesh.data {sizes[0]} is not a multiple of the {slices} slices that the devices are in")
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    return Mesh(create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True), AXES, auto)


def on_cpus(mesh: Mesh) -> bool:
    """Whether the devices are CPUs, where a longer program may be the faster one."""
    return mesh.devices.flat[0].platform == "cpu"


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether programs run on a single CPU device, so that what they do in turn takes no device's time from others."""
    return on_cpus(mesh) and mesh.size == 1


def check_divisible(mesh: Mesh, model: ModelConfig, micro_batch: int) -> None:
    """UserError with the numbers in it where a model or a micro-batch (rows) does not split over the mesh."""
    tensor, fsdp, rows = mesh.shape["tensor"], mesh.shape["fsdp"], mesh.shape["data"] * mesh.shape["fsdp"]
    for name, axis, parts in (
        ("num_key_value_heads", "tensor", tensor),
        ("intermediate_size", "tensor", tensor),
        ("vocab_size", "tensor", tensor),
        ("hidden_size", "fsdp", fsdp),
    ):
        size = getattr(model, name)
        if size % parts:
            raise UserError(f"model.{name} {size} does not divide by mesh.{axis} {parts}: choose another mesh.{axis}")
    if micro_batch % rows:
        raise UserError(
            f"a micro-batch of {micro_batch} rows does not divide by data x fsdp = {rows}: "
            "data.batch_size / data.accumulate must be a multiple of it"
        )


def path_of(key_path: tuple) -> str:
    """``layers/self_attn/q_proj/weight`` of a jax key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def row_of(table: tuple[tuple[str, Any], ...], path: str) -> Any:
    """The value of the one row whose pattern matches the whole path; LookupError for none or several."""
    values = [value for pattern, value in table if re.fullmatch(pattern, path)]
    if len(values) != 1:
        raise LookupError(f"parameter {path} matches {len(values)} rows of the table, not one")
    return values[0]


def parts_of(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Into how many parts each dimension of a parameter is split, on a mesh of such sizes.

    UserError with the numbers in it where one does not divide.
    """
    spec = row_of(PARAMETERS, path)
    parts = []
    for dimension, axes in enumerate(map(_names, spec)):
        parts.append(math.prod(sizes[axis] for axis in axes))
        if shape[dimension] % parts[-1]:
            listed = " x ".join(f"mesh.{axis} {sizes[axis]}" for axis in axes)
            raise UserError(f"dimension {dimension} of {path} {shape} does not divide by {listed}")
    return tuple(parts)


def reading_spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """How devices split a parameter that is stored in whole rows while they read it: each whole rows, none twice.

    Axes of the mesh that split its columns by `PARAMETERS` split rows instead, or blocks where these don't divide.
    Where neither does, it is read as it will lie.
    """
    spec = row_of(PARAMETERS, path)
    if len(shape) - path.startswith("layers/") < 2 or spec[-1] is None:
        return spec
    used = [axis for axes in spec for axis in _names(axes)]
    places = range(len(shape) - 2, -1, -1)  # rows first
    for chosen in itertools.product(places, repeat=len(used)):
        split = [tuple(a for a, place in zip(used, chosen, strict=True) if place == d) for d in range(len(shape) - 1)]
        if all(size % math.prod(sizes[a] for a in axes) == 0 for size, axes in zip(shape, split, strict=False)):
            return P(*split, None)
    return spec


def reading_parts(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Into how many parts each dimension is split by `reading_spec`; UserError as `parts_of`."""
    parts_of(path, shape, sizes)
    spec = reading_spec(path, shape, sizes)
    return tuple(math.prod(sizes[axis] for axis in _names(axes)) for axes in spec)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the mesh that split a dimension, of an entry of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else axes or ()


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedSharding of every parameter of a tree of arrays or shapes, by `PARAMETERS`."""

    def sharding(key_path, leaf) -> NamedSharding:
        path = path_of(key_path)
        parts_of(path, leaf.shape, mesh.shape)
        return NamedSharding(mesh, row_of(PARAMETERS, path))

    return jax.tree_util.tree_map_with_path(sharding, params)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows_over(mesh: Mesh) -> NamedSharding:
    """First dimension split over data and fsdp: rows of a batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def activation_constraint(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """`(array, kind) -> array` that pins an activation to its row of `ACTIVATIONS`."""

    def constrain(array: jax.Array, kind: str) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, ACTIVATIONS[kind]))

    return constrain

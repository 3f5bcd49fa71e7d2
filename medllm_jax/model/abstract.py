"""A model on a mesh without its weights, and random ones."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from medllm_jax.config.schema import AdapterConfig, ModelConfig, PrecisionConfig
from medllm_jax.distributed.sharding import ACTIVATIONS, activation_constraint, is_one_cpu, parameter_shardings
from medllm_jax.errors import UserError
from medllm_jax.model.attention import attend_by_cudnn, attend_in_blocks
from medllm_jax.model.lora import adapted_linear, new_factors, set_dropout, storage_of, without_adapters
from medllm_jax.model.qwen2 import Backend, Qwen2


class AbstractModel(NamedTuple):
    """A model without its weights.

    structure: what `merge` puts parameters into. abstract, frozen: trees of ShapeDtypeStructs with shardings, of what
    is trained and of what is not; without an adapter everything is trained, and frozen is {}.
    """

    config: ModelConfig
    structure: nnx.GraphDef
    abstract: Any
    frozen: Any
    backend: Backend
    adapter: AdapterConfig | None

    def merge(self, params: Any, frozen: Any = None, key: jax.Array | None = None) -> Qwen2:
        """The model of some parameters, trained and frozen.

        key: of what is random in training, which is dropout where the config has it; None is for measuring.
        """
        model = nnx.merge(self.structure, params, frozen or {})
        if key is not None and self.adapter is not None and self.adapter.dropout:
            set_dropout(model, key)
        return model


def base_of(model: Qwen2) -> Qwen2:
    """The model that a trained one stands on: its adapters are off."""
    return without_adapters(model)


def number_of(tree: Any) -> int:
    """How many numbers are in the arrays, or the shapes of arrays, of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_model(
    config: ModelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    remat: str = "none",
    attention: str = "auto",
    branches: bool = True,
    adapter: AdapterConfig | None = None,
) -> AbstractModel:
    """The structure of a model on a mesh, and where its weights go. Allocates nothing.

    attention: a value of `RunConfig.attention`. branches: whole rows may hold branches, as pairs do; without, splash is
    faster.
    """
    backend = Backend(
        compute_dtype=jnp.dtype(precision.compute),
        param_dtype=jnp.dtype(precision.params),
        remat=remat,
        unroll=_UNROLLED if is_one_cpu(mesh) else 1,
        attention=attention_on(mesh, attention, precision, branches=branches),
        constrain=activation_constraint(mesh),
    )
    if adapter is not None:
        linear = adapted_linear(adapter, backend.param_dtype, backend.constrain)
        # What isn't quantised is only ever used in the compute dtype.
        rest = jnp.dtype(adapter.base) if storage_of(adapter) is None else backend.compute_dtype
        backend = dataclasses.replace(backend, linear=linear, param_dtype=rest)
    model = nnx.eval_shape(lambda: Qwen2(config, backend, rngs=nnx.Rngs(0)))
    structure, *parts = nnx.split(model, _trained(adapter), ...)
    shapes = [nnx.to_pure_dict(part) for part in parts]
    abstract, frozen = (with_shardings(part, parameter_shardings(part, mesh)) for part in shapes)
    return AbstractModel(config, structure, abstract, frozen, backend, adapter)


# Blocks that a CPU's programs hold one after the other: a loop costs it copies of all that the backward pass needs.
# More of them take longer to compile.
_UNROLLED = 4


_ATTENTION_NEEDS = {"splash": "tpu", "cudnn": "gpu"}


def attention_on(mesh: Mesh, choice: str, precision: PrecisionConfig, *, branches: bool) -> Callable:
    """The attention of whole rows that `RunConfig.attention` chooses; UserError where a mesh's devices can't run it."""
    platform = mesh.devices.flat[0].platform  # the default backend's would be wrong: programs are planned elsewhere
    if choice == "auto":
        choice = "splash" if platform == "tpu" else "xla"
    needed = _ATTENTION_NEEDS.get(choice, platform)
    if needed != platform:
        raise UserError(f"attention {choice} needs a {needed} and the devices are {platform}: choose auto or xla")
    if choice == "cudnn" and precision.compute != "bfloat16":
        raise UserError(f"attention cudnn computes in bfloat16, precision.compute is {precision.compute}: choose xla")
    if choice == "splash":
        from medllm_jax.model.splash import make_splash

        return make_splash(mesh, ACTIVATIONS["heads"], branches=branches)
    return attend_by_cudnn if choice == "cudnn" else attend_in_blocks


def _trained(adapter: AdapterConfig | None) -> type[nnx.Param]:
    """The one filter that tells what is trained from what is frozen."""
    return nnx.Param if adapter is None else nnx.LoRAParam


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def merge_params(params: Any, frozen: Any) -> Any:
    """One tree of trained and frozen parameters: `nnx.merge(structure, merge_params(params, frozen))` is the model."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(frozen))


def random_params(model: AbstractModel, seed: int) -> Any:
    """Random values of what is trained, each drawn in its own sharding; the same on every mesh."""

    def draw() -> Any:
        if model.adapter is not None:
            return new_factors(model.abstract, seed)
        return nnx.to_pure_dict(nnx.state(Qwen2(model.config, model.backend, rngs=nnx.Rngs(seed))))

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, model.abstract))()

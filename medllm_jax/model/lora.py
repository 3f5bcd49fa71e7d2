"""Low-rank adapters: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), and on a quantised base QLoRA (2305.14314).

An adapted layer is ``y = x W^T (+ b) + scale * drop(x) A^T B^T``: W and b are frozen, A [rank, in] starts
Kaiming-uniform, B [out, rank] zero, as in PEFT. Its parameters are those of the layer below, and ``lora_A`` and
``lora_B``, which have the type `nnx.LoRAParam`: what is trained and what is frozen are told apart by that alone.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medllm_jax.config.schema import AdapterConfig
from medllm_jax.model.linear import Linear, LinearLayer
from medllm_jax.model.quantize import QuantizedLinear, Storage, dequantize, quantize

Model = TypeVar("Model", bound=nnx.Module)
ROW_PARALLEL = ("o_proj", "down_proj")


class _LowRank(LinearLayer):
    """Adds an adapter to the linear layer that stands beside it among a class' bases.

    whole: puts one of its matrices whole on each device, where it is used. They are small, and left to choose, XLA's
    partitioner computed wrong products of split ones on a mesh of all three axes (jax 0.10.2).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        adapter: AdapterConfig,
        dtype,
        whole: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
        **base,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **base)
        self.lora_A = nnx.LoRAParam(_kaiming_uniform(rngs.params(), (adapter.rank, in_features), dtype))
        self.lora_B = nnx.LoRAParam(jnp.zeros((out_features, adapter.rank), dtype))
        self.adapter, self.whole = adapter, whole
        self.key: nnx.Variable | None = nnx.data(None)  # of the dropout; there is none as long as there is no key

    def __call__(self, x: jax.Array) -> jax.Array:
        y, kept = super().__call__(x), 1 - self.adapter.dropout
        if self.key is not None:
            x = jnp.where(jax.random.bernoulli(self.key[...], kept, x.shape), x / kept, 0)
        a, b = (self.whole(factor[...].astype(x.dtype)) for factor in (self.lora_A, self.lora_B))
        low = self.adapter.scale * jnp.einsum("...i,ri->...r", x, a)
        return y + jnp.einsum("...r,or->...o", low, b)


def _kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """[..., rank, in], with a = sqrt(5) as torch's layers."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def new_factors(shapes: Any, seed: int) -> Any:
    """Values of new adapters for a tree of their shapes: the same for every base that they may stand on."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for number, ((*_, name), leaf) in enumerate(leaves):
        key = jax.random.fold_in(jax.random.key(seed), number)
        is_a = name.key == "lora_A"
        values.append(_kaiming_uniform(key, leaf.shape, leaf.dtype) if is_a else jnp.zeros(leaf.shape, leaf.dtype))
    return structure.unflatten(values)


class LoRALinear(_LowRank, Linear):
    pass


class QLoRALinear(_LowRank, QuantizedLinear):
    pass


def storage_of(adapter: AdapterConfig) -> Storage | None:
    """How the projections of the base are quantised; None where they aren't."""
    if adapter.base in ("float32", "bfloat16"):
        return None
    return Storage(adapter.base, adapter.double_quantization)


def adapted_linear(
    adapter: AdapterConfig, dtype, constrain: Callable[[jax.Array, str], jax.Array]
) -> Callable[[str], Callable]:
    """The `linear` of a `Backend`: adapters, in a dtype, on the projections that have one, the others frozen alone."""
    storage = storage_of(adapter)
    low_rank = {"adapter": adapter, "dtype": dtype, "whole": lambda factor: constrain(factor, "factor")}

    def constructor_of(name: str) -> Callable:
        adapted = low_rank if name in adapter.projections else {}
        if storage is None:
            return functools.partial(LoRALinear, **adapted) if adapted else Linear
        matrix, vector = ("rows", "row_scales") if name in ROW_PARALLEL else ("columns", "columns")
        quantised = {
            "storage": storage,
            "gather": lambda array: constrain(array, matrix if array.ndim == 2 else vector),
        }
        return functools.partial(QLoRALinear if adapted else QuantizedLinear, **quantised, **adapted)

    return constructor_of


def set_dropout(model: nnx.Module, key: jax.Array) -> None:
    """From now on the model drops some of what its adapters see, drawn from a key."""
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, _LowRank)]
    for number, module in enumerate(layers):
        blocks = module.lora_A.shape[0]  # stacked, so each has its own key
        module.key = nnx.Variable(jax.random.split(jax.random.fold_in(key, number), blocks))


# --- the base ----------------------------------------------------------------------------------------------------


def freeze(weight: jax.Array, adapter: AdapterConfig) -> dict[str, jax.Array]:
    """The stored arrays of a quantised base, by name, of blocks' weights [L, out, in], one block at a time."""
    storage = storage_of(adapter)
    if storage is None:
        raise ValueError(f"a base in {adapter.base} is not quantised")
    return jax.lax.map(functools.partial(quantize, storage=storage), weight)


def as_frozen(weight: np.ndarray, adapter: AdapterConfig) -> np.ndarray:
    """A weight of the base that is no projection's, as training saw it."""
    return weight if storage_of(adapter) else weight.astype(jnp.dtype(adapter.base))


def merge(
    weight: np.ndarray,
    factors: tuple[np.ndarray, np.ndarray] | None,
    adapter: AdapterConfig,
    *,
    quantised: bool = False,
) -> np.ndarray:
    """float32 [rows, in]: rows of a projection's weight as training saw it (so first quantised), plus scale B A.

    factors: lora_A [rank, in] and the rows of lora_B [rows, rank], or None for a projection without an adapter.
    quantised: the weight is already what the codes of a quantised base stand for.
    """
    return np.asarray(_merge(weight, factors, adapter, quantised))


@functools.partial(jax.jit, static_argnames=("adapter", "quantised"))
def _merge(
    weight: jax.Array, factors: tuple[jax.Array, jax.Array] | None, adapter: AdapterConfig, quantised: bool
) -> jax.Array:
    storage = None if quantised else storage_of(adapter)
    if quantised:
        merged = weight
    elif storage is None:
        merged = weight.astype(adapter.base).astype(jnp.float32)
    else:
        merged = dequantize(quantize(weight, storage), storage, jnp.float32)
    if factors is None:
        return merged
    a, b = (factor.astype(jnp.float32) for factor in factors)
    return merged + adapter.scale * jnp.matmul(b, a, precision="highest")


def without_adapters(model: Model) -> Model:
    """The model that the adapters of another stand on: theirs are zero."""
    structure, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(structure, jax.tree.map(jnp.zeros_like, factors), rest)

"""A model on a mesh: its structure, and its weights, from a checkpoint or random, never whole on one device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from medllm_jax.checkpoint import (
    Adapted,
    Base,
    abstract_params,
    check_base,
    checkpoints_of,
    latest_step,
    load_adapted,
    load_model_config,
    load_params,
    load_storage,
    stream_params,
)
from medllm_jax.config import AdapterConfig, ModelConfig, PrecisionConfig, RunConfig
from medllm_jax.errors import UserError
from medllm_jax.fingerprint import digest, lines_of
from medllm_jax.model.attention import attend_by_cudnn, attend_in_blocks
from medllm_jax.model.lora import adapted_linear, freeze, new_factors, storage_of
from medllm_jax.model.qwen2 import Backend, Qwen2
from medllm_jax.settings import to_plain
from medllm_jax.sharding import ACTIVATIONS, activation_constraint, parameter_shardings, path_of


class Blueprint(NamedTuple):
    """A model without its weights.

    structure: `nnx.merge(structure, params, frozen)` is the model. abstract, frozen: trees of ShapeDtypeStructs with
    shardings, of what is trained and of what is not; without an adapter everything is trained, and frozen is {}.
    """

    config: ModelConfig
    structure: nnx.GraphDef
    abstract: Any
    frozen: Any
    backend: Backend
    adapter: AdapterConfig | None


def blueprint(
    config: ModelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    remat: str = "none",
    attention: str = "auto",
    branches: bool = True,
    adapter: AdapterConfig | None = None,
) -> Blueprint:
    """The structure of a model on a mesh, and where its weights go. Allocates nothing.

    attention: a value of `RunConfig.attention`. branches: whole rows may hold branches, as pairs do; without, splash is
    faster.
    """
    backend = Backend(
        compute_dtype=jnp.dtype(precision.compute),
        param_dtype=jnp.dtype(precision.params),
        remat=remat,
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
    return Blueprint(config, structure, abstract, frozen, backend, adapter)


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


def whole(params: Any, frozen: Any) -> Any:
    """One tree of what is trained and what is frozen: `nnx.merge(structure, whole(params, frozen))` is the model."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(frozen))


def random_params(plan: Blueprint, seed: int) -> Any:
    """Random values of what is trained, each drawn in its own sharding; the same on every mesh."""

    def draw() -> Any:
        if plan.adapter is not None:
            return new_factors(plan.abstract, seed)
        return nnx.to_pure_dict(nnx.state(Qwen2(plan.config, plan.backend, rngs=nnx.Rngs(seed))))

    return jax.jit(draw, out_shardings=jax.tree.map(lambda x: x.sharding, plan.abstract))()


# --- from checkpoints --------------------------------------------------------------------------------------------


class FirstWeights(NamedTuple):
    """What a run starts from: trees of what is trained and of what is frozen, and where the latter came from."""

    params: Any
    frozen: Any
    base: Base | None


def first_weights(config: RunConfig, plan: Blueprint) -> FirstWeights:
    """The weights that a config starts from: of a checkpoint, with new adapters or with those it has, or random ones.

    UserError where the checkpoint's adapters aren't the config's.
    """
    source = config.init.checkpoint
    if source is None:
        return FirstWeights(random_params(plan, config.seed), {}, None)
    found = load_adapted(source)
    if found is not None:
        _check_same_adapter(source, found.settings, config.adapter)
        return FirstWeights(load_params(source, plan.abstract), load_frozen(plan, found), found.base)
    if plan.adapter is None:
        _check_not_quantised(source)
        return FirstWeights(load_params(source, plan.abstract), {}, None)
    frozen, base = load_base(plan, source, latest_step(source))
    return FirstWeights(random_params(plan, config.seed), frozen, base)


def _check_not_quantised(run: str) -> None:
    storage = load_storage(run)
    if storage is not None:
        raise UserError(
            f"{run} holds a model whose projections are quantised to {storage.format}, which only adapters can be "
            "trained on: set adapter, or convert the model again without --quantize"
        )


def _check_same_adapter(source: str, found: AdapterConfig, wanted: AdapterConfig | None) -> None:
    whole_model = "or make a whole model of it first (python -m tools.convert_hf to-hf, then from-hf)"
    if wanted is None:
        raise UserError(f"{source} holds adapters and adapter is not set: set it as there, {whole_model}")
    before, now = to_plain(found), to_plain(wanted)
    for name in before.keys() - {"dropout"}:
        if before[name] != now[name]:
            raise UserError(
                f"adapter.{name} is {now[name]} in the config and {before[name]} in {source}: "
                f"adapters go on as they began; set it back, {whole_model}"
            )


def load_frozen(plan: Blueprint, adapted: Adapted | None) -> Any:
    """The frozen parameters of a blueprint, {} for a whole model; UserError where the base isn't what it was."""
    if adapted is None:
        return {}
    frozen, found = load_base(plan, adapted.base.checkpoint, adapted.base.step)
    check_base(adapted.base, found.fingerprint)
    return frozen


def load_base(plan: Blueprint, run: str, step: int) -> tuple[Any, Base]:
    """The frozen parameters of a blueprint from a checkpoint of a whole model, and what tells that model apart.

    One parameter at a time, each shard by shard: a base that is quantised is never whole before it is. It may also be
    stored so.
    """
    wanted = flatten_dict(plan.frozen, sep="/")
    storage = load_storage(run, step)
    if storage not in (None, storage_of(plan.adapter)):
        double = f" and adapter.double_quantization to {str(storage.double).lower()}"
        raise UserError(
            f"{run} is stored in {storage.format}, adapter.base is {plan.adapter.base}: "
            f"set it to {storage.format}{double}, or convert the model again"
        )

    def sharding_of(key_path: tuple, _: Any) -> jax.sharding.Sharding:
        path = path_of(key_path)
        return wanted.get(path, wanted.get(f"{path.rpartition('/')[0]}/codes")).sharding

    stored = abstract_params(run, step)
    stored = with_shardings(stored, jax.tree_util.tree_map_with_path(sharding_of, stored))
    frozen, lines = {}, []
    for path, weight in stream_params(run, step, stored):
        lines += lines_of({path: weight})
        folder = path.rpartition("/")[0]
        if path in wanted:
            frozen[path] = weight.astype(wanted[path].dtype)
        else:
            names = jax.eval_shape(functools.partial(freeze, adapter=plan.adapter), weight)
            shardings = tuple((name, wanted[f"{folder}/{name}"].sharding) for name in names)
            arrays = _freezing(plan.adapter, shardings)(weight)
            frozen |= {f"{folder}/{name}": array for name, array in arrays.items()}
        del weight  # before the next is read
    return unflatten_dict(frozen, sep="/"), Base(str(checkpoints_of(run).parent), step, digest(lines))


@functools.cache
def _freezing(
    adapter: AdapterConfig, shardings: tuple[tuple[str, jax.sharding.Sharding], ...]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    return jax.jit(functools.partial(freeze, adapter=adapter), out_shardings=dict(shardings))


class LoadedModel(NamedTuple):
    """A model with weights, for scoring and generation."""

    config: ModelConfig
    structure: nnx.GraphDef
    params: Any
    mesh: Mesh


def load_model(run: str, precision: PrecisionConfig, mesh: Mesh) -> LoadedModel:
    """The newest model of a run folder, on a mesh; adapters with the base that they belong to."""
    adapted = load_adapted(run)
    if adapted is None:
        _check_not_quantised(run)
    plan = blueprint(load_model_config(run), precision, mesh, adapter=adapted and adapted.settings)
    params = whole(load_params(run, plan.abstract), load_frozen(plan, adapted))
    return LoadedModel(plan.config, plan.structure, params, mesh)

"""A model on a mesh: its structure, and its weights, from a checkpoint or random, never whole on one device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from medllm_jax.checkpoint.fingerprint import digest, lines_of
from medllm_jax.checkpoint.orbax import (
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
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import AdapterConfig, ModelConfig, PrecisionConfig, RunConfig
from medllm_jax.distributed.sharding import path_of
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import AbstractModel, abstract_model, merge_params, random_params, with_shardings
from medllm_jax.model.lora import freeze, storage_of

# --- from checkpoints --------------------------------------------------------------------------------------------


class InitialWeights(NamedTuple):
    """What a run starts from: trees of what is trained and of what is frozen, and where the latter came from."""

    params: Any
    frozen: Any
    base: Base | None


def initial_weights(config: RunConfig, plan: AbstractModel) -> InitialWeights:
    """The weights that a config starts from: of a checkpoint, with new adapters or with those it has, or random ones.

    UserError where the checkpoint's adapters aren't the config's.
    """
    source = config.init.checkpoint
    if source is None:
        return InitialWeights(random_params(plan, config.seed), {}, None)
    found = load_adapted(source)
    if found is not None:
        _check_same_adapter(source, found.settings, config.adapter)
        return InitialWeights(load_params(source, plan.abstract), load_frozen(plan, found), found.base)
    if plan.adapter is None:
        _check_not_quantised(source)
        return InitialWeights(load_params(source, plan.abstract), {}, None)
    frozen, base = load_base(plan, source, latest_step(source))
    return InitialWeights(random_params(plan, config.seed), frozen, base)


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


def load_frozen(plan: AbstractModel, adapted: Adapted | None) -> Any:
    """The frozen parameters of a blueprint, {} for a whole model; UserError where the base isn't what it was."""
    if adapted is None:
        return {}
    frozen, found = load_base(plan, adapted.base.checkpoint, adapted.base.step)
    check_base(adapted.base, found.fingerprint)
    return frozen


def load_base(plan: AbstractModel, run: str, step: int) -> tuple[Any, Base]:
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
    plan = abstract_model(load_model_config(run), precision, mesh, adapter=adapted and adapted.settings)
    params = merge_params(load_params(run, plan.abstract), load_frozen(plan, adapted))
    return LoadedModel(plan.config, plan.structure, params, mesh)

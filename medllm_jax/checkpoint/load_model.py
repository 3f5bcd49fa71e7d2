"""A model on a mesh with its weights, from a checkpoint or random, never whole on one device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from medllm_jax.checkpoint.fingerprint import digest, lines_of
from medllm_jax.checkpoint.handle import Base, Checkpoint
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import AdapterConfig, ModelConfig, PrecisionConfig
from medllm_jax.distributed.sharding import path_of
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import AbstractModel, abstract_model, merge_params, random_params, with_shardings
from medllm_jax.model.lora import freeze, storage_of


class LoadedModel(NamedTuple):
    """A model with weights, for scoring and generation."""

    config: ModelConfig
    structure: nnx.GraphDef
    params: Any
    mesh: Mesh


def load_model(checkpoint: Checkpoint, precision: PrecisionConfig, mesh: Mesh) -> LoadedModel:
    """The model of a checkpoint, on a mesh; adapters with the base that they belong to."""
    if checkpoint.adapter is None:
        _check_not_quantised(checkpoint)
    plan = abstract_model(checkpoint.model, precision, mesh, adapter=checkpoint.adapter)
    frozen = load_frozen(plan, checkpoint)  # first: where the base is gone, nothing is read in vain
    params = merge_params(checkpoint.load_params(plan.abstract), frozen)
    return LoadedModel(plan.config, plan.structure, params, mesh)


# --- what a run starts from ----------------------------------------------------------------------------------------


class InitialWeights(NamedTuple):
    """What a run starts from: trees of what is trained and of what is frozen, and where the latter came from."""

    params: Any
    frozen: Any
    base: Base | None


def initial_weights(plan: AbstractModel, source: Checkpoint | None, seed: int) -> InitialWeights:
    """The weights that a run starts from.

    source: the checkpoint to start from, with the adapters it holds or with new ones; None for random weights.
    UserError where the adapters of the checkpoint aren't those of `plan`.
    """
    if source is None:
        return InitialWeights(random_params(plan, seed), {}, None)
    if source.adapter is not None:
        _check_same_adapter(source.run, source.adapter, plan.adapter)
        return InitialWeights(source.load_params(plan.abstract), load_frozen(plan, source), source.base)
    if plan.adapter is None:
        _check_not_quantised(source)
        return InitialWeights(source.load_params(plan.abstract), {}, None)
    frozen, base = load_base(plan, source)
    return InitialWeights(random_params(plan, seed), frozen, base)


def _check_not_quantised(checkpoint: Checkpoint) -> None:
    if checkpoint.storage is not None:
        raise UserError(
            f"{checkpoint.run} holds a model whose projections are quantised to {checkpoint.storage.format}, which "
            "only adapters can be trained on: set adapter, or convert the model again without --quantize"
        )


def _check_same_adapter(run: str, found: AdapterConfig, wanted: AdapterConfig | None) -> None:
    whole_model = "or make a whole model of it first (medllm convert to-hf, then from-hf)"
    if wanted is None:
        raise UserError(f"{run} holds adapters and adapter is not set: set it as there, {whole_model}")
    before, now = to_plain(found), to_plain(wanted)
    for name in before.keys() - {"dropout"}:
        if before[name] != now[name]:
            raise UserError(
                f"adapter.{name} is {now[name]} in the config and {before[name]} in {run}: "
                f"adapters go on as they began; set it back, {whole_model}"
            )


# --- the frozen base of adapters -----------------------------------------------------------------------------------


def load_frozen(plan: AbstractModel, checkpoint: Checkpoint) -> Any:
    """The frozen parameters that belong to a checkpoint, {} for a whole model; UserError where the base changed."""
    return {} if checkpoint.adapter is None else load_base(plan, checkpoint)[0]


def load_base(plan: AbstractModel, checkpoint: Checkpoint) -> tuple[Any, Base]:
    """The frozen parameters of `plan`, from the whole model of a checkpoint, and what identifies that model.

    Reads one parameter at a time, each shard by shard: a base that is quantised is never whole before it is. It may
    also be stored quantised. UserError where it is stored in another format, or isn't the base that the checkpoint's
    adapters were trained on.
    """
    if plan.adapter is None:
        raise ValueError("a model without adapters has no frozen parameters")
    adapter, stored = plan.adapter, checkpoint.whole
    wanted: dict[str, jax.ShapeDtypeStruct] = _by_path(plan.frozen)
    if stored.storage is not None and stored.storage != storage_of(adapter):
        double = f" and adapter.double_quantization to {str(stored.storage.double).lower()}"
        raise UserError(
            f"{stored.run} is stored in {stored.storage.format}, adapter.base is {adapter.base}: "
            f"set it to {stored.storage.format}{double}, or convert the model again"
        )

    def sharding_of(key_path: tuple, _: Any) -> Any:
        path = path_of(key_path)
        return wanted[path if path in wanted else f"{path.rpartition('/')[0]}/codes"].sharding

    shapes = stored.stored_params()
    abstract = with_shardings(shapes, jax.tree_util.tree_map_with_path(sharding_of, shapes))
    frozen, lines = {}, []
    for path, weight in stored.stream_params(abstract):
        lines += lines_of({path: weight})
        folder = path.rpartition("/")[0]
        if path in wanted:
            frozen[path] = weight.astype(wanted[path].dtype)
        else:
            names = jax.eval_shape(functools.partial(freeze, adapter=adapter), weight)
            shardings = tuple((name, wanted[f"{folder}/{name}"].sharding) for name in names)
            frozen |= {f"{folder}/{name}": array for name, array in _freezing(adapter, shardings)(weight).items()}
        del weight  # before the next is read
    base = Base(stored.run_folder, stored.step, digest(lines))
    checkpoint.check_base(base.fingerprint)
    return unflatten_dict(frozen, sep="/"), base


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))


@functools.cache
def _freezing(
    adapter: AdapterConfig, shardings: tuple[tuple[str, Any], ...]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    return jax.jit(functools.partial(freeze, adapter=adapter), out_shardings=dict(shardings))

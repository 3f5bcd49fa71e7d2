"""A checkpoint, opened once: what it says of itself is read, its step is fixed, and everything that loads takes it.

    checkpoint = open_checkpoint(run)          # the newest step now
    model = load_model(checkpoint, precision, mesh)
    print(checkpoint.label)                    # run@step, of what was loaded

Whatever appears in the run folder afterwards, label, adapter settings and weights are of one step.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from medllm_jax.checkpoint import arrays, orbax
from medllm_jax.checkpoint.arrays import UnreadableError
from medllm_jax.checkpoint.digests import changed_arrays, changed_lines, meta_is_intact, missing_lines
from medllm_jax.checkpoint.orbax import checkpoints_of, steps, training_item, whole_and_other_steps
from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.config.load import build
from medllm_jax.config.schema import AdapterConfig, ModelConfig
from medllm_jax.distributed.processes import run_on_all
from medllm_jax.distributed.sharding import path_of, reading_spec
from medllm_jax.errors import RunError, UserError
from medllm_jax.model.quantize import Storage
from medllm_jax.storage.faults import as_told, passes

_log = logging.getLogger(__name__)


class DamagedError(RunError):
    """A checkpoint that can't be read, or does not hold what was written."""


class RemovedError(RunError):
    """A checkpoint that was removed while it was open."""


class Base(NamedTuple):
    """The model that adapters belong to: run folder and step of its checkpoint, fingerprint of its stored weights."""

    checkpoint: str
    step: int
    fingerprint: str


class Checkpoint:
    """One step of a run folder; `open_checkpoint` makes it.

    run: the run folder as it was named. step: which checkpoint. meta: the plain values saved with it.
    Every method that reads raises DamagedError where what is stored is not what was written, and RemovedError where
    the step was removed meanwhile. Nothing here changes the folder.
    """

    def __init__(self, run: str | os.PathLike, step: int):
        """Reads the meta of a step that is known to be there."""
        self.run, self.step = os.fspath(run), step
        self._folder = checkpoints_of(run) / str(step)
        meta = self._items({"meta": None})["meta"]
        if not isinstance(meta, dict) or not isinstance(meta.get("model"), dict) or not meta_is_intact(meta):
            raise self.failure("has another meta than was written")
        self.meta: dict[str, Any] = meta

    # --- what it says of itself ---

    @property
    def label(self) -> str:
        """`run@step`: by which results are filed."""
        return f"{self.run}@{self.step}"

    @property
    def run_folder(self) -> str:
        """The run folder's absolute path, or its URL."""
        return str(self._folder.parent.parent)

    @functools.cached_property
    def model(self) -> ModelConfig:
        """Shape of the model."""
        return build(ModelConfig, self.meta["model"], where=f"checkpoint of {self.run}")

    @functools.cached_property
    def adapter(self) -> AdapterConfig | None:
        """Settings of the adapters it holds; None where it holds a whole model."""
        if self.meta.get("base") is None:
            return None
        config = self.meta.get("config")
        if not isinstance(config, dict) or "adapter" not in config:
            raise self.failure("has a meta that lacks the settings of its adapters")
        return build(AdapterConfig, config["adapter"], where=f"checkpoint of {self.run}")

    @functools.cached_property
    def whole(self) -> "Checkpoint":
        """The checkpoint of the whole model: the base of adapters, or this one. UserError where the base is gone."""
        base = self.base
        if base is None:
            return self
        if base.step not in steps(base.checkpoint):
            raise UserError(
                f"{self.run} holds adapters of the model in {base.checkpoint}, step {base.step}, and it is not there: "
                "put it back, or leave a link there"
            )
        return Checkpoint(base.checkpoint, base.step)

    @property
    def base(self) -> Base | None:
        """What the meta of adapters says of their base; None for a whole model."""
        base = self.meta.get("base")
        if base is None:
            return None
        try:
            return Base(**base)
        except TypeError:
            raise self.failure("has a meta that does not say what its adapters stand on") from None

    def check_base(self, fingerprint: str) -> None:
        """UserError unless this is the fingerprint of the base that the adapters were trained on."""
        base = self.base
        if base is not None and fingerprint != base.fingerprint:
            raise UserError(
                f"{base.checkpoint} is not the model that the adapters were trained on: its step {base.step} has other "
                f"weights (fingerprint {fingerprint[:12]}, then {base.fingerprint[:12]}); put the former back"
            )

    @functools.cached_property
    def storage(self) -> Storage | None:
        """How the projections of a whole model are quantised; None where they aren't."""
        storage = self.meta.get("storage")
        return None if storage is None else build(Storage, storage, where=f"checkpoint of {self.run}")

    @property
    def identity(self) -> str:
        """A hash that tells this save of the step from another."""
        try:
            return orbax.identity_of(self._folder)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise self.unreadable(error) from error

    # --- its arrays ---

    def stored_params(self) -> Any:
        """A tree of ShapeDtypeStructs: the weights as stored."""
        try:
            stored = orbax.stored_shapes(self._weights.parent)
        except UnreadableError as error:
            raise self.failure(f"can't be read ({error})") from error
        self._check_paths(path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(stored))
        return stored

    def load_params(self, abstract: Any) -> Any:
        """The weights, in the dtypes and shardings of a tree of ShapeDtypeStructs."""
        leaves, structure = jax.tree.flatten(abstract)
        items = self._items({"params": self._as_read(abstract)})
        self._check(items)
        values = jax.tree.leaves(items.pop("params"))
        for place, leaf in enumerate(leaves):  # one at a time, and what was read of it goes
            values[place] = _laid_out(values[place], leaf)
        return jax.tree.unflatten(structure, values)

    def stream_params(self, abstract: Any) -> Iterator[tuple[str, jax.Array]]:
        """Path and value of each weight, one at a time, in the dtypes and shardings of a tree of ShapeDtypeStructs.

        The caller lets go of a value before it asks for the next, if two at a time would be too much.
        """
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        read, structure = jax.tree.flatten(self._as_read(abstract))
        for place, (key_path, leaf) in enumerate(leaves):
            one = [read[i] if i == place else orbax.PLACEHOLDER for i in range(len(leaves))]
            items = self._items({"params": jax.tree.unflatten(structure, one)})
            path, value = path_of(key_path), jax.tree.leaves(items["params"])[place]
            self._check({"params": {path: value}})
            del items
            value = _laid_out(value, leaf)
            yield path, value

    def host_params(self) -> dict[str, np.ndarray]:
        """Path -> weight as stored, in host memory; holds all of them."""
        stored = jax.tree.map(lambda _: np.ndarray, self.stored_params())
        return {path: np.asarray(value) for path, value in self.stream_params(stored)}

    def open_arrays(self) -> dict[str, ts.TensorStore]:
        """Path -> array of each weight as stored, to be read in ranges of rows; not checked."""
        try:
            opened = arrays.open_arrays(self._weights)
        except FileNotFoundError as error:
            raise self.unreadable(error) from error
        except UnreadableError as error:
            raise self.failure(f"can't be read ({error})") from error
        self._check_paths(opened)
        return opened

    def _as_read(self, abstract: Any) -> Any:
        """A tree of ShapeDtypeStructs, or of other types to read, with the shardings to read it in.

        A chunk of whole rows is read by one device, and not by each that a part of these rows belongs to.
        """

        def leaf_as_read(key_path: tuple, leaf: Any) -> Any:
            path, wanted = path_of(key_path), getattr(leaf, "sharding", None)
            if not isinstance(wanted, NamedSharding) or wanted.shard_shape(leaf.shape)[-1:] == leaf.shape[-1:]:
                return leaf
            if path not in self._opened or not arrays.has_whole_rows(self._opened[path]):
                return leaf
            spec = reading_spec(path, leaf.shape, wanted.mesh.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(wanted.mesh, spec))

        return jax.tree_util.tree_map_with_path(leaf_as_read, abstract)

    @functools.cached_property
    def _opened(self) -> dict[str, ts.TensorStore]:
        return self.open_arrays()

    @functools.cached_property
    def _weights(self) -> epath.Path:
        """The folder of the weights, whose descriptions can be read."""
        return self._described("params")

    def _described(self, item: str) -> epath.Path:
        """The folder of an item whose descriptions can be read."""
        folder = self._folder / item
        try:
            arrays.check_descriptions(folder)
        except FileNotFoundError as error:
            raise self.unreadable(error) from error
        except UnreadableError as error:
            raise self.failure(f"can't be read ({error})") from error
        return folder

    def load_state(self, abstract: TrainState) -> TrainState:
        """The train state, each array straight into the sharding of its ShapeDtypeStruct; not checked yet."""
        self._described("training")
        items = self._items({"params": abstract.params, "training": training_item(abstract)})
        return TrainState(params=items["params"], **items["training"])

    def check_state(self, state: TrainState) -> None:
        """DamagedError unless a state that was read is the one that was written. Every process must ask, or none."""
        self._check({"params": state.params, "training": training_item(state)})

    @property
    def has_digests(self) -> bool:
        """Whether the meta says what the arrays are; that of a converted model does not."""
        return "digests" in self.meta

    def check_lines(self, found: Mapping[str, str]) -> None:
        """DamagedError unless arrays, read as `open_arrays` and summed up in lines, are those that were written."""
        self._raise_if_changed(changed_lines(found, self.meta))

    # --- failures ---

    def unreadable(self, error: BaseException, path: str | None = None) -> Exception:
        """The error to raise where reading, of the weight at a path, failed with another."""
        told = as_told(error)
        if told is not None and passes(error):
            return told
        where = "" if path is None else f" in {path}"
        return self.failure(f"can't be read{where} ({orbax.first_cause(error)})")

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Raises, of what fails in the block, which reads the weight at a path, the error to raise."""
        try:
            yield
        except (ValueError, FileNotFoundError, UnreadableError) as error:
            raise self.unreadable(error, path) from None

    def failure(self, what: str) -> RunError:
        """The error to raise where it does not hold what was written, in the words of `what`."""
        if not orbax.is_whole(self._folder):
            return RemovedError(
                f"checkpoint {self.step} of {self.run} was removed while it was being read: newer ones have replaced "
                "it; run the same command again, and keep more of them if this happens often (checkpoint.keep)"
            )
        return DamagedError(
            f"checkpoint {self.step} of {self.run} {what}: it is damaged; use another, or copy it again"
        )

    def _items(self, wanted: dict[str, Any]) -> dict[str, Any]:
        folder = self._weights.parent if "params" in wanted else self._folder
        try:
            return orbax.read_items(folder, wanted)
        except UnreadableError as error:
            raise self.failure(f"can't be read ({error})") from error

    def _check_paths(self, found: Iterable[str]) -> None:
        missing = missing_lines((f"params/{path}" for path in found), self.meta, "params/")
        if missing:
            raise self.failure(f"lacks {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}")

    def _check(self, items: dict[str, Any]) -> None:
        self._raise_if_changed(changed_arrays(items, self.meta))

    def _raise_if_changed(self, wrong: list[str]) -> None:
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise self.failure(f"holds other bytes in {wrong[0]}{more} than were written")


def _laid_out(value: Any, wanted: Any) -> Any:
    """An array in the sharding of a ShapeDtypeStruct."""
    sharding = getattr(wanted, "sharding", None)
    if sharding is None or value.sharding.is_equivalent_to(sharding, value.ndim):
        return value
    return _moving_to(sharding)(value)


@functools.cache
def _moving_to(sharding: Any) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda value: value, out_shardings=sharding)


def check_listing(run: str | os.PathLike, step: int) -> None:
    """DamagedError where a writer could not list a step of a run folder among the others, and would end."""
    try:
        orbax.check_listing(checkpoints_of(run) / str(step))
    except UnreadableError as error:
        raise DamagedError(f"checkpoint {step} of {run} can't be listed ({error}): it is damaged") from error


def open_checkpoint(run: str | os.PathLike, step: int | None = None) -> Checkpoint:
    """A checkpoint of a run folder, the newest by default. Lists the folder once and reads the meta once.

    Where newer ones are not whole, it says which. UserError where the folder has no such checkpoint; DamagedError where
    it has none that is whole, or one whose meta is not what was written.
    """
    found, other = whole_and_other_steps(run)
    if not found and other:
        raise DamagedError(f"{run} holds no whole checkpoint: {_not_whole(other)}")
    if not found:
        raise UserError(f"{run} holds no checkpoint: {_what_else(run)}")
    if step is not None and step not in found:
        wrong = f"; {_not_whole([step])}" if step in other else ""
        raise UserError(f"{run} has no checkpoint of step {step}: it has {', '.join(map(str, found))}{wrong}")
    newer = [each for each in other if each > found[-1]]
    if step is None and newer:
        _log.warning(f"warning: {run}: {_not_whole(newer)}; step {found[-1]}, the newest that is whole, is taken")
    return Checkpoint(run, found[-1] if step is None else step)


def _what_else(run: str | os.PathLike) -> str:
    """What stands where a run folder is expected, and what is to be done about it."""
    folder = epath.Path(run)
    if (folder / "config.json").exists():
        return f"it is in Hugging Face's format; `medllm convert from-hf {os.fspath(run)} RUN` makes a run folder of it"
    if (folder / "adapter_config.json").exists():
        how = f"`medllm convert from-hf {os.fspath(run)} RUN --base MODEL`"
        return f"it is an adapter in PEFT's format; {how} makes a run folder of it"
    missing = "" if folder.exists() else "nothing is there; "
    return f"{missing}a run folder, or what `medllm convert from-hf` wrote, is expected"


def _not_whole(some: list[int]) -> str:
    lacks = "lacks" if len(some) == 1 else "lack"
    listed = ", ".join(map(str, some))
    return f"step {listed} {lacks} {orbax.COMMITTED}, so it is still being written, or was cut off or damaged"


def open_on_all(run: str | os.PathLike) -> Checkpoint:
    """`open_checkpoint` of the newest step, for processes that train as one: all open the step that the first sees."""
    checkpoint = run_on_all(f"opening the newest checkpoint of {run}", lambda: open_checkpoint(run), UserError)
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.asarray(checkpoint.step)))
        if step != checkpoint.step:
            checkpoint = Checkpoint(run, step)
    return checkpoint

"""A config whose model is known: what programs, sizes and checks are made from."""

import dataclasses
import math

from medllm_jax.checkpoint.handle import Checkpoint, open_on_all
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import ModelConfig, RunConfig
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from medllm_jax.ranges import Steps
from medllm_jax.storage import run_folder

_SPREAD = 0.02  # standard deviation of Qwen2.5's weights, about, and the size of what adapters begin with


@dataclasses.dataclass(frozen=True)
class ResolvedConfig(RunConfig):
    """A RunConfig that names its model's shape and its number of steps."""

    model: ModelConfig = dataclasses.field(kw_only=True)
    steps: Steps = dataclasses.field(kw_only=True)

    @property
    def micro_batch(self) -> int:
        """Rows that are computed at a time, over all hosts."""
        return self.data.batch_size // self.data.accumulate


def open_source(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that a new run starts from; None for random weights, and for a run that was started before."""
    if config.init.checkpoint is None or run_folder.begun_config(config.run) is not None:
        return None
    return open_on_all(config.init.checkpoint)


def resolve(config: RunConfig, source: Checkpoint | None = None, *, elsewhere: bool = False) -> ResolvedConfig:
    """The config with the model's shape filled in from where the run starts, and checked against it; and with the steps
    that its epochs come to.

    source: the checkpoint of `config.init`, where the caller has opened it; it is opened here otherwise, if needed.
    elsewhere: the run is not made here, so that a shape that the config gives is taken without a look at run folder or
    checkpoint, which need not be there; nor need stores, whose epochs then are one step: programs are the same for any
    number. UserError where config and checkpoint differ in shape, and for a new run whose steps would be rounded away.
    """
    steps = config.steps or 1 if elsewhere else count_steps(config)
    if elsewhere and config.model is not None:
        _check_rounding(config)
        return _resolved(config, config.model, steps)
    recorded = run_folder.begun_config(config.run)
    if recorded is not None:  # a run that goes on no longer needs the checkpoint that it started from
        found = config.model or recorded.model
    elif config.init.checkpoint is None:
        _check_rounding(config)
        found = config.model
    else:
        _check_rounding(config)
        found = (source or open_on_all(config.init.checkpoint)).model
        _check_same_shape(config, found)
    if found is None:  # a config is refused that has neither, and a run records what it found
        raise UserError(f"run {config.run} names no model: set model, or init.checkpoint")
    return _resolved(config, found, steps)


def count_steps(config: RunConfig) -> int:
    """The steps of a run: those that it names, or as many as its epochs have, if these are fewer. Reads store.json."""
    if config.data.epochs is None:
        return config.steps or 1  # a config without either is refused
    rows, _ = rows_in_stores(config)
    read = math.ceil(rows * config.data.epochs / config.data.batch_size)
    return max(1, min(read, config.steps or read))


def rows_in_stores(config: RunConfig) -> tuple[int, int]:
    """Rows of a run's stores, all of them, and tokens of a row. Reads each store.json."""
    stores = [RowStore.open(store) for store in config.data.stores]
    return sum(map(len, stores)), stores[0].metadata.sequence_length


def _check_rounding(config: RunConfig) -> None:
    """UserError where weights, or adapters, would be stored so coarsely that most do not move.

    AdamW changes a weight by about the learning rate. A bfloat16 has 8 significant bits, so that less than 1/512 of a
    weight is always lost in rounding; 1/256 never is.
    """
    rate = config.optimizer.learning_rate
    if config.precision.params == "bfloat16" and 256 * rate < _SPREAD:
        moved = math.erf(384 * rate / _SPREAD / 2**0.5)
        raise UserError(
            f"precision.params is bfloat16 and optimizer.learning_rate is {rate:g}: steps that small are lost in "
            f"rounding, and about {100 * moved:.2g} % of weights would move at all; set precision.params to float32, "
            f"or a learning rate of at least {_SPREAD / 256:.0e}"
        )


def _check_same_shape(config: RunConfig, found: ModelConfig) -> None:
    if config.model is None or config.model == found:
        return
    before, now = to_plain(found), to_plain(config.model)
    name = next(name for name in before if before[name] != now[name])
    raise UserError(
        f"model.{name} is {now[name]} in the config and {before[name]} in {config.init.checkpoint}: "
        "leave model out, and it is taken from the checkpoint"
    )


def _resolved(config: RunConfig, model: ModelConfig, steps: int) -> ResolvedConfig:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    return ResolvedConfig(**settings | {"model": model, "steps": steps})

"""What a run says before its first step: what is trained on what, for how long, and what memory that takes.

Process 0 says it, in a few lines; nothing here changes what is computed.
"""

import functools
import logging
import time
from typing import Any

import jax
from jax.sharding import Mesh

from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.data.batch import Batch
from medllm_jax.data.rows import Rows
from medllm_jax.distributed.sharding import is_one_cpu
from medllm_jax.model.abstract import number_of
from medllm_jax.terminal.progress import duration, size_in_words
from medllm_jax.training.head import BLOCK
from medllm_jax.training.programs import TrainProgram
from medllm_jax.training.resolve import ResolvedConfig

_log = logging.getLogger(__name__)
_LARGE_LOGITS = 0.25  # share of the memory of a step from which it is worth to compute them in parts
_CHUNKS = (4, 8, 16, 32)


def announce(config: ResolvedConfig, rows: Rows, program: TrainProgram, start: int) -> None:
    """Says what the run is. start: step that it goes on from."""
    if jax.process_index() != 0:
        return
    _log.info(f"model: {_model(config, program)}")
    _log.info(f"data: {_data(config, rows)}")
    if start >= config.steps:
        _log.info(f"all {config.steps:,} steps are done: there is nothing to train")
    elif start:
        _log.info(f"resuming from step {start:,} of {config.steps:,}, the newest checkpoint of {config.run}")
    else:
        _log.info(f"starting at step 0 of {config.steps:,}, in {config.run}")


class AnnouncedStep:
    """The step of a run, ``(state, batch, frozen) -> (state, metrics)``; compiled when it is first called, with a word
    on how long that takes, and on the memory that a step needs.
    """

    def __init__(self, config: ResolvedConfig, rows: Rows, program: TrainProgram, mesh: Mesh):
        self._program = program
        self._compiled: jax.stages.Compiled | None = None
        self._memory = functools.partial(_memory, config, rows, mesh)

    def __call__(self, state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        if self._compiled is None:
            self._compiled = self._compile(state, batch, frozen)
        return self._compiled(state, batch, frozen)

    def _compile(self, *arguments: Any) -> jax.stages.Compiled:
        show = _log.info if jax.process_index() == 0 else _log.debug
        show("compiling the step")
        began = time.monotonic()
        compiled = self._program.step.lower(*arguments).compile()
        show(f"compiled in {duration(time.monotonic() - began)}; {self._memory(compiled)}")
        return compiled


def _model(config: ResolvedConfig, program: TrainProgram) -> str:
    trained, frozen = number_of(program.abstract.params), number_of(program.model.frozen)
    which = f"of which {_count(trained)} are" if frozen else "all"
    text = f"{_count(trained + frozen)} parameters, {which} trained by {config.objective.name}"
    return f"{text}; weights in {config.precision.params}, products in {config.precision.compute}"


def _data(config: ResolvedConfig, rows: Rows) -> str:
    tokens = sum(store.metadata.tokens for store in rows.stores)
    batch, number = config.data.batch_size, len(rows)
    text = f"{rows}: {number:,} rows of {rows.sequence_length:,}, {tokens:,} tokens; "
    text += f"a step reads {batch:,} rows, about {round(batch * tokens / number):,} tokens; "
    if config.data.mix is None:
        return f"{text}an epoch is {number / batch:,.1f} steps, and the run {_epochs(config.steps * batch / number)}"
    whole = sum(config.data.mix.values())
    of_corpus = {corpus.name: corpus.rows for corpus in rows.corpora}
    shares = ((name, config.steps * batch * weight / whole) for name, weight in config.data.mix.items())
    each = ", ".join(f"{_epochs(read / of_corpus[name])} of {name}" for name, read in shares)
    return f"{text}the run is {each}"


def _memory(config: ResolvedConfig, rows: Rows, mesh: Mesh, compiled: jax.stages.Compiled) -> str:
    """What a step takes of a device, by the compiler; on a CPU all devices share the machine's memory."""
    found = compiled.memory_analysis()
    if found is None:
        return "the compiler does not say what memory it takes"
    held = found.argument_size_in_bytes
    working = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    text = f"a step takes {size_in_words(held + working)} of a device's memory"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    text += f" of {size_in_words(limit)}" if limit else ""
    text += f": {size_in_words(held)} for weights, optimizer and batch, {size_in_words(working)} to work with"
    logits = _logits(config, rows, mesh)
    if logits > _LARGE_LOGITS * (held + working):
        text += f", of which logits take about {size_in_words(logits)}"
        chunks = next(
            (n for n in _CHUNKS if n > config.objective.vocab_chunks and not config.model.vocab_size % n), None
        )
        if chunks is not None:
            text += f" (--objective.vocab_chunks {chunks} makes them smaller)"
    return text


def _logits(config: ResolvedConfig, rows: Rows, mesh: Mesh) -> float:
    """Bytes of the float32 logits that are there at once, and of as many gradients, on one device."""
    tokens = config.micro_batch * rows.sequence_length / mesh.size
    if is_one_cpu(mesh):
        tokens = rows.sequence_length if config.objective.name == "rpo" else BLOCK
    return 2 * 4 * tokens * config.model.vocab_size / config.objective.vocab_chunks


def _count(number: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"


def _epochs(number: float) -> str:
    return f"{number:.2f} epochs" if number < 10 else f"{number:,.0f} epochs"

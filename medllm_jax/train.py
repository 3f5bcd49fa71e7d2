"""The story of a run, CPT and RPO alike, from top to bottom."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from medllm_jax import runs
from medllm_jax.checkpoint import (
    Base,
    CheckpointWriter,
    load_adapted,
    load_meta,
    load_model_config,
    load_state,
    newest_step,
)
from medllm_jax.config import RunConfig
from medllm_jax.data.ahead import Ahead
from medllm_jax.data.pipeline import BatchStream, check_mix
from medllm_jax.data.references import no_references, read_references
from medllm_jax.data.sources import Rows, Seen
from medllm_jax.data.store import check_compatible
from medllm_jax.data.tokenizer import fingerprint as tokenizer_fingerprint
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.fingerprint import model_fingerprint
from medllm_jax.held_out import HeldOut
from medllm_jax.likelihood import Likelihood
from medllm_jax.loading import first_weights, load_frozen, whole
from medllm_jax.metrics import Console, Meter, MetricsLog
from medllm_jax.optimizer import make_schedule
from medllm_jax.programs import TrainProgram, train_program
from medllm_jax.settings import to_plain
from medllm_jax.sharding import make_mesh, put_batch

STORE_KINDS = {"cpt": ("cpt",), "sft": ("sft",), "rpo": ("pairs", "sft")}


def train(config: RunConfig) -> epath.Path:
    """Trains until `config.steps`, from the newest checkpoint of the run folder if it has one. Returns the folder."""
    config = with_model(config)
    folder = runs.open_run(config)
    rows = open_rows(config, config.data.stores)
    if config.data.mix is not None:
        check_mix(rows, config.data.mix)
    mesh = make_mesh(config.mesh)
    program = train_program(config, mesh)

    start = newest_step(folder) or 0
    if start:
        meta = load_meta(folder, start)
        check_same_data(folder, meta, rows)
        frozen = load_frozen(program.plan, load_adapted(folder, start))
        state = load_state(folder, start, program.abstract)
    else:
        check_reference(config)
        params, frozen, base = first_weights(config, program.plan)
        meta = first_meta(config, rows, base, params, frozen)
        state = program.initialise(params)
    reference = references_of(config, rows, meta["reference_model"])
    held_out = open_held_out(config, program, mesh, meta["reference_model"]) if config.held_out else None
    seen = Seen(rows, meta["seen"])
    multihost_utils.sync_global_devices("every process has looked at the run folder")
    if jax.process_index() == 0:
        runs.record_config(folder, config)
        runs.carry_tokenizer(config.init.checkpoint, folder)

    put = functools.partial(put_batch, mesh=mesh)
    with (
        open_stream(config, rows, meta["position"], reference) as stream,
        Progress(config, folder, start, seen) as progress,
        Ahead(stream, put, position=meta["position"], busy=progress.device_is_busy) as batches,
        CheckpointWriter(folder, every=config.checkpoint.every, keep=config.checkpoint.keep) as checkpoints,
    ):
        for step in range(start + 1, config.steps + 1):
            state, metrics = program.step(state, next(batches), frozen)
            if held_out is not None and held_out.due(step):
                metrics |= held_out.measure(state.params, frozen)
            seen.add(stream.row_ids(batches.position - 1))
            progress.add(step, metrics, batches.waited)
            last = step == config.steps
            if last or checkpoints.due(step):
                progress.flush(step)  # before the save: a resumed run must find the lines of the steps that it skips
                now = {"position": batches.position, "seen": seen.counts}
                checkpoints.save(step, state, meta | now, force=last)
    return folder


# --- the parts of the story --------------------------------------------------------------------------------------


def with_model(config: RunConfig) -> RunConfig:
    """The config with the model's shape filled in from the checkpoint it starts from, and checked against it."""
    recorded = runs.recorded_config(config.run)
    if recorded is not None:  # a run that goes on no longer needs the checkpoint that it started from
        return config if config.model else dataclasses.replace(config, model=recorded.model)
    if config.init.checkpoint is None:
        return config
    found = load_model_config(config.init.checkpoint)
    if config.model is not None and config.model != found:
        before, now = to_plain(found), to_plain(config.model)
        name = next(name for name in before if before[name] != now[name])
        raise UserError(
            f"model.{name} is {now[name]} in the config and {before[name]} in {config.init.checkpoint}: "
            "leave model out, and it is taken from the checkpoint"
        )
    return dataclasses.replace(config, model=found)


def open_rows(config: RunConfig, stores: Sequence[str]) -> Rows:
    """The rows of some stores; UserError where their kind, tokens or tokenizer don't fit the run."""
    rows = Rows.open(stores)
    tokenizer = runs.find_tokenizer(config.run, config.init.checkpoint)
    for store in rows.stores:
        check_compatible(
            store,
            kinds=STORE_KINDS[config.objective.name],
            vocab_size=config.model.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None,
        )
    if config.objective.name == "rpo" and rows.kind != "pairs":
        raise UserError(f"{rows} holds no pairs, which an RPO run needs: add a store of pairs, or choose objective sft")
    return rows


def open_held_out(config: RunConfig, program: TrainProgram, mesh: Mesh, model: str | None) -> HeldOut:
    """The run's held-out rows, with what the reference model says of them, and its exam."""
    wanted = config.held_out
    rows = open_rows(config, wanted.stores) if wanted.stores else None
    reference = references_of(config, rows, model) if rows is not None else None
    exam = open_likelihood(config, program, mesh) if wanted.exam else None
    return HeldOut(config, program, mesh, rows, reference, exam)


def open_likelihood(config: RunConfig, program: TrainProgram, mesh: Mesh) -> Likelihood:
    """The held-out exam, whose answers are looked at and not generated."""
    folder = runs.find_tokenizer(config.run, config.init.checkpoint)
    if folder is None:
        raise UserError(
            "held_out.exam needs the model's tokenizer: start from a model that "
            "`python -m tools.convert_hf from-hf` converted"
        )
    exam, template = load_exam(config.held_out.exam), load_template(config.held_out.template)
    rows = config.data.batch_size // config.data.accumulate
    return Likelihood(exam, template, load_tokenizer(folder), config.model, program.plan.structure, mesh, rows)


def references_of(config: RunConfig, rows: Rows, model: str | None) -> np.ndarray | None:
    """float32 [N, P, 2] log-probabilities of pairs under the reference model; zeros where the step computes them."""
    if config.objective.name != "rpo":
        return None
    return no_references(rows) if config.objective.reference == "adapters_off" else read_references(rows, model)


def open_stream(config: RunConfig, rows: Rows, position: int, reference: np.ndarray | None) -> BatchStream:
    """This process' part of the run's batches, from a position on."""
    return BatchStream(
        rows,
        config.data.batch_size,
        config.seed,
        mix=config.data.mix,
        position=position,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        reference=reference,
    )


def first_meta(config: RunConfig, rows: Rows, base: Base | None, params: Any, frozen: Any) -> dict[str, Any]:
    """What every checkpoint of this run says beside its arrays; `position` is the data's, in batches."""
    return {
        "config": to_plain(config),
        "model": to_plain(config.model),
        "base": base and base._asdict(),
        "position": 0,
        "reference_model": model_fingerprint(whole(params, frozen)) if config.objective.name == "rpo" else None,
        "seen": Seen(rows).counts,
        "rows_digest": rows.digest,
    }


def check_reference(config: RunConfig) -> None:
    """UserError where turning adapters off would compare with the model from before continued pretraining."""
    if config.objective.reference == "adapters_off" and load_adapted(config.init.checkpoint) is not None:
        raise UserError(
            f"objective.reference is adapters_off and {config.init.checkpoint} holds adapters, without which it is its "
            "raw base and not the model to compare with: choose cached"
        )


def check_same_data(folder: epath.Path, meta: dict[str, Any], rows: Rows) -> None:
    # By their names too: the same rows under other names would be counted, and mixed, as others.
    if meta["rows_digest"] != rows.digest or meta["seen"].keys() != Seen(rows).counts.keys():
        raise UserError(
            f"run {folder} was trained on other rows than there are now in {rows}: "
            "give what it began with, in the same order, or choose another run folder"
        )


class Progress:
    """Where a run's metrics go: to metrics.jsonl and TensorBoard every step, to the console now and then.

    The numbers stay on the device until `logging.every` steps have gathered, so the loop does not wait for each.
    """

    def __init__(self, config: RunConfig, folder: epath.Path, start: int, seen: Seen):
        writes = jax.process_index() == 0
        self._every, self._schedule = config.logging.every, make_schedule(config.optimizer, config.steps)
        self._seen, self._mixed = seen, config.data.mix is not None
        self._newest: jax.Array | None = None
        self._waited = 0.0
        self._meter = Meter()
        self._log = MetricsLog(folder, after_step=start) if writes else None
        self._console = Console(f"{config.objective.name} {folder.name}", config.steps, done=start, enabled=writes)

    def device_is_busy(self) -> bool:
        """Whether a step is still being computed; does not wait for it."""
        return self._newest is not None and not self._newest.is_ready()

    def add(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes a step's numbers; waited: seconds that it and those before have waited for data."""
        self._newest, self._waited = metrics["loss"], waited
        seen = self._seen.counts
        if not self._mixed:  # else each corpus has its own
            seen["epoch"] = self._seen.epochs
        self._meter.add(step, metrics | seen)
        if step % self._every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Fetches and writes what has gathered."""
        rows = self._meter.take(self._waited)
        if not rows or self._log is None:
            return
        self._log.write([row | {"learning_rate": float(self._schedule(row["step"] - 1))} for row in rows])
        last = rows[-1]
        note = f"loss {last['loss']:.4f}  {last['tokens_per_second']:,.0f} tokens/s"
        if last["data_wait"] > 0.01:
            note += f"  data {100 * last['data_wait']:.1f} %"
        self._console.update(step, note)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._console.close()
        if self._log is not None:
            self._log.close()

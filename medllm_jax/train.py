"""The story of a run, CPT and RPO alike, from top to bottom."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from medllm_jax import runs, sessions
from medllm_jax.checkpoint import Base, CheckpointWriter, load_adapted, load_model_config
from medllm_jax.config import RunConfig
from medllm_jax.data.ahead import Ahead
from medllm_jax.data.pipeline import BatchStream, check_mix
from medllm_jax.data.references import no_references, read_references
from medllm_jax.data.sources import Rows, Seen
from medllm_jax.data.store import check_compatible
from medllm_jax.data.tokenizer import fingerprint as tokenizer_fingerprint
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import Preempted, UserError
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.fingerprint import model_fingerprint
from medllm_jax.guard import Guard
from medllm_jax.held_out import HeldOut
from medllm_jax.likelihood import Likelihood
from medllm_jax.loading import first_weights, load_frozen, whole
from medllm_jax.processes import together
from medllm_jax.profiling import Profiler
from medllm_jax.programs import TrainProgram, train_program
from medllm_jax.progress import Progress
from medllm_jax.settings import to_plain
from medllm_jax.sharding import make_mesh, put_batch
from medllm_jax.step import TrainState
from medllm_jax.supervision import restore, supervised
from medllm_jax.watchdog import Watchdog

STORE_KINDS = {"cpt": ("cpt",), "sft": ("sft",), "rpo": ("pairs", "sft")}


def train(config: RunConfig, *, force: bool = False) -> epath.Path:
    """Trains until `config.steps`, from the newest good checkpoint of the run folder if it has one. Returns the folder.

    force: goes on with a config that computes something else than the one that the run was begun with.

    Raises:
      UserError: config and input don't fit the run, or each other.
      Preempted: the process was told to end, and what there was to save is saved.
      RunError: the run can't go on, and says why.
    """
    config = with_model(config)
    folder, changes = together("opening the run folder", lambda: runs.open_run(config, force=force), UserError)
    rows = open_rows(config, config.data.stores)
    if config.data.mix is not None:
        check_mix(rows, config.data.mix)
    mesh = make_mesh(config.mesh)
    program = train_program(config, mesh)

    with supervised(config, folder) as (lease, watch, notice):
        start, state, meta, frozen = beginning(config, folder, rows, program, watch)
        reference = references_of(config, rows, meta["reference_model"])
        held_out = open_held_out(config, program, mesh, meta["reference_model"]) if config.held_out else None
        seen, step = Seen(rows, meta["seen"]), start
        guard = Guard(config.guard, meta["skipped"], folder)
        began = together("writing to the run folder", lambda: open_session(config, folder, start, changes))

        put = functools.partial(put_batch, mesh=mesh)
        with (
            open_stream(config, rows, meta["position"], reference) as stream,
            Progress(config, folder, start, seen, guard, rows, began) as progress,
            Ahead(stream, put, position=meta["position"], busy=progress.device_is_busy) as batches,
            CheckpointWriter(folder, every=config.checkpoint.every, keep=config.checkpoint.keep) as checkpoints,
            Profiler(config.profiled, folder) as profiler,
        ):
            notice.hold()
            for step in range(start + 1, config.steps + 1):
                watch.stage(f"reading the batch of step {step}")
                batch = next(batches)
                watch.stage(f"step {step}")
                profiler.before(step)
                state, metrics = program.step(state, batch, frozen)
                profiler.after(step, state)
                if held_out is not None and held_out.due(step):
                    metrics |= held_out.measure(state.params, frozen)
                progress.add(step, metrics, stream.row_ids(batches.position - 1), batches.waited)
                lease.check()
                last = notice.came(step) or step == config.steps
                if last or checkpoints.due(step):
                    watch.stage(f"saving step {step}")
                    progress.settle(step)  # first: a run that goes on must find the lines of steps that it passes over
                    now = {"position": batches.position, "seen": seen.counts, "skipped": progress.skipped}
                    checkpoints.save(step, state, meta | now, force=last)
                if last:
                    break
            watch.stage(f"writing what is left of step {step}")
        progress.summarise()
        if step < config.steps:
            raise Preempted(f"after step {step} of {config.steps}, which is saved")
    return folder


# --- the parts of the story --------------------------------------------------------------------------------------


def beginning(
    config: RunConfig, folder: epath.Path, rows: Rows, program: TrainProgram, watch: Watchdog
) -> tuple[int, TrainState, dict[str, Any], Any]:
    """Step, state, meta and frozen parameters that a run goes on from, or starts with."""
    restored = restore(folder, program.abstract, watch)
    if restored is not None:
        check_same_data(folder, restored.meta, rows)
        frozen = load_frozen(program.plan, load_adapted(folder, restored.step))
        return restored.step, restored.state, restored.meta | {"config": to_plain(config)}, frozen
    watch.stage("reading the model")
    check_reference(config)
    params, frozen, base = first_weights(config, program.plan)
    meta = first_meta(config, rows, base, params, frozen)
    return 0, program.initialise(params), meta, frozen


def open_session(config: RunConfig, folder: epath.Path, start: int, changes: dict[str, Any]) -> float:
    """Writes down that, and with what, the run goes on; returns when it was first started, seconds since the epoch."""
    if jax.process_index() != 0:
        return 0.0
    runs.record_config(folder, config, replaced_at=start if changes else None)
    runs.carry_tokenizer(config.init.checkpoint, folder)
    return sessions.begin(folder, start, changes)[0]["time"]


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
        "skipped": 0,
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

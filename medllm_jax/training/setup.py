"""The parts of the story that `train` tells."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import Base, Checkpoint, open_on_all
from medllm_jax.checkpoint.load_model import initial_weights, load_frozen
from medllm_jax.checkpoint.train_state import TrainState
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import RunConfig
from medllm_jax.data.loader import BatchStream
from medllm_jax.data.reference_log_probs import no_references, read_references
from medllm_jax.data.rows import Rows, Seen
from medllm_jax.data.store import check_compatible
from medllm_jax.data.tokenizer import fingerprint as tokenizer_fingerprint
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.inference.likelihood import Likelihood
from medllm_jax.model.abstract import merge_params
from medllm_jax.observability import sessions
from medllm_jax.reliability.supervision import restore
from medllm_jax.reliability.watchdog import Watchdog
from medllm_jax.storage import run_folder
from medllm_jax.training.programs import TrainProgram
from medllm_jax.training.validation import HeldOut

STORE_KINDS = {"cpt": ("cpt",), "sft": ("sft",), "rpo": ("pairs", "sft")}


def restore_or_init(
    config: RunConfig,
    source: Checkpoint | None,
    folder: epath.Path,
    rows: Rows,
    program: TrainProgram,
    watch: Watchdog,
) -> tuple[int, TrainState, dict[str, Any], Any]:
    """Step, state, meta and frozen parameters that a run goes on from, or starts with.

    source: `open_source` of the config; opened here where a run that was begun has saved nothing yet.
    """
    restored = restore(folder, program.abstract, watch)
    if restored is not None:
        check_same_data(folder, restored.meta, rows)
        frozen = load_frozen(program.plan, restored.checkpoint)
        return restored.step, restored.state, restored.meta | {"config": to_plain(config)}, frozen
    watch.stage("reading the model")
    if source is None and config.init.checkpoint is not None:
        source = open_on_all(config.init.checkpoint)
    check_reference(config, source)
    params, frozen, base = initial_weights(program.plan, source, config.seed)
    meta = initial_metadata(config, rows, base, params, frozen)
    return 0, program.initialise(params), meta, frozen


def open_session(config: RunConfig, folder: epath.Path, start: int, changes: dict[str, Any]) -> float:
    """Writes down that, and with what, the run goes on; returns when it was first started, seconds since the epoch."""
    if jax.process_index() != 0:
        return 0.0
    run_folder.record_config(folder, config, replaced_at=start if changes else None)
    run_folder.carry_tokenizer(config.init.checkpoint, folder)
    return sessions.begin(folder, start, changes)[0]["time"]


def open_source(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that a new run starts from; None for random weights, and for a run that was begun before."""
    if config.init.checkpoint is None or run_folder.recorded_config(config.run) is not None:
        return None
    return open_on_all(config.init.checkpoint)


def with_model(config: RunConfig, source: Checkpoint | None) -> RunConfig:
    """The config with the model's shape filled in from `open_source`'s checkpoint, and checked against it."""
    recorded = run_folder.recorded_config(config.run)
    if recorded is not None:  # a run that goes on no longer needs the checkpoint that it started from
        return config if config.model else dataclasses.replace(config, model=recorded.model)
    if source is None:
        return config
    found = source.model
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
    tokenizer = run_folder.find_tokenizer(config.run, config.init.checkpoint)
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
    folder = run_folder.find_tokenizer(config.run, config.init.checkpoint)
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


def initial_metadata(config: RunConfig, rows: Rows, base: Base | None, params: Any, frozen: Any) -> dict[str, Any]:
    """What every checkpoint of this run says beside its arrays; `position` is the data's, in batches."""
    return {
        "config": to_plain(config),
        "model": to_plain(config.model),
        "base": base and base._asdict(),
        "position": 0,
        "skipped": 0,
        "reference_model": model_fingerprint(merge_params(params, frozen)) if config.objective.name == "rpo" else None,
        "seen": Seen(rows).counts,
        "rows_digest": rows.digest,
    }


def check_reference(config: RunConfig, source: Checkpoint | None) -> None:
    """UserError where turning adapters off would compare with the model from before continued pretraining."""
    if config.objective.reference == "adapters_off" and source is not None and source.adapter is not None:
        raise UserError(
            f"objective.reference is adapters_off and {source.run} holds adapters, without which it is its "
            "raw base and not the model to compare with: choose cached"
        )


def check_same_data(folder: epath.Path, meta: dict[str, Any], rows: Rows) -> None:
    # By their names too: the same rows under other names would be counted, and mixed, as others.
    if meta["rows_digest"] != rows.digest or meta["seen"].keys() != Seen(rows).counts.keys():
        raise UserError(
            f"run {folder} was trained on other rows than there are now in {rows}: "
            "give what it began with, in the same order, or choose another run folder"
        )

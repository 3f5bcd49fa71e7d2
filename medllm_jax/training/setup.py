"""The parts of the story that `train` tells."""

from collections.abc import Callable, Sequence
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
from medllm_jax.data.batch import Kind
from medllm_jax.data.loader import BatchStream
from medllm_jax.data.reference_log_probs import no_references, read_references
from medllm_jax.data.rows import Rows, Seen
from medllm_jax.data.store import check_compatible
from medllm_jax.data.tokenizer import fingerprint as tokenizer_fingerprint
from medllm_jax.data.tokenizer import load_tokenizer
from medllm_jax.distributed.flops import train_flops
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.inference.likelihood import Likelihood
from medllm_jax.model.abstract import merge_params
from medllm_jax.observability import sessions
from medllm_jax.observability.progress import Progress
from medllm_jax.reliability.bad_steps import BadStepGuard
from medllm_jax.reliability.supervision import restore
from medllm_jax.reliability.watchdog import Watchdog
from medllm_jax.storage import run_folder
from medllm_jax.training.programs import TrainProgram
from medllm_jax.training.resolve import ResolvedConfig
from medllm_jax.training.validation import HeldOut

# Objective -> kinds of stores that it reads.
STORE_KINDS: dict[str, tuple[Kind, ...]] = {"cpt": ("cpt",), "sft": ("sft",), "rpo": ("pairs", "sft")}


def restore_or_init(
    config: ResolvedConfig,
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
        frozen = load_frozen(program.model, restored.checkpoint)
        return restored.step, restored.state, restored.meta | {"config": to_plain(config)}, frozen
    watch.stage("reading the model")
    if source is None and config.init.checkpoint is not None:
        source = open_on_all(config.init.checkpoint)
    check_reference(config, source)
    params, frozen, base = initial_weights(program.model, source, config.seed)
    meta = initial_metadata(config, rows, base, params, frozen)
    return 0, program.initialise(params), meta, frozen


def open_session(config: ResolvedConfig, folder: epath.Path, start: int, changes: dict[str, Any]) -> float:
    """Records this start of the run; returns when it was first started, in seconds since the epoch."""
    if jax.process_index() != 0:
        return 0.0
    run_folder.record_config(folder, config, start=start, changed=bool(changes))
    run_folder.carry_tokenizer(config.init.checkpoint, folder)
    return sessions.begin(folder, start, changes)[0]["time"]


def open_rows(config: ResolvedConfig, stores: Sequence[str]) -> Rows:
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
        longest = config.model.max_position_embeddings
        if store.metadata.sequence_length > longest:
            raise UserError(
                f"store {store.path} has rows of {store.metadata.sequence_length} tokens, and the model was made for "
                f"{longest} (max_position_embeddings): prepare shorter rows, or set model.max_position_embeddings"
            )
    if config.objective.name == "rpo" and rows.kind != "pairs":
        raise UserError(f"{rows} holds no pairs, which an RPO run needs: add a store of pairs, or choose objective sft")
    return rows


def open_held_out(config: ResolvedConfig, program: TrainProgram, mesh: Mesh, model: str | None) -> HeldOut | None:
    """The run's held-out rows, with what the reference model says of them, and its exam; None where it has neither."""
    wanted = config.held_out
    if wanted is None:
        return None
    rows = open_rows(config, wanted.stores) if wanted.stores else None
    return HeldOut(
        program,
        mesh,
        rows,
        references_of(config, rows, model) if rows is not None else None,
        open_likelihood(config, wanted.exam, wanted.template, program, mesh) if wanted.exam else None,
        batch_size=config.micro_batch,
        every=wanted.every,
        last_step=config.steps,
    )


def open_likelihood(config: ResolvedConfig, exam: str, template: str, program: TrainProgram, mesh: Mesh) -> Likelihood:
    """The held-out exam, measured by the likelihood of its answers; nothing is generated."""
    folder = run_folder.find_tokenizer(config.run, config.init.checkpoint)
    if folder is None:
        raise UserError(
            "held_out.exam needs the model's tokenizer: start from a model that `medllm convert from-hf` converted"
        )
    tokenizer, structure = load_tokenizer(folder), program.model.structure
    prompts = load_template(template)
    return Likelihood(load_exam(exam), prompts, tokenizer, config.model, structure, mesh, config.micro_batch)


def references_of(config: ResolvedConfig, rows: Rows, model: str | None) -> np.ndarray | None:
    """float32 [N, P, 2] log-probabilities of pairs under the reference model; zeros where the step computes them.

    model: fingerprint of the reference model; an RPO run has one. None for other objectives.
    """
    if config.objective.name != "rpo" or model is None:
        return None
    return read_references(rows, model) if config.objective.reference == "cached" else no_references(rows)


def open_stream(config: ResolvedConfig, rows: Rows, position: int, reference: np.ndarray | None) -> BatchStream:
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


def open_progress(
    config: ResolvedConfig,
    folder: epath.Path,
    start: int,
    started: float,
    seen: Seen,
    guard: BadStepGuard,
    sequence_length: int,
    check: Callable[[], None],
) -> Progress:
    """Where the metrics of this start go; started: when the run was first started, in seconds since the epoch.

    check: raises RunError where the folder is another program's by now.
    """
    return Progress(
        folder,
        config.logging,
        seen,
        guard,
        name=config.objective.name,
        start=start,
        steps=config.steps,
        started=started,
        step_flops=train_flops(config.model, config.data.batch_size, sequence_length, config.adapter),
        mixed=config.data.mix is not None,
        settings=to_plain(config),
        check=check,
    )


def initial_metadata(config: ResolvedConfig, rows: Rows, base: Base | None, params: Any, frozen: Any) -> dict[str, Any]:
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


def check_reference(config: ResolvedConfig, source: Checkpoint | None) -> None:
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
            "give what it started with, in the same order, or choose another run folder"
        )

"""Reference log-probabilities of a pair store, computed once by the model that RPO starts from."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import open_on_all
from medllm_jax.checkpoint.load_model import initial_weights
from medllm_jax.config.schema import RunConfig
from medllm_jax.data.loader import in_order
from medllm_jax.data.prefetch import put_batch
from medllm_jax.data.reference_log_probs import reference_folder, write_references
from medllm_jax.data.rows import Rows
from medllm_jax.distributed.processes import run_on_all
from medllm_jax.distributed.sharding import check_divisible, make_mesh
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import AbstractModel, abstract_model, merge_params
from medllm_jax.storage.lease import Lease
from medllm_jax.terminal.progress import Console
from medllm_jax.training.programs import score_program
from medllm_jax.training.resolve import ResolvedConfig, resolve
from medllm_jax.training.setup import open_rows


def cache_reference(config: RunConfig) -> int:
    """Scores the pairs of an RPO run under its starting model; returns the number of pairs.

    The log-probabilities are stored beside the pairs under a hash of model and pairs, computed with the run's own mesh,
    precision and batch; `medllm train` reads them, so the reference model itself is not in memory there.
    """
    if config.objective.name != "rpo" or config.init.checkpoint is None:
        raise UserError(
            "reference log-probabilities belong to an RPO run: set objective.name to rpo, "
            "and init.checkpoint to the model that it starts from"
        )
    if config.objective.reference != "cached":
        raise UserError(f"objective.reference is {config.objective.reference}: the run reads no cached ones")
    source = open_on_all(config.init.checkpoint)
    config = resolve(config, source)
    mesh = make_mesh(config.mesh)
    stores = [config.data.stores, *([config.held_out.stores] if config.held_out and config.held_out.stores else [])]
    sources = [open_rows(config, group) for group in stores]
    check_divisible(mesh, config.model, config.micro_batch)
    model = abstract_model(config.model, config.precision, mesh, attention=config.attention, adapter=config.adapter)
    initial = initial_weights(model, source, config.seed)  # by the same road as the run itself, adapters and all
    params = merge_params(initial.params, initial.frozen)
    fingerprint = model_fingerprint(params)
    with contextlib.ExitStack() as stack:
        run_on_all("taking the stores", lambda: _take(stack, sources, fingerprint))
        for rows in sources:
            values = _score(config, model, mesh, params, rows)
            if jax.process_index() == 0:
                write_references(rows, fingerprint, values)
    return sum(corpus.examples for rows in sources for corpus in rows.corpora)


def _take(stack: contextlib.ExitStack, sources: Sequence[Rows], fingerprint: str) -> None:
    """The right to write the values of a model beside each store of pairs, on the process that writes them."""
    stores = {store.path: store for rows in sources for store in rows.stores if store.metadata.kind == "pairs"}
    for store in stores.values() if jax.process_index() == 0 else ():
        stack.enter_context(Lease.beside(reference_folder(store, fingerprint)))


def _score(config: ResolvedConfig, model: AbstractModel, mesh: Mesh, params: Any, rows: Rows) -> np.ndarray:
    """float32 [N, P, 2]: log-probabilities of the pairs of all rows."""
    score, scored = score_program(model.structure, mesh, rows.pairs_per_row, config.objective.vocab_chunks), []
    batches = in_order(rows, config.micro_batch, process_index=jax.process_index(), process_count=jax.process_count())
    with Console("reference", len(rows), unit="row", enabled=jax.process_index() == 0) as console:
        for batch, real in batches:
            scored.append(np.asarray(score(params, put_batch(batch, mesh)))[:real])
            console.update(sum(map(len, scored)), every_seconds=5)
    return np.concatenate(scored)

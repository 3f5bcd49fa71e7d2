"""Reference log-probabilities of a pair store, computed once by the model that RPO starts from."""

import jax
import numpy as np

from medllm_jax.config import RunConfig
from medllm_jax.data.pipeline import in_order
from medllm_jax.data.references import write_references
from medllm_jax.errors import UserError
from medllm_jax.fingerprint import model_fingerprint
from medllm_jax.loading import blueprint, first_weights, whole
from medllm_jax.metrics import Console
from medllm_jax.programs import score_program
from medllm_jax.sharding import check_divisible, make_mesh, put_batch
from medllm_jax.train import open_rows, with_model


def cache_reference(config: RunConfig) -> int:
    """Scores the pairs of an RPO run under its starting model; returns the number of pairs.

    The log-probabilities are stored beside the pairs under a hash of model and pairs, computed with the run's own mesh,
    precision and batch; `medllm train` reads them, so the reference model itself is not in memory there.
    """
    config = with_model(config)
    if config.objective.name != "rpo" or config.init.checkpoint is None:
        raise UserError(
            "reference log-probabilities belong to an RPO run: set objective.name to rpo, "
            "and init.checkpoint to the model that it starts from"
        )
    rows, mesh = open_rows(config), make_mesh(config.mesh)
    batch_size = config.data.batch_size // config.data.accumulate
    check_divisible(mesh, config.model, batch_size)
    plan = blueprint(config.model, config.precision, mesh, attention=config.attention, adapter=config.adapter)
    first = first_weights(config, plan)  # by the same road as the run itself, adapters and all
    params = whole(first.params, first.frozen)
    score = score_program(config, plan.structure, mesh, rows.pairs_per_row)
    scored = []
    batches = in_order(rows, batch_size, process_index=jax.process_index(), process_count=jax.process_count())
    with Console("reference", len(rows), unit="row", enabled=jax.process_index() == 0) as console:
        for batch, real in batches:
            scored.append(np.asarray(score(params, put_batch(batch, mesh)))[:real])
            console.update(sum(map(len, scored)), every_seconds=5)
    fingerprint = model_fingerprint(params)
    if jax.process_index() == 0:
        write_references(rows, fingerprint, np.concatenate(scored))
    return sum(corpus.examples for corpus in rows.corpora)

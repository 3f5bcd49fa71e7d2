"""What a run says before its first step."""

import dataclasses
import logging
import re

import jax
import pytest

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.data.store import RowStore
from medllm_jax.training import announce
from medllm_jax.training.loop import train
from tests.training.test_train import config_of


@pytest.fixture
def said(caplog):
    """What the package's loggers said, line by line."""
    logger = logging.getLogger("medllm_jax")
    before = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)
    logger.setLevel(before)


def test_a_run_says_what_it_is_and_what_it_takes(world, tmp_path, said, monkeypatch):
    monkeypatch.setattr(announce, "_LARGE_LOGITS", 0.05)  # of this vocabulary, they are a tenth of a step's memory
    store = RowStore.open(world.token_store)
    config = config_of(world, tmp_path / "run", steps=4)
    train(config)
    lines = said()
    model, data, begins, compiling, compiled = lines[:5]
    assert re.fullmatch(r"model: [\d,]+ parameters, all trained by cpt; weights in float32, products in float32", model)
    tokens, rows = store.metadata.tokens, len(store)
    assert f"{rows:,} rows of {store.metadata.sequence_length}, {tokens:,} tokens; a step reads 8 rows, about" in data
    assert f"about {round(8 * tokens / rows):,} tokens; an epoch is {rows / 8:.1f} steps" in data
    assert data.endswith(f"the run {4 * 8 / rows:.2f} epochs")
    assert begins == f"starting at step 0 of 4, in {tmp_path / 'run'}" and compiling == "compiling the step"
    assert re.match(
        r"compiled in \S+; a step takes [\d.]+ [kM]B of a device's memory.*: [\d.]+ [kM]B for weights", compiled
    )
    assert re.search(r"of which logits take about .* \(--objective.vocab_chunks \d+ makes them smaller\)", compiled)
    assert not any("compil" in line for line in lines[5:]), "it is compiled once"

    parts = dataclasses.replace(config, run=str(tmp_path / "parts"), objective=ObjectiveConfig(vocab_chunks=32))
    train(parts)
    assert not re.search("logits", said()[len(lines) + 4]), "what is computed in parts is not large"


def test_it_says_where_it_goes_on_and_when_nothing_is_left(world, tmp_path, said):
    config = config_of(world, tmp_path / "run", steps=4)
    shorter = dataclasses.replace(config, steps=2, optimizer=dataclasses.replace(config.optimizer, schedule="constant"))
    train(shorter)
    before = len(said())
    train(dataclasses.replace(shorter, steps=4))
    resumes = f"resuming from step 2 of 4, the newest checkpoint of {tmp_path / 'run'}"
    assert resumes in said()[before:]
    before = len(said())
    train(dataclasses.replace(shorter, steps=4))
    assert "all 4 steps are done: there is nothing to train" in said()[before:]
    assert not any("compil" in line for line in said()[before:])


def test_of_a_mix_each_corpus_has_its_epochs(world, tmp_path, said):
    store = RowStore.open(world.token_store)
    (corpus,) = store.metadata.corpora
    train(config_of(world, tmp_path / "run", steps=2, mix={corpus.name: 3.0}))
    assert f"the run is {2 * 8 / corpus.rows:.2f} epochs of {corpus.name}" in said()[1]
    assert jax.process_index() == 0

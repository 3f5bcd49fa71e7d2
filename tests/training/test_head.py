"""Ways of the LM head: log-softmax by numpy, the vocabulary in chunks, and a block of tokens at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.training import head as heads
from medllm_jax.training.head import hidden_before, score_targets, score_wanted
from medllm_jax.training.losses import objective
from tests.training.test_losses import (
    LENGTH,
    PAIRS_A_ROW,
    RPO,
    VOCAB,
    WIDTH,
    Fixed,
    document_batch,
    exactly,
    log_softmax,
    model_of,
    pair_batch,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def all_alike(targets):
    return jnp.ones(targets.shape, jnp.float32)


def scored(hidden, head, targets, chunks: int):
    """Scores with entropies, and the gradients of a weighted sum of the log-probabilities."""
    weights = jnp.cos(jnp.arange(targets.size).reshape(targets.shape))

    def total(hidden, head):
        scores = score_targets(hidden, head, targets, all_alike(targets), vocab_chunks=chunks, with_entropy=True)
        return jnp.sum(scores.log_probs * weights), scores

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)


@pytest.mark.parametrize("chunks", [2, 3, 24])
def test_the_vocabulary_in_chunks_gives_the_same_scores_and_gradients(rng, chunks):
    model, targets = model_of(rng, 2), jnp.asarray(rng.integers(VOCAB, size=(2, LENGTH)))
    (_, whole), whole_grads = scored(*model, targets, 1)
    (_, parts), part_grads = scored(*model, targets, chunks)
    for ours, reference in ((parts, whole), (part_grads, whole_grads)):
        for a, b in zip(ours, reference, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 4])
def test_scores_are_log_softmax_and_entropy_even_of_huge_logits(rng, chunks):
    targets = jnp.asarray(rng.integers(VOCAB, size=(1, LENGTH)))
    for scale, tolerance in ((1.0, 1e-5), (3e3, 3e-2)):
        model = model_of(rng, 1, scale)
        scores = score_targets(*model, targets, all_alike(targets), vocab_chunks=chunks, with_entropy=True)
        hidden, head = exactly(model)
        expected = log_softmax(hidden @ head.T)
        chosen = np.take_along_axis(expected, np.asarray(targets)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(scores.log_probs, chosen, atol=tolerance, rtol=1e-5)
        entropies = -np.sum(np.exp(expected) * expected, axis=-1)
        np.testing.assert_allclose(scores.entropies, entropies, atol=tolerance)


def test_entropies_are_not_computed_unasked_and_carry_no_gradient(rng):
    model, targets = model_of(rng, 1), jnp.zeros((1, LENGTH), jnp.int32)
    for chunks in (1, 4):
        assert not np.asarray(score_targets(*model, targets, all_alike(targets), vocab_chunks=chunks).entropies).any()
        scored = functools.partial(score_targets, vocab_chunks=chunks, with_entropy=True)
        gradient = jax.grad(lambda h, s=scored: s(h, model[1], targets, all_alike(targets)).entropies.sum())(model[0])
        assert not np.asarray(gradient).any()


def test_each_response_is_predicted_from_its_own_past(rng):
    batch = pair_batch(rng)
    index = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.float32)[None, :, None], (3, LENGTH, 1))
    before = np.asarray(hidden_before(index, batch, PAIRS_A_ROW))[..., 0]
    # The first rejected token of each pair follows the prompt's last token; every other one its left neighbour.
    jumps = {(0, 7): 3, (0, 12): 10, (1, 7): 0}
    for row in range(2):
        for place in range(1, LENGTH):
            if batch.branch_ids[row, place]:
                assert before[row, place] == jumps.get((row, place), place - 1), (row, place)


# --- a block of tokens at a time ------------------------------------------------------------------------------------

SFT = ObjectiveConfig(name="sft")
OBJECTIVES = {
    "cpt": (ObjectiveConfig(), document_batch),
    "cpt, vocabulary in chunks": (ObjectiveConfig(vocab_chunks=4), document_batch),
    "sft": (SFT, document_batch),
    "rpo": (RPO, pair_batch),
    "rpo, tokens alike": (dataclasses.replace(RPO, nll_reduction="token"), pair_batch),
    "ipo, vocabulary in chunks": (dataclasses.replace(RPO, pair_loss="ipo", vocab_chunks=3), pair_batch),
}


def value_and_gradients(config, model, batch, *, blocks: bool, trained=(True, True)):
    """Sums of a loss and the gradients of its total by what is trained of hidden states and head."""
    loss = objective(config, blocks=blocks)

    @jax.jit
    def run(trained_of, fixed_of, batch):
        def total(trained_of):
            parts = [a if a is not None else b for a, b in zip(trained_of, fixed_of, strict=True)]
            sums = loss(Fixed(*parts), batch, batch)
            return 3 * sums.total, sums

        return jax.value_and_grad(total, has_aux=True)(trained_of)

    of = [x if is_trained else None for x, is_trained in zip(model, trained, strict=True)]
    (_, sums), gradients = run(of, list(model), batch)
    return sums, gradients


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("block", [8, 5, 256])
def test_blocks_give_the_same_sums_and_gradients(rng, monkeypatch, name, block):
    monkeypatch.setattr(heads, "BLOCK", block)
    config, make = OBJECTIVES[name]
    batch = make(rng)
    if config is SFT:  # few tokens count, and none in a row's beginning
        batch = batch._replace(loss_weights=batch.loss_weights * (np.arange(LENGTH) % 7 > 4))
    model = model_of(rng, len(batch.tokens))
    whole = value_and_gradients(config, model, batch, blocks=False)
    parts = value_and_gradients(config, model, batch, blocks=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), parts, whole)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in parts[1])


@pytest.mark.parametrize("name", ["cpt", "rpo"])
def test_blocks_leave_a_frozen_head_alone(rng, monkeypatch, name):
    """Adapters train no head: hidden states have the same gradient, and no product is made for the head's."""
    monkeypatch.setattr(heads, "BLOCK", 8)
    config, make = OBJECTIVES[name]
    batch = make(rng)
    model = model_of(rng, len(batch.tokens))
    _, (expected, _) = value_and_gradients(config, model, batch, blocks=True)
    _, (found, none) = value_and_gradients(config, model, batch, blocks=True, trained=(True, False))
    assert none is None
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)

    def cost(argnums) -> float:
        loss = objective(config, blocks=True)
        gradient = jax.grad(lambda *parts: loss(Fixed(*parts), batch, batch).total, argnums=argnums)
        return jax.jit(gradient).lower(*model).compile().cost_analysis()["flops"]

    assert cost((0,)) < cost((0, 1)) - VOCAB * WIDTH * 8


def test_measuring_makes_no_gradients(rng):
    config, make = OBJECTIVES["cpt"]
    batch = make(rng)
    model = model_of(rng, len(batch.tokens))
    whole = objective(config)(model, batch, batch)
    parts = jax.jit(objective(config, blocks=True))(model, batch, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), parts, whole)
    program = jax.make_jaxpr(objective(config, blocks=True))(model, batch, batch)
    assert str(program).count("dot_general") == 1


def test_pieces_without_a_wanted_token_are_not_looked_at(rng, monkeypatch):
    monkeypatch.setattr(heads, "BLOCK", 8)
    model, targets = model_of(rng, 2), jnp.asarray(rng.integers(VOCAB, size=(2, LENGTH)))
    weights = jnp.zeros(targets.shape).at[1, 3].set(0.5).at[0, 20].set(1.0)
    hidden = model.hidden.at[:, 8:16].set(jnp.nan)
    scores = score_wanted(hidden, model.head_weight, targets, weights, vocab_chunks=1, with_entropy=True)
    whole = score_targets(*model, targets, weights, vocab_chunks=1, with_entropy=True)
    for found, expected in zip(scores, whole, strict=True):
        assert not np.asarray(found[:, 8:16]).any()
        for piece in (slice(8), slice(16, 24)):
            np.testing.assert_allclose(found[:, piece], expected[:, piece], rtol=1e-6)

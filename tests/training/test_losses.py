"""The objectives against float64 numpy, written from their formulas and not from the code."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.data.batch import TARGET, batch_of
from medllm_jax.training.losses import averages, objective, pair_log_probs

VOCAB, WIDTH = 24, 6
CPT = ObjectiveConfig()
RPO = ObjectiveConfig(name="rpo", beta=0.3, alpha=0.7)


class Fixed(NamedTuple):
    """A model whose hidden states [B, S, D] are given."""

    hidden: jax.Array
    head_weight: jax.Array

    def __call__(self, tokens, positions, segment_ids, branch_ids):
        return self.hidden


# (prompt, chosen, rejected) lengths of the pairs of each row; rows are padded to 24 tokens, pairs to 3.
PAIRS = [[(4, 3, 2), (2, 1, 5)], [(1, 6, 4)], []]
PAIRS_A_ROW, LENGTH = 3, 24


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def model_of(rng, rows: int, scale: float = 1.5) -> Fixed:
    hidden = scale * rng.standard_normal((rows, LENGTH, WIDTH))
    return Fixed(jnp.asarray(hidden, jnp.float32), jnp.asarray(rng.standard_normal((VOCAB, WIDTH)), jnp.float32))


def pair_batch(rng):
    rows = np.zeros((len(PAIRS), 3, LENGTH), np.int32)
    rows[:, 0] = rng.integers(VOCAB, size=(len(PAIRS), LENGTH))
    for row, pairs in zip(rows, PAIRS, strict=True):
        at = 0
        for number, lengths in enumerate(pairs, start=1):
            for branch, length in enumerate(lengths):
                row[1, at : at + length], row[2, at : at + length] = 2 * number - 1, branch
                at += length
    reference = rng.normal(-8.0, 2.0, (len(PAIRS), PAIRS_A_ROW, 2)).astype(np.float32)
    return batch_of(rows, "pairs", reference)


def document_batch(rng, rows: int = 2):
    stored = np.zeros((rows, 3, LENGTH), np.int32)
    stored[:, 0] = rng.integers(VOCAB, size=(rows, LENGTH))
    for row in range(rows):
        stored[row, 1, : 9 + row], stored[row, 1, 9 + row : 20] = 1, 3
    return batch_of(stored, "cpt")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def exactly(model: Fixed) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(model.hidden, np.float64), np.asarray(model.head_weight, np.float64)


def rpo_exactly(hidden, head, batch, beta: float, alpha: float) -> dict[str, list[float]]:
    """Values of every pair, by the formula: each response right after its prompt."""
    values: dict[str, list[float]] = {
        name: [] for name in ("loss", "dpo", "nll", "chosen", "rejected", "logp_w", "logp_l", "entropies")
    }
    for row, pairs in enumerate(PAIRS):
        at = 0
        for number, (prompt, *responses) in enumerate(pairs):
            start, at = at + prompt, at + prompt
            log_probs = []
            for branch, length in enumerate(responses):
                before = [start - 1, *range(at, at + length - 1)]  # what predicts each token of the response
                predicted = log_softmax(hidden[row, before] @ head.T)
                tokens = batch.tokens[row, at : at + length]
                log_probs.append(predicted[np.arange(length), tokens].sum())
                if branch == 0:
                    values["entropies"] += list(-(np.exp(predicted) * predicted).sum(axis=-1))
                at += length
            rewards = [beta * (log_probs[i] - float(batch.reference_log_probs[row, number, i])) for i in (0, 1)]
            dpo = np.log1p(np.exp(-(rewards[0] - rewards[1])))
            nll = -log_probs[0] / responses[0]
            found = (dpo + alpha * nll, dpo, nll, *rewards, *log_probs)
            for name, value in zip(values, found, strict=False):
                values[name].append(value)
    return values


# --- next token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 4])
def test_next_token_is_the_mean_cross_entropy_of_tokens_with_a_past(rng, chunks):
    batch, model = document_batch(rng), model_of(rng, 2)
    sums = objective(ObjectiveConfig(vocab_chunks=chunks))(model, batch, batch)
    hidden, head = exactly(model)
    expected = []
    for row in range(2):
        for place in range(1, 20):
            if place != 9 + row:  # the second document's first token has no past
                expected.append(-log_softmax(hidden[row, place - 1] @ head.T)[batch.tokens[row, place]])
    assert float(sums.weight) == len(expected) == 36
    np.testing.assert_allclose(sums.total, np.sum(expected), rtol=1e-5)
    np.testing.assert_allclose(sums.means["loss"][0][0], np.sum(expected), rtol=1e-5)
    assert float(sums.counts["tokens"]) == 40


# --- rpo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 4])
def test_rpo_is_its_formula(rng, chunks):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    config = ObjectiveConfig(name="rpo", beta=RPO.beta, alpha=RPO.alpha, vocab_chunks=chunks)
    sums = objective(config)(model, batch, batch)
    expected = rpo_exactly(*exactly(model), batch, RPO.beta, RPO.alpha)

    assert float(sums.weight) == float(sums.counts["pairs"]) == 3
    assert float(sums.counts["tokens"]) == 17 + 11
    np.testing.assert_allclose(sums.total, np.sum(expected["loss"]), rtol=1e-5)
    for name, key in (
        ("loss", "loss"),
        ("dpo", "dpo"),
        ("nll", "nll"),
        ("rewards/chosen", "chosen"),
        ("rewards/rejected", "rejected"),
        ("logps/chosen", "logp_w"),
        ("logps/rejected", "logp_l"),
    ):
        assert [float(weight) for _, weight in sums.means[name]] == [3] * len(sums.means[name])
        np.testing.assert_allclose(averages(sums)[name], np.mean(expected[key]), rtol=1e-5, err_msg=name)
    margins = np.subtract(expected["chosen"], expected["rejected"])
    np.testing.assert_allclose(sums.means["rewards/margins"][0][0], margins.sum(), rtol=1e-4)
    assert float(sums.means["rewards/accuracies"][0][0]) == (margins > 0).sum()
    ((total, weight),) = sums.means["entropy"]
    np.testing.assert_allclose(total, np.sum(expected["entropies"]), rtol=1e-5)
    assert float(weight) == len(expected["entropies"]) == 3 + 1 + 6


@pytest.mark.parametrize("chunks", [1, 4])
def test_rpo_gradient_is_that_of_its_formula(rng, chunks):
    """Along random directions, against central differences of the formula in float64."""
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    loss = objective(ObjectiveConfig(name="rpo", beta=RPO.beta, alpha=RPO.alpha, vocab_chunks=chunks))
    gradient = jax.grad(lambda model: loss(model, batch, batch).total)(model)
    hidden, head = exactly(model)
    for _ in range(3):
        toward = [rng.standard_normal(x.shape) for x in (hidden, head)]

        def along(step, toward=toward):
            moved = (hidden + step * toward[0], head + step * toward[1])
            return np.sum(rpo_exactly(*moved, batch, RPO.beta, RPO.alpha)["loss"])

        expected = (along(1e-5) - along(-1e-5)) / 2e-5
        found = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradient, toward, strict=True))
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_only_what_predicts_a_response_has_a_gradient(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    loss = objective(RPO)
    gradient = jax.grad(lambda model: loss(model, batch, batch).total)(model).hidden
    moved = np.abs(np.asarray(gradient)).max(axis=-1) > 0
    # Row 0: prompt's last (3), all but the last chosen (4, 5), all but the last rejected (7); then the second pair.
    assert np.flatnonzero(moved[0]).tolist() == [3, 4, 5, 7, 10, 12, 13, 14, 15]
    assert np.flatnonzero(moved[1]).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert not moved[2].any()


def test_a_batch_without_pairs_is_nothing(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    empty = jax.tree.map(lambda x: x[2:], batch)
    alone = Fixed(model.hidden[2:], model.head_weight)
    value, gradient = jax.value_and_grad(lambda m: objective(RPO)(m, empty, empty).total)(alone)
    assert float(value) == 0
    assert all(not np.asarray(g).any() for g in gradient)


def test_a_policy_that_is_its_reference_has_no_margin(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    own = pair_log_probs(model, batch, PAIRS_A_ROW, vocab_chunks=1)
    sums = objective(RPO)(model, batch._replace(reference_log_probs=own), batch)
    np.testing.assert_allclose(sums.means["dpo"][0][0], 3 * np.log(2), rtol=1e-6)
    assert float(sums.means["rewards/margins"][0][0]) == 0
    assert not np.asarray(own[2]).any()
    assert not np.asarray(own[1, 1:]).any()


def test_huge_margins_stay_finite(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    far = batch._replace(reference_log_probs=np.asarray(batch.reference_log_probs) * np.array([1e4, -1e4], np.float32))
    for reference in (far.reference_log_probs, -far.reference_log_probs):
        rows = far._replace(reference_log_probs=reference)
        value, gradient = jax.value_and_grad(lambda m, rows=rows: objective(RPO)(m, rows, rows).total)(model)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradient)


def parts_of(batch, model):
    """The exact values of each pair's parts: h, NLL sums and lengths."""
    values = rpo_exactly(*exactly(model), batch, RPO.beta, RPO.alpha)
    lengths = np.array([chosen for row in PAIRS for _, chosen, _ in row])
    return np.subtract(values["chosen"], values["rejected"]), -np.array(values["logp_w"]), lengths


@pytest.mark.parametrize(
    ("changes", "of_pair"),
    [
        ({"pair_loss": "ipo"}, lambda h: (h / RPO.beta - 1 / (2 * RPO.beta)) ** 2),
        ({"pair_loss": "hinge"}, lambda h: np.maximum(1 - h, 0)),
        ({"label_smoothing": 0.2}, lambda h: 0.8 * np.log1p(np.exp(-h)) + 0.2 * np.log1p(np.exp(h))),
    ],
)
def test_other_losses_of_pairs(rng, changes, of_pair):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    sums = objective(dataclasses.replace(RPO, **changes))(model, batch, batch)
    h, nll, lengths = parts_of(batch, model)
    np.testing.assert_allclose(sums.means[changes.get("pair_loss", "dpo")][0][0], of_pair(h).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.total, (of_pair(h) + RPO.alpha * nll / lengths).sum(), rtol=1e-5)


def test_token_reduction_has_all_chosen_tokens_count_alike(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    sums = objective(dataclasses.replace(RPO, nll_reduction="token"))(model, batch, batch)
    h, nll, lengths = parts_of(batch, model)
    expected = np.log1p(np.exp(-h)).mean() + RPO.alpha * nll.sum() / lengths.sum()
    np.testing.assert_allclose(sums.total / sums.weight, expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_what_is_reported_is_the_same_in_parts_of_any_size(rng, reduction):
    """As held-out rows are measured: a part knows nothing of the others, and their sums are divided once."""
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    loss = objective(dataclasses.replace(RPO, nll_reduction=reduction))
    whole = loss(model, batch, batch)
    np.testing.assert_allclose(averages(whole)["loss"], whole.total / whole.weight, rtol=1e-5)
    parts = []
    for row in range(len(PAIRS)):
        part = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        parts.append(loss(model._replace(hidden=model.hidden[row : row + 1]), part, part))
    for name, value in averages(jax.tree.map(lambda *sums: sum(sums), *parts)).items():
        np.testing.assert_allclose(value, averages(whole)[name], rtol=1e-5, err_msg=name)


def test_an_example_without_a_rejected_response_counts_its_nll(rng):
    batch, model = pair_batch(rng), model_of(rng, len(PAIRS))
    stored = np.stack([batch.tokens, batch.segment_ids, batch.branch_ids], axis=1)
    stored[1, 2, 1:7], stored[1, :, 7:] = TARGET, 0  # the second row's pair becomes an instruction: 1 given, 6 to learn
    mixed = batch_of(stored, "pairs", batch.reference_log_probs)
    sums = objective(RPO)(model, mixed, mixed)
    h, nll, lengths = parts_of(batch, model)
    expected = np.log1p(np.exp(-h[:2])).sum() + RPO.alpha * (nll / lengths).sum()
    np.testing.assert_allclose(sums.total, expected, rtol=1e-5)
    assert (float(sums.weight), float(sums.counts["pairs"])) == (3, 2)
    row, second = jax.tree.map(lambda x: x[1:2], mixed), Fixed(model.hidden[1:2], model.head_weight)
    alone = objective(ObjectiveConfig(name="sft"))(second, row, row)
    np.testing.assert_allclose(alone.total, nll[2], rtol=1e-5)
    assert float(alone.weight) == float(alone.counts["response_tokens"]) == 6


# --- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CPT, RPO], ids=["cpt", "rpo"])
def test_rows_add_up(rng, config):
    batch = document_batch(rng, 3) if config.name == "cpt" else pair_batch(rng)
    model, loss = model_of(rng, 3), objective(config)
    whole = loss(model, batch, batch)
    parts = [
        loss(
            Fixed(model.hidden[r : r + 1], model.head_weight),
            jax.tree.map(lambda x, r=r: x[r : r + 1], batch),
            batch,
        )
        for r in range(3)
    ]
    added = jax.tree.map(lambda *values: sum(values), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), added, whole)

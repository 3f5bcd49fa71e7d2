"""Objectives, each a sum and a weight: micro-batches, hosts and devices add, and one division comes at the end.

Everything after the LM head is float32. Shapes as in data/batch.py.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.data.batch import Batch
from medllm_jax.model.abstract import base_of
from medllm_jax.training.head import (
    HeadLoss,
    HostOrDevice,
    Score,
    hidden_before,
    in_blocks,
    one_hot_pairs,
    score_targets,
    score_wanted,
)

Model = Any  # a Qwen2: callable to hidden states, with head_weight


Mean = tuple[Float32[Array, ""], Float32[Array, ""]]  # a sum and its weight


class LossSum(NamedTuple):
    """Sums over rows; all float32 scalars.

    What a step minimises is ``total / weight``. means: name -> parts, each a sum and its weight, reported as the sum of
    their ratios, which is the same however rows are grouped; counts: name -> sum.
    """

    total: Float32[Array, ""]
    weight: Float32[Array, ""]
    means: dict[str, tuple[Mean, ...]]
    counts: dict[str, Float32[Array, ""]]


def averages(sums: LossSum) -> dict[str, Any]:
    """Name -> float32 scalar that is reported of sums over all rows, on the device or fetched; 0 without weight."""
    return {
        name: functools.reduce(operator.add, (total / weight.clip(1e-8) for total, weight in parts))
        for name, parts in sums.means.items()
    }


# (model, rows, whole) -> sums over the rows, which are all or some of a step's whole batch.
Loss = Callable[[Model, Batch, Batch], LossSum]


def objective(config: ObjectiveConfig, *, blocks: bool = False) -> Loss:
    """The loss function that a config names; blocks: its head takes a block of tokens at a time (`in_blocks`)."""
    preferences = config.name == "rpo"
    score = functools.partial(score_wanted if blocks else score_targets, vocab_chunks=config.vocab_chunks)
    of_hidden = (rpo if preferences else next_token)(config, score)
    if blocks:
        of_hidden = in_blocks(of_hidden, whole_rows=preferences)

    def loss(model: Model, batch: Batch, whole: Batch) -> LossSum:
        pairs = _reference_of(batch).shape[1] if preferences else 0
        return of_hidden(*_predictors(model, batch, pairs), batch, whole)

    return loss if not preferences or config.reference == "cached" else compared_with(base_of, config, loss)


def _predictors(model: Model, batch: Batch, pairs: int) -> tuple[Float[Array, "B S D"], Float[Array, "V D"]]:
    """The hidden state that predicts each token, each response of a pair right after its prompt; and the LM head."""
    hidden = model(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)
    return hidden_before(hidden, batch, pairs), model.head_weight.astype(hidden.dtype)


def next_token(config: ObjectiveConfig, score: Score) -> HeadLoss:
    """Cross-entropy of every weighted token given its own past, averaged over tokens."""

    def loss(hidden: Float[Array, "B S D"], head: Float[Array, "V D"], batch: Batch, whole: Batch) -> LossSum:
        del whole
        scores = score(hidden, head, batch.tokens, batch.loss_weights)
        total, weight = -jnp.sum(scores.log_probs * batch.loss_weights), jnp.sum(batch.loss_weights)
        counts = {"tokens": _tokens(batch)}
        if config.name == "sft":
            counts["response_tokens"] = weight
        return LossSum(total, weight, {"loss": ((total, weight),)}, counts)

    return loss


# Name -> (h, config) -> loss of pairs, from ``h = beta [(logp_w - ref_w) - (logp_l - ref_l)]``.
PAIR_LOSSES: dict[str, Callable[[jax.Array, ObjectiveConfig], jax.Array]] = {
    # arXiv 2305.18290, eq. 7; with label smoothing its mean over preferences that are wrong at that rate (cDPO).
    "dpo": lambda h, config: (
        -(1 - config.label_smoothing) * jax.nn.log_sigmoid(h) - config.label_smoothing * jax.nn.log_sigmoid(-h)
    ),
    "ipo": lambda h, config: jnp.square(h / config.beta - 1 / (2 * config.beta)),  # arXiv 2310.12036, eq. 17
    "hinge": lambda h, config: jax.nn.relu(1 - h),  # arXiv 2309.06657, sec. 3.2
}


def rpo(config: ObjectiveConfig, score: Score) -> HeadLoss:
    """A loss of preferences (`PAIR_LOSSES`) plus the NLL of the chosen response, averaged over examples.

    By default ``-log sigmoid(h) + alpha * nll`` with ``nll = -logp_w / len(y_w)``: eq. 1 of "Iterative Reasoning
    Preference Optimization" (arXiv 2404.19733 v3). With nll_reduction "token" all chosen tokens of the whole batch
    count alike: ``alpha * sum(-logp_w) / sum(len(y_w))`` beside the mean over pairs. An example without a rejected
    response (sft) counts its NLL alone.
    """

    def loss(hidden: Float[Array, "B S D"], head: Float[Array, "V D"], batch: Batch, whole: Batch) -> LossSum:
        reference = _reference_of(batch)
        pairs = reference.shape[1]
        scores = score(hidden, head, batch.tokens, batch.loss_weights, with_entropy=True)
        log_probs = sum_by_response(scores.log_probs * batch.loss_weights, batch, pairs)
        lengths = sum_by_response(batch.loss_weights, batch, pairs)
        # [B, P]: rows hold different numbers of examples.
        exists, is_pair = lengths[..., 0] > 0, lengths[..., 1] > 0

        rewards = config.beta * (log_probs - reference)
        margins = rewards[..., 0] - rewards[..., 1]
        preference = PAIR_LOSSES[config.pair_loss](margins, config)
        by_sequence = config.nll_reduction == "sequence"
        nll = -log_probs[..., 0] / jnp.maximum(lengths[..., 0] if by_sequence else _mean_chosen_length(whole, pairs), 1)

        def mean(value: Float32[Array, "B P"] | Bool[Array, "B P"], where: Bool[Array, "B P"]) -> Mean:
            return jnp.sum(value * where, dtype=jnp.float32), jnp.sum(where, dtype=jnp.float32)

        total, weight = mean(is_pair * preference + config.alpha * nll, exists)
        chosen = batch.loss_weights * (batch.branch_ids != 2)
        # Of tokens that count alike the mean needs no length of the whole batch, of which measuring has none.
        of_tokens = (-jnp.sum(log_probs[..., 0]), jnp.sum(lengths[..., 0]))
        nll_mean = mean(nll, exists) if by_sequence else of_tokens
        means: dict[str, tuple[Mean, ...]] = {
            "loss": (mean(is_pair * preference, exists), (config.alpha * nll_mean[0], nll_mean[1])),
            config.pair_loss: (mean(preference, is_pair),),
            "nll": (nll_mean,),
            "rewards/chosen": (mean(rewards[..., 0], is_pair),),
            "rewards/rejected": (mean(rewards[..., 1], is_pair),),
            "rewards/margins": (mean(margins, is_pair),),
            "rewards/accuracies": (mean(margins > 0, is_pair),),
            "logps/chosen": (mean(log_probs[..., 0], is_pair),),
            "logps/rejected": (mean(log_probs[..., 1], is_pair),),
            "entropy": ((jnp.sum(scores.entropies * chosen), jnp.sum(chosen)),),
        }
        return LossSum(total, weight, means, {"tokens": _tokens(batch), "pairs": jnp.sum(is_pair, dtype=jnp.float32)})

    return loss


def compared_with(reference: Callable[[Model], Model], config: ObjectiveConfig, loss: Loss) -> Loss:
    """The loss whose reference log-probabilities are computed on the spot, under a model that is made of the model."""

    def compared(model: Model, batch: Batch, whole: Batch) -> LossSum:
        pairs = _reference_of(batch).shape[1]
        found = pair_log_probs(reference(model), batch, pairs, config.vocab_chunks)
        return loss(model, batch._replace(reference_log_probs=jax.lax.stop_gradient(found)), whole)

    return compared


def _reference_of(batch: Batch) -> Float32[HostOrDevice, "B P 2"]:
    if batch.reference_log_probs is None:
        raise ValueError("a batch of pairs without reference log-probabilities: float32 [B, P, 2] is needed")
    return batch.reference_log_probs


def _mean_chosen_length(batch: Batch, pairs: int) -> Float32[Array, ""]:
    lengths = sum_by_response(batch.loss_weights, batch, pairs)[..., 0]
    return jnp.sum(lengths) / jnp.maximum(jnp.sum(lengths > 0), 1)


def pair_log_probs(model: Model, batch: Batch, pairs: int, vocab_chunks: int) -> Float32[Array, "B P 2"]:
    """Log-probability of each chosen and rejected response given its prompt; 0 where no pair is."""
    hidden, head = _predictors(model, batch, pairs)
    log_probs = score_targets(hidden, head, batch.tokens, batch.loss_weights, vocab_chunks=vocab_chunks).log_probs
    return sum_by_response(log_probs * batch.loss_weights, batch, pairs)


def sum_by_response(values: Float32[HostOrDevice, "B S"], batch: Batch, pairs: int) -> Float32[Array, "B P 2"]:
    """Sums of per-token values over the rejected response of each example, and over all else of it."""
    in_pair = one_hot_pairs(batch.segment_ids, pairs)
    rejected = batch.branch_ids == 2
    in_branch = jnp.stack([~rejected, rejected], axis=-1).astype(jnp.float32)
    return jnp.einsum("bs,bsp,bsc->bpc", values, in_pair, in_branch, precision="highest")


def _tokens(batch: Batch) -> Float32[Array, ""]:
    return jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)

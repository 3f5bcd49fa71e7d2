"""Objectives, each a sum and a weight: micro-batches, hosts and devices add, and one division comes at the end.

Everything after the LM head is float32. Shapes as in data/batch.py.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.data.batch import Batch
from medllm_jax.model.abstract import base_of

HostOrDevice = Array | np.ndarray  # as a batch's arrays
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


def objective(config: ObjectiveConfig) -> Loss:
    """The loss function that a config names."""
    loss = {"cpt": next_token, "sft": next_token, "rpo": rpo}[config.name](config)
    return loss if config.name != "rpo" or config.reference == "cached" else compared_with(base_of, config, loss)


def next_token(config: ObjectiveConfig) -> Loss:
    """Cross-entropy of every weighted token given its own past, averaged over tokens."""

    def loss(model: Model, batch: Batch, whole: Batch) -> LossSum:
        del whole
        scores = score_tokens(model, batch, pairs=0, vocab_chunks=config.vocab_chunks)
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


def rpo(config: ObjectiveConfig) -> Loss:
    """A loss of preferences (`PAIR_LOSSES`) plus the NLL of the chosen response, averaged over examples.

    By default ``-log sigmoid(h) + alpha * nll`` with ``nll = -logp_w / len(y_w)``: eq. 1 of "Iterative Reasoning
    Preference Optimization" (arXiv 2404.19733 v3). With nll_reduction "token" all chosen tokens of the whole batch
    count alike: ``alpha * sum(-logp_w) / sum(len(y_w))`` beside the mean over pairs. An example without a rejected
    response (sft) counts its NLL alone.
    """

    def loss(model: Model, batch: Batch, whole: Batch) -> LossSum:
        reference = _reference_of(batch)
        pairs = reference.shape[1]
        scores = score_tokens(model, batch, pairs=pairs, vocab_chunks=config.vocab_chunks, with_entropy=True)
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
    scores = score_tokens(model, batch, pairs=pairs, vocab_chunks=vocab_chunks)
    return sum_by_response(scores.log_probs * batch.loss_weights, batch, pairs)


def sum_by_response(values: Float32[HostOrDevice, "B S"], batch: Batch, pairs: int) -> Float32[Array, "B P 2"]:
    """Sums of per-token values over the rejected response of each example, and over all else of it."""
    in_pair = _one_hot_pairs(batch.segment_ids, pairs)
    rejected = batch.branch_ids == 2
    in_branch = jnp.stack([~rejected, rejected], axis=-1).astype(jnp.float32)
    return jnp.einsum("bs,bsp,bsc->bpc", values, in_pair, in_branch, precision="highest")


def _one_hot_pairs(segment_ids: Int[HostOrDevice, "B S"], pairs: int) -> Float32[Array, "B S P"]:
    return jax.nn.one_hot((segment_ids - 1) // 2, pairs, dtype=jnp.float32)  # -1, padding, is in none


def _tokens(batch: Batch) -> Float32[Array, ""]:
    return jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)


# --- log-probabilities of tokens ---------------------------------------------------------------------------------


class TokenScores(NamedTuple):
    """float32 [B, S]: log P(token | its own past), meaningless where a token has none; entropies of that prediction
    (zeros unless asked for), which carry no gradient."""

    log_probs: Float32[Array, "B S"]
    entropies: Float32[Array, "B S"]


def score_tokens(
    model: Model, batch: Batch, *, pairs: int, vocab_chunks: int, with_entropy: bool = False
) -> TokenScores:
    """Scores every token of a row under the model, each response of a pair right after its prompt."""
    hidden = model(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)
    hidden = hidden_before(hidden, batch, pairs)
    head = model.head_weight.astype(hidden.dtype)
    return score_targets(hidden, head, batch.tokens, vocab_chunks, with_entropy)


def hidden_before(hidden: Float[Array, "B S D"], batch: Batch, pairs: int) -> Float[Array, "B S D"]:
    """The hidden state that predicts each token.

    It is that of the token before, except for the first token of a rejected response, which follows the prompt's last
    token and not the chosen response's. Moved by products with one-hot matrices, so that the backward pass has no
    scatter.
    """
    previous = jnp.roll(hidden, 1, axis=1)
    if not pairs:
        return previous
    branch, segment = batch.branch_ids, batch.segment_ids
    last_of_prompt = (branch == 0) & (jnp.roll(branch, -1, axis=1) == 1)
    first_of_rejected = (branch == 2) & (jnp.roll(branch, 1, axis=1) == 1)
    in_pair = _one_hot_pairs(segment, pairs).astype(hidden.dtype)
    from_prompt = jnp.einsum("bsp,bsd->bpd", in_pair * last_of_prompt[..., None], hidden, precision="highest")
    moved = jnp.einsum("bsp,bpd->bsd", in_pair, from_prompt, precision="highest")
    return jnp.where(first_of_rejected[..., None], moved, previous)


def score_targets(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[HostOrDevice, "B S"],
    vocab_chunks: int,
    with_entropy: bool = False,
) -> TokenScores:
    """Log-probability of targets under hidden states and an LM head.

    With one chunk the logits [B, S, V] exist; with n, [B, S, V / n] at a time, forward and backward, and n must divide
    V. Chunk c holds the tokens v with v % n == c, so that a vocabulary split over devices stays split in each chunk.
    """
    if vocab_chunks == 1:
        logits = _logits(hidden, head)
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        mass = jnp.sum(jnp.exp(logits - top), axis=-1)
        normaliser = jnp.log(mass) + top[..., 0]
        is_target = jnp.arange(head.shape[0]) == targets[..., None]
        log_probs = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - normaliser
        entropies = jnp.zeros_like(log_probs)
        if with_entropy:
            fixed = jax.lax.stop_gradient(logits)
            mean_logit = jnp.sum(jnp.exp(fixed - top) * fixed, axis=-1) / jax.lax.stop_gradient(mass)
            entropies = jax.lax.stop_gradient(normaliser) - mean_logit
        return TokenScores(log_probs, entropies)
    return TokenScores(*_chunked_scores(hidden, head, targets, vocab_chunks, with_entropy))


def _logits(hidden: Float[Array, "B S D"], head: Float[Array, "V D"]) -> Float32[Array, "B S V"]:
    return jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)


def _chunk(head: Float[Array, "V D"], chunks: int, number) -> Float[Array, "chunk D"]:
    """The rows v of the head with v % n == number."""
    by_chunk = head.reshape(head.shape[0] // chunks, chunks, head.shape[1])
    return jax.lax.dynamic_index_in_dim(by_chunk, number, axis=1, keepdims=False)


def _is_target(targets: Int[HostOrDevice, "B S"], size: int, chunks: int, number) -> Bool[Array, "B S {size}"]:
    return jnp.arange(size) * chunks + number == targets[..., None]


def _chunked_forward(hidden, head, targets, chunks, with_entropy):
    """Log-probabilities, entropies and log-normalisers, [B, S] each, by a running log-sum-exp over chunks."""

    def body(carry, number):
        top, mass, weighted, target = carry
        weights = _chunk(head, chunks, number)
        logits = _logits(hidden, weights)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        exps, rescale = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
        mass = mass * rescale + jnp.sum(exps, axis=-1)
        if with_entropy:
            weighted = weighted * rescale + jnp.sum(exps * logits, axis=-1)
        is_target = _is_target(targets, weights.shape[0], chunks, number)
        return (new_top, mass, weighted, target + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full(targets.shape, jnp.finfo(jnp.float32).min), zeros, zeros, zeros)
    (top, mass, weighted, target), _ = jax.lax.scan(body, start, jnp.arange(chunks))
    normaliser = top + jnp.log(mass)
    entropies = normaliser - weighted / mass if with_entropy else zeros
    return target - normaliser, entropies, normaliser


def _chunked_scores_impl(hidden, head, targets, chunks, with_entropy):
    return _chunked_forward(hidden, head, targets, chunks, with_entropy)[:2]


def _chunked_scores_fwd(hidden, head, targets, chunks, with_entropy):
    log_probs, entropies, normaliser = _chunked_forward(hidden, head, targets, chunks, with_entropy)
    return (log_probs, entropies), (hidden, head, targets, normaliser)


def _chunked_scores_bwd(chunks, with_entropy, residuals, cotangents):
    hidden, head, targets, normaliser = residuals
    upstream = cotangents[0]  # entropies carry no gradient

    def body(carry, number):
        d_hidden, d_head = carry
        weights = _chunk(head, chunks, number)
        probs = jnp.exp(_logits(hidden, weights) - normaliser[..., None])
        is_target = _is_target(targets, weights.shape[0], chunks, number)
        d_logits = (upstream[..., None] * (is_target - probs)).astype(hidden.dtype)
        d_hidden += jnp.einsum("bsv,vd->bsd", d_logits, weights, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum("bsv,bsd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        d_head = jax.lax.dynamic_update_index_in_dim(d_head, d_weights.astype(head.dtype), number, axis=1)
        return (d_hidden, d_head), None

    by_chunk = (head.shape[0] // chunks, chunks, head.shape[1])
    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(by_chunk, head.dtype))
    (d_hidden, d_head), _ = jax.lax.scan(body, start, jnp.arange(chunks))
    return d_hidden.astype(hidden.dtype), d_head.reshape(head.shape), None


_chunked_scores = jax.custom_vjp(_chunked_scores_impl, nondiff_argnums=(3, 4))
_chunked_scores.defvjp(_chunked_scores_fwd, _chunked_scores_bwd)

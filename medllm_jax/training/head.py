"""The LM head: log-probabilities of tokens, and losses of them, without the logits of all tokens at once.

Three ways, by device and settings: whole; the vocabulary in chunks (`score_targets`), which a mesh may split; and a
block of tokens at a time (`in_blocks`), on one CPU. Everything after the head's product is float32. Shapes as in
data/batch.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from medllm_jax.data.batch import Batch
from medllm_jax.model.linear import product

HostOrDevice = Array | np.ndarray  # as a batch's arrays
# (hidden, head, rows, whole) -> sums over the rows (losses.LossSum). hidden: [B, S, D], what predicts each token of the
# rows; head: [V, D]; rows: all or some of a step's whole batch.
HeadLoss = Callable[[Array, Array, Batch, Batch], Any]
Score = Callable[..., "TokenScores"]  # `score_targets` or `score_wanted`, with the chunks of the vocabulary

BLOCK = 256  # tokens of a block: logits that stay in a CPU's cache, and products that still fill it
_MOST_PIECES = 8  # that a row is cut into: each is compiled by itself


class TokenScores(NamedTuple):
    """float32 [B, S]: log P(token | its own past), meaningless where a token has none; entropies of that prediction
    (zeros unless asked for), which carry no gradient."""

    log_probs: Float32[Array, "B S"]
    entropies: Float32[Array, "B S"]


def one_hot_pairs(segment_ids: Int[HostOrDevice, "B S"], pairs: int) -> Float32[Array, "B S P"]:
    """Which pair, or example, of its row a token is in."""
    return jax.nn.one_hot((segment_ids - 1) // 2, pairs, dtype=jnp.float32)  # -1, padding, is in none


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
    in_pair = one_hot_pairs(segment, pairs).astype(hidden.dtype)
    from_prompt = jnp.einsum("bsp,bsd->bpd", in_pair * last_of_prompt[..., None], hidden, precision="highest")
    moved = jnp.einsum("bsp,bpd->bsd", in_pair, from_prompt, precision="highest")
    return jnp.where(first_of_rejected[..., None], moved, previous)


def score_targets(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[HostOrDevice, "B S"],
    weights: Float32[HostOrDevice, "B S"],
    *,
    vocab_chunks: int,
    with_entropy: bool = False,
) -> TokenScores:
    """Log-probability of targets under hidden states and an LM head, of all tokens whatever they weigh.

    With one chunk the logits [B, S, V] exist; with n, [B, S, V / n] at a time, forward and backward, and n must divide
    V. Chunk c holds the tokens v with v % n == c, so that a vocabulary split over devices stays split in each chunk.
    """
    del weights
    if vocab_chunks == 1:
        logits = product(hidden, head, jnp.float32)
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


def score_wanted(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    targets: Int[HostOrDevice, "B S"],
    weights: Float32[HostOrDevice, "B S"],
    *,
    vocab_chunks: int,
    with_entropy: bool = False,
) -> TokenScores:
    """`score_targets` of the pieces of a row in which a token weighs anything, zeros for the others."""

    def scored(*arrays) -> TokenScores:
        return score_targets(*arrays, vocab_chunks=vocab_chunks, with_entropy=with_entropy)

    def zeros(*arrays) -> TokenScores:
        shape = arrays[2].shape
        return TokenScores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    length = targets.shape[1]
    size = max(BLOCK, -(-length // _MOST_PIECES))
    pieces = []
    for start in range(0, length, size):
        h, t, w = (x[:, start : start + size] for x in (hidden, targets, weights))
        pieces.append(jax.lax.cond(jnp.any(w), scored, zeros, h, head, t, w))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def in_blocks(loss: HeadLoss, *, whole_rows: bool) -> HeadLoss:
    """The same sums and gradients of a loss, from one block of tokens at a time.

    Gradients are made with the loss, while a block's logits are there: those of other blocks don't exist, and none are
    kept for the backward pass. Tokens that weigh something come first, so that the blocks, or pieces of a row, without
    any cost nothing. whole_rows: a block is a row, whose tokens count together; otherwise any BLOCK tokens are one.
    """

    @jax.custom_vjp
    def summed(hidden, head, batch: Batch, whole: Batch) -> Any:
        return _add_up(lambda h, rows: (loss(h, head, rows, whole), None), (hidden, batch))[0]

    def forward(*arguments) -> tuple[Any, tuple]:
        is_trained = arguments[1].perturbed  # the head of adapters is not
        hidden, head, batch, whole = jax.tree.map(lambda x: x.value, arguments)

        def total(hidden, head, rows):
            sums = loss(hidden, head, rows, whole)
            return sums.total, sums

        def with_gradients(hidden, rows):
            gradient = jax.grad(total, argnums=(0, 1) if is_trained else (0,), has_aux=True)
            (d_hidden, *d_head), sums = gradient(hidden, head, rows)
            return (sums, [x.astype(jnp.float32) for x in d_head]), d_hidden[0]

        (sums, d_head), d_hidden = _add_up(with_gradients, (hidden, batch))
        return sums, (d_hidden, *(x.astype(head.dtype) for x in d_head))

    def backward(gradients: tuple, cotangents: Any) -> tuple:
        d_hidden, *d_head = (cotangents.total.astype(x.dtype) * x for x in gradients)
        return d_hidden, d_head[0] if d_head else None, None, None

    summed.defvjp(forward, backward, symbolic_zeros=True)

    def blocked(hidden: Float[Array, "B S D"], head: Float[Array, "V D"], batch: Batch, whole: Batch) -> Any:
        if not whole_rows:
            pad = -batch.tokens.size % BLOCK
            hidden = jnp.pad(hidden.reshape(1, -1, hidden.shape[-1]), ((0, 0), (0, pad), (0, 0)))
            batch = _of_tokens(lambda x: jnp.pad(x.reshape(1, -1), ((0, 0), (0, pad))), batch)
        order = jnp.argsort(batch.loss_weights == 0, axis=1, stable=True)
        hidden = _reordered(hidden, order)
        batch = _of_tokens(lambda x: jnp.take_along_axis(x, order, axis=1), batch)
        if not whole_rows:
            hidden = hidden.reshape(-1, BLOCK, hidden.shape[-1])
            batch = _of_tokens(lambda x: x.reshape(-1, BLOCK), batch)
        return summed(hidden, head, batch, whole)

    return blocked


def _of_tokens(function: Callable[[Array], Array], batch: Batch) -> Batch:
    """The batch with its arrays [B, S] changed."""
    changed = {name: function(getattr(batch, name)) for name in Batch._fields if name != "reference_log_probs"}
    return batch._replace(**changed)


def _add_up(function: Callable, rows: Any) -> Any:
    """The sum of ``function(*row)[0]``, and all ``function(*row)[1]``, of rows [R, ...], each given as [1, ...]."""

    def of_one(row: Any) -> Any:
        return function(*jax.tree.map(lambda x: x[None], row))

    def add(carry: Any, row: Any) -> Any:
        found, kept = of_one(row)
        return jax.tree.map(jnp.add, carry, found), kept

    like, _ = jax.eval_shape(of_one, jax.tree.map(lambda x: x[0], rows))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), rows)


@jax.custom_vjp
def _reordered(hidden: Float[Array, "B S D"], order: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Tokens of each row in another order; the backward pass puts them back, without a scatter."""
    return jnp.take_along_axis(hidden, order[..., None], axis=1)


_reordered.defvjp(
    lambda hidden, order: (_reordered(hidden, order), order),
    lambda order, d_hidden: (_reordered(d_hidden, jnp.argsort(order, axis=1)), None),
)


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
        logits = product(hidden, weights, jnp.float32)
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
        probs = jnp.exp(product(hidden, weights, jnp.float32) - normaliser[..., None])
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

"""The model against transformers' Qwen2ForCausalLM, and against itself under every layout of a row."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from medllm_jax.config.schema import ModelConfig, ObjectiveConfig
from medllm_jax.conversion.names import tensors_of
from medllm_jax.data.batch import Batch, batch_of
from medllm_jax.model.qwen2 import REMAT_POLICIES, Backend, Qwen2, rotary, rotate
from medllm_jax.training.losses import objective, pair_log_probs
from tests.tiny_hf import make_hf_folder, our_model

VOCAB = 96


class Case(NamedTuple):
    tied: bool
    heads: tuple[int, int]
    head_dim: int | None
    rope_theta: float


CASES = {
    "tied, a key head for every query head": Case(True, (4, 4), None, 10_000.0),
    "untied, grouped, heads wider than hidden / heads": Case(False, (4, 2), 16, 1_000_000.0),
    "untied, one key head": Case(False, (6, 1), None, 10_000.0),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def folder(request, tmp_path_factory):
    case = CASES[request.param]
    return make_hf_folder(
        tmp_path_factory.mktemp("model"),
        tied=case.tied,
        heads=case.heads,
        head_dim=case.head_dim,
        rope_theta=case.rope_theta,
        hidden=48,
        vocab=VOCAB,
        tokenizer=False,
    )


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Shape, structure and parameters of one model for the tests that need no other side."""
    folder = make_hf_folder(
        tmp_path_factory.mktemp("grouped"), tied=False, head_dim=16, hidden=48, vocab=VOCAB, tokenizer=False
    )
    return our_model(folder)


@functools.partial(jax.jit, static_argnums=0)
def logits(structure, params, tokens, positions, segment_ids, branch_ids):
    model = nnx.merge(structure, params)
    return model(tokens, positions, segment_ids, branch_ids) @ model.head_weight.T


def random_tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=shape).astype(np.int32)


def row(*segments: str, tokens: np.ndarray) -> np.ndarray:
    """A stored row [3, S]: each segment is spelt by the branches of its tokens, "-" for padding."""
    segment_ids, branch_ids = [], []
    for number, branches in enumerate(filter(None, segments)):
        segment_ids += [0 if branches[0] == "-" else 2 * number + 1] * len(branches)
        branch_ids += [0 if c == "-" else int(c) for c in branches]
    return np.stack([tokens, np.array(segment_ids), np.array(branch_ids)]).astype(np.int32)


def run(model, batch: Batch) -> np.ndarray:
    _, structure, params = model
    return np.asarray(logits(structure, params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids))


def run_alone(model, tokens: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Logits [S, V] of a sequence that has a row for itself, padded to so many columns (one shape compiles once)."""
    padding = (columns or len(tokens)) - len(tokens)
    stored = row("0" * len(tokens), "-" * padding, tokens=np.pad(tokens, (0, padding)))
    return run(model, batch_of(stored[None], "cpt"))[0, : len(tokens)]


# --- against transformers ------------------------------------------------------------------------------------------


def test_logits_and_gradients_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2ForCausalLM

    config, structure, params = our_model(folder)
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = random_tokens(2, 24)

    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits
    targets = torch.tensor(tokens[:, 1:], dtype=torch.long).reshape(-1)
    torch.nn.functional.cross_entropy(expected[:, :-1].reshape(-1, VOCAB), targets).backward()

    batch = batch_of(np.stack([tokens, np.ones_like(tokens), np.zeros_like(tokens)], axis=1), "cpt")
    ours = run((config, structure, params), batch)
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-4)
    assert np.std(ours) > 0.3, "logits that hardly differ would agree whatever the model does"

    loss = objective(ObjectiveConfig())

    batch = jax.tree.map(jnp.asarray, batch)

    def mean_loss(params):
        sums = loss(nnx.merge(structure, params), batch, batch)
        return sums.total / sums.weight

    gradients = jax.jit(jax.grad(mean_loss))(params)
    parameters = dict(theirs.named_parameters())
    tensors = tensors_of(config)
    assert {tensor.name for tensor in tensors} == parameters.keys()
    for tensor in tensors:
        ours = functools.reduce(lambda tree, key: tree[key], tensor.path.split("/"), gradients)
        ours = np.asarray(ours if tensor.layer is None else ours[tensor.layer])
        reference = parameters[tensor.name].grad.numpy()
        size = np.abs(reference).max()
        assert size > 1e-4, f"{tensor.name} has no gradient to compare"
        np.testing.assert_allclose(ours, reference, atol=1e-4 * size, err_msg=tensor.name)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_packed_documents_are_documents_alone(grouped):
    tokens = random_tokens(24)
    batch = batch_of(row("0" * 7, "0" * 1, "0" * 12, "-" * 4, tokens=tokens)[None], "cpt")
    packed = run(grouped, batch)[0]
    for start, end in ((0, 7), (7, 8), (8, 20)):
        np.testing.assert_allclose(packed[start:end], run_alone(grouped, tokens[start:end], columns=24), atol=2e-5)


def test_padding_changes_nothing(grouped):
    tokens = random_tokens(24)
    batches = []
    for seed in (3, 4):
        tokens[16:] = random_tokens(8, seed=seed)
        batches.append(batch_of(row("0" * 16, "-" * 8, tokens=tokens)[None].copy(), "cpt"))
    one, other = (run(grouped, batch)[0, :16] for batch in batches)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, run_alone(grouped, tokens[:16]), atol=2e-5)


def test_responses_to_a_shared_prompt_are_those_to_prompts_of_their_own(grouped):
    tokens = random_tokens(32)
    # Two pairs in a row: prompt, chosen and rejected lengths (6, 5, 4) and (3, 2, 7), then padding.
    stored = row("0" * 6 + "1" * 5 + "2" * 4, "0" * 3 + "1" * 2 + "2" * 7, "-" * 5, tokens=tokens)
    batch = batch_of(stored[None], "pairs", np.zeros((1, 3, 2), np.float32))
    _, structure, params = grouped
    model = nnx.merge(structure, params)
    found = np.asarray(jax.jit(lambda batch: pair_log_probs(model, batch, pairs=3, vocab_chunks=1))(batch))[0]

    def alone(prompt: np.ndarray, response: np.ndarray) -> float:
        log_probs = jax.nn.log_softmax(run_alone(grouped, np.concatenate([prompt, response]), columns=32))
        places = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        return float(log_probs[places, response].sum())

    expected = np.zeros((3, 2))
    for pair, (start, prompt, chosen, rejected) in enumerate([(0, 6, 5, 4), (15, 3, 2, 7)]):
        parts = np.split(tokens[start : start + prompt + chosen + rejected], [prompt, prompt + chosen])
        expected[pair] = alone(parts[0], parts[1]), alone(parts[0], parts[2])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected[:2]).min() > 1


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
def test_a_cache_filled_in_parts_gives_the_rows_own_states(grouped, stacked):
    _, structure, params = grouped
    model = nnx.merge(structure, params)
    # Two prompts of different lengths, padded on the left to 8 columns, then 4 columns that both have.
    tokens, lengths, columns = random_tokens(2, 12), (8, 5), 16
    segment_ids = np.array([[int(c >= 8 - n) for c in range(12)] for n in lengths], np.int32)
    positions = np.maximum(np.arange(12)[None] - (8 - np.array(lengths))[:, None], 0).astype(np.int32)

    prefill = jax.jit(lambda *arguments: model.prefill(*arguments, columns, stacked=stacked))
    hidden, cache = prefill(tokens[:, :8], positions[:, :8], segment_ids[:, :8])
    states = [hidden]
    extend = jax.jit(lambda *arguments: model.extend(*arguments))
    for start, end in ((8, 9), (9, 11), (11, 12)):
        part = slice(start, end)
        hidden, cache = extend(tokens[:, part], positions[:, part], segment_ids[:, part], cache)
        states.append(hidden)
    assert int(cache.length) == 12
    hidden = np.concatenate(states, axis=1)

    whole = jax.jit(model.__call__)(tokens, positions, segment_ids, np.zeros_like(tokens))
    for number, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[number, 8 - length :], whole[number, 8 - length :], atol=2e-5)
        own = run_alone(grouped, tokens[number, 8 - length :], columns=24)
        np.testing.assert_allclose(hidden[number, 8 - length :] @ model.head_weight.T, own, atol=3e-5)


# --- backends ------------------------------------------------------------------------------------------------------


def test_what_is_recomputed_changes_no_gradient(grouped):
    config, _, params = grouped
    batch = jax.tree.map(jnp.asarray, batch_of(row("0" * 10, "0" * 6, tokens=random_tokens(16))[None], "cpt"))
    loss = objective(ObjectiveConfig())
    found = {}
    for remat in ("none", *REMAT_POLICIES):
        abstract = nnx.eval_shape(lambda remat=remat: Qwen2(config, Backend(remat=remat), rngs=nnx.Rngs(0)))
        structure, _ = nnx.split(abstract)

        def total(params, structure=structure):
            return loss(nnx.merge(structure, params), batch, batch).total

        quickly_compiled = jax.jit(jax.grad(total), compiler_options={"xla_backend_optimization_level": 0})
        found[remat] = quickly_compiled(params)
    for remat in REMAT_POLICIES:
        for ours, reference in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"]), strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-5 * float(jnp.abs(reference).max()))


def test_policies_keep_what_they_name(grouped):
    """Elements a token and block that wait for the backward pass, beside the block's input."""
    config, _, params = grouped
    rows, length = 2, 16
    arguments = [jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 4

    def kept(remat: str) -> int:
        structure, _ = nnx.split(nnx.eval_shape(lambda: Qwen2(config, Backend(remat=remat), rngs=nnx.Rngs(0))))

        def pullback(params, *arguments):
            return jax.vjp(lambda params: nnx.merge(structure, params)(*arguments), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, params, *arguments))
        stack = (config.num_hidden_layers, rows, length)
        return sum(leaf.size for leaf in leaves if leaf.shape[:3] == stack) // math.prod(stack) - config.hidden_size

    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.dim_of_head
    attention = (heads + 2 * kv_heads) * width + heads * width
    expected = {
        "full": 0,
        "attention": attention,
        "attention_offload": attention,
        "attention_gate": attention + config.intermediate_size,
        "attention_mlp": attention + 2 * config.intermediate_size,
        "elementwise": attention + 2 * config.intermediate_size + config.hidden_size,
    }
    assert {remat: kept(remat) for remat in expected} == expected
    assert kept("none") > kept("elementwise")


def test_bfloat16_compute_is_near_float32(grouped):
    config, structure, params = grouped
    near, _ = nnx.split(nnx.eval_shape(lambda: Qwen2(config, Backend(compute_dtype=jnp.bfloat16), rngs=nnx.Rngs(0))))
    tokens = random_tokens(1, 16)
    ones, zeros = np.ones_like(tokens), np.zeros_like(tokens)
    arguments = tuple(map(jnp.asarray, (tokens, np.arange(16)[None], ones, zeros)))
    rough, exact = jax.jit(lambda p: [nnx.merge(which, p)(*arguments) for which in (near, structure)])(params)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough - exact).mean()) < 0.03 * float(jnp.abs(exact).mean())


# --- parts ---------------------------------------------------------------------------------------------------------


def test_rotary_scores_depend_on_distance_only():
    x, y = (jax.random.normal(jax.random.key(seed), (1, 1, 1, 8)) for seed in (0, 1))

    def score(query: int, key: int) -> float:
        angles = [rotary(jnp.array([[place]]), 8, 100.0) for place in (query, key)]
        return float(jnp.sum(rotate(x, *angles[0]) * rotate(y, *angles[1])))

    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


def test_every_parameter_is_drawn_and_counted():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Qwen2(config, rngs=nnx.Rngs(0)))))()
    shapes = jax.tree.map(lambda x: x.shape, state)
    assert jax.tree.structure(state) == jax.tree.structure(
        unflatten_dict({t.path: 0 for t in tensors_of(config)}, sep="/")
    )
    assert shapes["layers"]["self_attn"]["k_proj"]["weight"] == (3, 16, 32)
    q_proj = np.asarray(state["layers"]["self_attn"]["q_proj"]["weight"])
    assert abs(q_proj.std() - 0.1) < 0.01
    assert not np.allclose(q_proj[0], q_proj[1]), "each block has numbers of its own"

"""The RPO loss of a real model beside others: float64 numpy, LLaMA-Factory's definition, TRL's own trainer."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from medllm_jax.config.schema import ObjectiveConfig
from medllm_jax.conversion.names import tensors_of
from medllm_jax.data.batch import Batch, batch_of
from medllm_jax.data.packing import best_fit, pair_segment
from medllm_jax.training.losses import LossSum, averages, objective, pair_log_probs
from tests.tiny_hf import make_hf_folder, our_model

BETA, ALPHA = 0.1, 1.0
# Of prompt, chosen, rejected, the longest pair first. A mean over chosen tokens is not one over pairs.
LENGTHS = [(9, 8, 2), (5, 3, 7), (4, 1, 5)]
ROW = 64

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


class Model(NamedTuple):
    folder: str
    config: Any
    structure: Any
    params: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reference that is another model, both in Hugging Face's format and as ours."""
    made = []
    for seed in (0, 1):
        folder = make_hf_folder(tmp_path_factory.mktemp(f"model-{seed}"), tied=False, seed=seed)
        made.append(Model(str(folder), *our_model(folder)))
    return made


@pytest.fixture(scope="module")
def pairs():
    """Token ids; 0, which is end of sequence and padding, is one of them and ends each response."""
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(0, 288, length) for length in lengths] for lengths in LENGTHS]
    return [(prompt, *(np.append(response[1:], 0) for response in responses)) for prompt, *responses in drawn]


def batch_with_reference(pairs: list[Pair], reference: Model, *, repeat_prompt: bool = False) -> Batch:
    """One row with all pairs, in their order, and room for as many as there are; reference values by our own model."""
    (row,) = best_fit([pair_segment(*pair, repeat_prompt=repeat_prompt) for pair in pairs], ROW)
    batch = batch_of(row[None], "pairs", np.zeros((1, len(LENGTHS), 2), np.float32))
    return batch._replace(reference_log_probs=np.asarray(scores_of(reference.structure)(reference.params, batch)))


@functools.cache
def scores_of(structure: Any) -> Any:
    return jax.jit(lambda params, batch: pair_log_probs(nnx.merge(structure, params), batch, len(LENGTHS), 1))


@functools.cache
def gradient_of(structure: Any, config: ObjectiveConfig) -> Any:
    loss = objective(config)

    def total(params: Any, batch: Batch) -> tuple[jax.Array, LossSum]:
        sums = loss(nnx.merge(structure, params), batch, batch)
        return sums.total / sums.weight, sums

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def loss_and_gradient(model: Model, batch: Batch, **config: Any) -> tuple[float, dict[str, np.ndarray], LossSum]:
    """Loss, gradient by the names of Hugging Face, and all sums."""
    step = gradient_of(model.structure, ObjectiveConfig(name="rpo", beta=BETA, alpha=ALPHA, **config))
    (value, sums), gradient = step(model.params, batch)
    return float(value), by_their_names(model, gradient), sums


def by_their_names(model: Model, tree: Any) -> dict[str, np.ndarray]:
    named = {}
    for tensor in tensors_of(model.config):
        value = tree
        for part in tensor.path.split("/"):
            value = value[part]
        named[tensor.name] = np.asarray(value if tensor.layer is None else value[tensor.layer])
    return named


# --- numpy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_loss_of_a_real_model_is_that_of_float64(models, pairs, reduction):
    policy, reference = models
    batch = batch_with_reference(pairs, reference)
    forward = jax.jit(lambda params, *arrays: nnx.merge(policy.structure, params)(*arrays))
    hidden = forward(policy.params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)
    logits = np.asarray(hidden[0], np.float64) @ np.asarray(policy.params["lm_head"]["weight"], np.float64).T
    predictions = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    dpo, chosen, at = [], [], 0
    for number, (prompt, *responses) in enumerate(pairs):
        end_of_prompt = at + len(prompt)
        place, log_ratios = end_of_prompt, []
        for side, response in enumerate(responses):
            before = [end_of_prompt - 1, *range(place, place + len(response) - 1)]
            log_prob = predictions[before, response].sum()
            log_ratios.append(log_prob - float(batch.reference_log_probs[0, number, side]))
            chosen += [log_prob] * (side == 0)
            place += len(response)
        dpo.append(np.log1p(np.exp(-BETA * (log_ratios[0] - log_ratios[1]))))
        at = place
    lengths = np.array([len(pair[1]) for pair in pairs])
    nll = -np.mean(chosen / lengths) if reduction == "sequence" else -np.sum(chosen) / lengths.sum()
    found, _, sums = loss_and_gradient(policy, batch, nll_reduction=reduction)
    np.testing.assert_allclose(found, np.mean(dpo) + ALPHA * nll, rtol=1e-6)
    np.testing.assert_allclose(averages(sums)["dpo"], np.mean(dpo), rtol=1e-6)


# --- LLaMA-Factory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat_prompt", [False, True])
def test_nll_is_llama_factorys_pref_ftx_by_transformers(models, pairs, repeat_prompt):
    """``mean over pairs of -logp / len`` of the chosen responses, each a sequence by itself in another library."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen2ForCausalLM

    policy, reference = models
    theirs = Qwen2ForCausalLM.from_pretrained(policy.folder, dtype=torch.float32, local_files_only=True)
    values = []
    for prompt, chosen, _ in pairs:
        tokens = torch.tensor(np.concatenate([prompt, chosen]))[None]
        with torch.no_grad():
            log_probs = theirs(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
        values.append(-log_probs[range(len(chosen)), tokens[0, len(prompt) :]].sum().item() / len(chosen))
    batch = batch_with_reference(pairs, reference, repeat_prompt=repeat_prompt)
    _, _, sums = loss_and_gradient(policy, batch, nll_reduction="sequence")
    ((total, weight),) = sums.means["nll"]
    assert float(weight) == len(pairs)
    np.testing.assert_allclose(total / weight, np.mean(values), rtol=1e-6)


# --- TRL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_loss(models, tmp_path_factory):
    """``(pairs, kind) -> (loss, gradient)`` by TRL's trainer of DPO and SFT mixed; kind is its name of the former."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'medllm_jax[test]'")
    import datasets
    import torch
    from transformers import Qwen2ForCausalLM
    from trl import DPOConfig, DPOTrainer

    policy, reference = models
    settings = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, ALPHA],
        beta=BETA,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    # It wants a dataset; what it is asked about are token ids.
    unused = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    other = Qwen2ForCausalLM.from_pretrained(reference.folder, dtype=torch.float32, local_files_only=True)
    trainer = DPOTrainer(model=policy.folder, ref_model=other, args=settings, train_dataset=unused)

    def loss(pairs: list[Pair], kind: str = "sigmoid") -> tuple[float, dict[str, np.ndarray]]:
        trainer.loss_types = [kind, "sft"]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator([dict(zip(names, map(list, pair), strict=True)) for pair in pairs])
        trainer.model.zero_grad()
        value = trainer.compute_loss(trainer.model, batch)
        value.backward()
        return value.item(), {name: p.grad.numpy().copy() for name, p in trainer.model.named_parameters()}

    return loss


def assert_same(ours: tuple[float, dict], theirs: tuple[float, dict]) -> None:
    """Losses and gradients to 1e-5; those of a tensor in units of its largest one."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize(("pair_loss", "kind"), [("dpo", "sigmoid"), ("hinge", "hinge")])
@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_one_pair_is_as_in_trl(models, pairs, trl_loss, number, pair_loss, kind):
    policy, reference = models
    one = pairs[number : number + 1]
    ours = loss_and_gradient(policy, batch_with_reference(one, reference), pair_loss=pair_loss)
    assert_same(ours[:2], trl_loss(one, kind))


@pytest.mark.parametrize("repeat_prompt", [False, True])
def test_many_pairs_are_as_in_trl_where_tokens_count_alike(models, pairs, trl_loss, repeat_prompt):
    policy, reference = models
    batch = batch_with_reference(pairs, reference, repeat_prompt=repeat_prompt)
    theirs = trl_loss(pairs)
    assert_same(loss_and_gradient(policy, batch, nll_reduction="token")[:2], theirs)
    assert abs(loss_and_gradient(policy, batch, nll_reduction="sequence")[0] - theirs[0]) > 1e-2

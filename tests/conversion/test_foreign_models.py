"""Every field of transformers' Qwen2Config and of PEFT's configs: computed here as there, or refused by its name."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from medllm_jax.config.schema import ModelConfig
from medllm_jax.conversion.hf_config import read_config
from medllm_jax.conversion.hf_weights import open_hf
from medllm_jax.conversion.names import tensors_of
from medllm_jax.conversion.peft import factors, open_adapter
from medllm_jax.conversion.verify import logits_here
from medllm_jax.errors import UserError
from medllm_jax.model.lora import merge
from tests.tiny_hf import make_hf_folder

torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
TOKENS = np.random.default_rng(0).integers(96, size=40).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_hf_folder(
        tmp_path_factory.mktemp("foreign") / "hf", layers=1, hidden=16, heads=(2, 1), vocab=96, tokenizer=False
    )


def logits_there(folder):
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS]))[0][0].numpy()


# --- transformers ----------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
TAKEN, REFUSED = True, False

# Field of Qwen2Config -> values that are none of its defaults, and whether they are taken.
FIELDS = {
    "architectures": [(["Qwen2ForTokenClassification"], REFUSED), (None, TAKEN)],
    "attention_dropout": [(0.5, REFUSED)],
    "bos_token_id": [(5, TAKEN)],
    "chunk_size_feed_forward": [(8, REFUSED)],
    "dtype": [("float16", TAKEN)],
    "eos_token_id": [([5, 6], TAKEN)],
    "hidden_act": [("gelu", REFUSED)],
    "hidden_size": [(32, REFUSED)],
    "id2label": [({"0": "A", "1": "B", "2": "C"}, TAKEN)],
    "initializer_range": [(0.5, TAKEN)],
    "intermediate_size": [(8, REFUSED)],
    "is_encoder_decoder": [(True, REFUSED)],
    "label2id": [({"A": 0}, TAKEN)],
    "layer_types": [(["sliding_attention"], REFUSED), (["full_attention"], TAKEN)],
    "max_position_embeddings": [(16, TAKEN)],
    "max_window_layers": [(0, TAKEN)],
    "num_attention_heads": [(4, REFUSED)],
    "num_hidden_layers": [(2, REFUSED), (20_000_000, REFUSED)],
    "num_key_value_heads": [(2, REFUSED), (None, REFUSED)],
    "output_hidden_states": [(True, TAKEN)],
    "pad_token_id": [(7, TAKEN)],
    "problem_type": [("regression", TAKEN)],
    "return_dict": [(False, REFUSED)],  # with which transformers' own model fails
    "rms_norm_eps": [(0.5, TAKEN)],
    "rope_parameters": [
        ({"rope_type": "default", "rope_theta": 77.0}, TAKEN),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, REFUSED),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, REFUSED),
        (YARN, REFUSED),
        (LLAMA3, REFUSED),
        (LONGROPE, REFUSED),
        ({"full_attention": YARN}, REFUSED),
    ],
    "sliding_window": [(4, TAKEN), (None, TAKEN)],
    "tie_word_embeddings": [(False, REFUSED)],
    "transformers_version": [("9.9.9", TAKEN)],
    "use_cache": [(False, TAKEN)],
    "use_sliding_window": [(True, REFUSED)],
    "vocab_size": [(64, REFUSED)],
}
# Other ways in which files say it: changes -> whether they are taken.
OTHER = [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, REFUSED),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, REFUSED),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 77.0}, "rope_theta": None}, REFUSED),
    ({"rope_theta": 77.0}, TAKEN),
    ({"rope_theta": 77.0, "rope_scaling": {"rope_type": "default"}}, TAKEN),
    ({"use_sliding_window": True, "sliding_window": None}, TAKEN),
    ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, REFUSED),
    ({"tie_last_hidden_states": True}, REFUSED),
    ({"torch_dtype": "float16", "dtype": None}, TAKEN),
]


def test_every_field_of_transformers_config_is_tried():
    assert {field.name for field in dataclasses.fields(transformers.Qwen2Config)} == FIELDS.keys()


@pytest.fixture(scope="module")
def logits_of_it(folder):
    """The shape of the unchanged model, and its logits here."""
    return read_config(folder), logits_here(open_hf(folder), [TOKENS])[0]


CASES = [({field: value}, taken) for field, values in FIELDS.items() for value, taken in values] + OTHER
QUICK = (
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "use_sliding_window",
    "r",
    "use_rslora",
    "init_lora_weights",
)


def mark(field, *case):
    """What is taken runs a model there, which takes time: where that only describes one, `make test` leaves it out."""
    slow = case[-1] and field not in QUICK
    return pytest.param(*case, marks=pytest.mark.slow) if slow else case


@pytest.mark.parametrize(("changes", "taken"), [mark(next(iter(changes)), changes, taken) for changes, taken in CASES])
def test_configs_compute_what_transformers_does(folder, logits_of_it, tmp_path, changes, taken):
    content = json.loads((folder / "config.json").read_text())
    if "rope_theta" in (changes.get("rope_parameters") or {}):
        del content["rope_theta"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    if not taken:
        with pytest.raises(UserError) as raised:
            open_hf(tmp_path)
        text = str(raised.value)
        assert len(text) < 400 and "\n" not in text
        assert any(key in text for key in changes) or "config.json asks for" in text
        return
    model, (config, logits) = open_hf(tmp_path), logits_of_it
    ours = logits if model.config == config else logits_here(model, [TOKENS])[0]
    np.testing.assert_allclose(ours, logits_there(tmp_path), atol=1e-4)


# --- PEFT ------------------------------------------------------------------------------------------------------------

PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# Field of LoraConfig, or of what it inherits -> values that are none of its defaults, and whether they are taken.
LORA_FIELDS = {
    "alora_invocation_tokens": [([1, 2], REFUSED), ([], TAKEN)],
    "alpha_pattern": [({"q_proj": 3}, REFUSED)],
    "arrow_config": [({"top_k": 2}, REFUSED)],
    "auto_mapping": [({"parent_library": "x"}, TAKEN)],
    "base_model_name_or_path": [("some/model", TAKEN)],
    "bias": [("all", REFUSED), ("lora_only", REFUSED)],
    "corda_config": [({"corda_method": "kpm"}, REFUSED)],
    "ensure_weight_tying": [(True, REFUSED)],
    "eva_config": [({"rho": 1.0}, TAKEN)],
    "exclude_modules": [(["k_proj"], REFUSED), ([], TAKEN)],
    "fan_in_fan_out": [(True, REFUSED)],
    "inference_mode": [(True, TAKEN)],
    "init_lora_weights": [
        *((value, TAKEN) for value in ("gaussian", "eva", "orthogonal", False)),
        *((value, REFUSED) for value in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica")),
    ],
    "kasa_config": [({"beta": 0.1}, REFUSED)],
    "layer_replication": [([[0, 1], [0, 1]], REFUSED)],
    "layers_pattern": [("layers", REFUSED)],
    "layers_to_transform": [([0], REFUSED), (0, REFUSED)],
    "loftq_config": [({"loftq_bits": 4}, REFUSED)],
    "lora_alpha": [(11, TAKEN), (2.5, TAKEN)],
    "lora_bias": [(True, REFUSED)],
    "lora_dropout": [(0.3, TAKEN)],
    "lora_ga_config": [({"scale": "unit"}, REFUSED)],
    "megatron_config": [({"x": 1}, REFUSED)],
    "megatron_core": [("other.core", TAKEN)],
    "modules_to_save": [(["norm"], REFUSED), ([], TAKEN)],
    "monteclora_config": [({"num_samples": 2}, REFUSED)],
    "peft_type": [],  # below
    "peft_version": [("9.9", TAKEN)],
    "qalora_group_size": [(8, TAKEN)],
    "r": [(2, TAKEN), (8, TAKEN)],
    "rank_pattern": [({"q_proj": 2}, REFUSED)],
    "revision": [("main", TAKEN)],
    "runtime_config": [({"ephemeral_gpu_offload": True}, TAKEN)],  # PEFT never saves it, and ignores it
    "target_modules": [("all-linear", TAKEN), (["model.layers.0.self_attn.v_proj"], TAKEN), (".*q_proj", REFUSED)],
    "target_parameters": [(["mlp.weight"], REFUSED)],
    "task_type": [("SEQ_CLS", REFUSED)],
    "trainable_token_indices": [([1], REFUSED)],
    "use_bdlora": [({"nblocks": 2}, REFUSED)],
    "use_dora": [(True, REFUSED)],
    "use_qalora": [(True, REFUSED)],
    "use_rslora": [(True, TAKEN)],
    "velora_config": [({"num_groups": 2}, REFUSED)],
}
LORA_CASES = [mark(field, field, value, taken) for field, values in LORA_FIELDS.items() for value, taken in values]
# What is said only where PEFT's own class would not let it be made, or would change it.
WRITTEN = ("auto_mapping", "peft_version", "runtime_config", "base_model_name_or_path")


def test_every_field_of_lora_is_tried():
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == LORA_FIELDS.keys()


@pytest.fixture(scope="module")
def shape(folder) -> ModelConfig:
    return read_config(folder)


@pytest.mark.parametrize("kind", [kind.value for kind in peft.PeftType if kind.value != "LORA"])
def test_other_methods_of_peft_are_refused(shape, tmp_path, kind):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **PLAIN, "its_own": 1}))
    with pytest.raises(UserError, match=f"peft_type is '{kind}': only LORA can be converted"):
        open_adapter(str(tmp_path), shape, {"base": "float32"})


@pytest.mark.parametrize(("field", "value", "taken"), LORA_CASES)
def test_lora_is_merged_as_peft_merges_it(folder, shape, tmp_path, field, value, taken):
    if taken:
        made = peft.LoraConfig(**(PLAIN if field in WRITTEN else PLAIN | {field: value}))
        model = peft.get_peft_model(transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), made)
        save_trained(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text()) if taken else {"peft_type": "LORA", **PLAIN}
    if not taken or field in WRITTEN:
        (tmp_path / "adapter_config.json").write_text(json.dumps(content | {field: value}))
    if taken:
        assert_merged_alike(folder, shape, tmp_path)
        return
    with pytest.raises(UserError, match=f"{field} (is|has) "):
        open_adapter(str(tmp_path), shape, {"base": "float32"})


def test_pissa_that_peft_made_plain_is_taken(folder, shape, tmp_path):
    base = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(**PLAIN, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # as its guide has it, before the first step
    model.save_pretrained(tmp_path / "initial")
    save_trained(model, tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["r"] == 2 * PLAIN["r"]
    assert_merged_alike(folder, shape, tmp_path / "plain")


def save_trained(model, place, **options):
    """Saves adapters that are not what they began with."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(place, **options)


def assert_merged_alike(folder, shape, place):
    base = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, place).merge_and_unload().state_dict()
    adapter, weights = open_adapter(str(place), shape, {"base": "float32"}), load_file(folder / "model.safetensors")
    matrices = factors(adapter, shape)
    merged = 0
    for tensor in tensors_of(shape):
        layer, weight = tensor.path.rpartition("/")[0], weights[tensor.name]
        if f"{layer}/lora_A" in matrices and tensor.path.endswith("/weight"):
            pair = tuple(matrices[f"{layer}/lora_{matrix}"][tensor.layer] for matrix in "AB")
            weight = merge(weight, pair, adapter.settings)
            merged += np.abs(weight - weights[tensor.name]).max() > 0.01
        np.testing.assert_allclose(weight, theirs[tensor.name].numpy(), atol=1e-6, err_msg=tensor.name)
    assert merged == len(adapter.settings.projections)

import dataclasses
import json

import pytest

from medllm_jax.conversion.hf_config import config_json, read_config
from tests.conversion.hf_folders import assert_refused
from tests.tiny_hf import make_hf_folder
from tests.world import tiny_config


def test_config_is_read_in_both_forms_and_written_for_both(tmp_path):
    make_hf_folder(tmp_path, tokenizer=False, rope_theta=12_345.0, vocab=64)
    four = read_config(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["rope_parameters"] = {"rope_theta": content.pop("rope_theta"), "rope_type": "default"}
    content["layer_types"] = ["full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path) == four
    assert four.rope_theta == 12_345.0
    assert four.rms_norm_eps == 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config_json(four, "float32", {})))
    assert read_config(tmp_path) == four


def test_config_of_a_run_without_head_dim_names_none():
    assert "head_dim" not in config_json(tiny_config(), "float32", {})
    assert config_json(tiny_config(), "float32", {"eos_token_id": 3})["eos_token_id"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "only Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "only Qwen2ForCausalLM"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: type is 'yarn': rope scaling changes"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling: factor is 4.0: this key is not known here"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_parameters: rope_type is 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters: full_attention is {"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling: rope_type is 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 2e4}}, "rope_theta 10000.0 and 20000.0, rope_parameters: readers differ"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn': a mapping is expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"use_sliding_window": True}, "sliding-window attention"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding-window attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1: only 0 can be converted"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1e-3}}}, "per_layer_config is {'0': "),
        ({"auto_map": {"AutoModel": "x.Y"}}, "a model with code of its own"),
        ({"something_new": "x" * 10_000}, "something_new is 'xxx"),
        ({"k" * 10_000: None}, "kkk... is None: this key is not known here"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' can be converted"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': the id of a token, a list of them, or null is expected"),
        ({"eos_token_id": [2, [3]]}, "eos_token_id is [2, [3]]"),
        ({"bos_token_id": [1]}, "bos_token_id is [1]: the id of a token, or null, is expected"),
        ({"pad_token_id": True}, "pad_token_id is True"),
        ({"use_cache": "x"}, "transformers can't read config.json"),
    ],
)
def test_configs_that_are_refused(broken, tmp_path, capsys, changes, message):
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | changes))
    assert_refused(broken, tmp_path, capsys, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": None, "num_attention_heads": 2, "head_dim": 16},
        {"use_sliding_window": True, "sliding_window": None},
        {"sliding_window": 16, "max_window_layers": 0, "layer_types": ["full_attention"] * 2},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000}},
        {"rope_scaling": {"type": "default"}},
        {"use_mrope": False, "quantization_config": None, "architectures": None, "vocab_size": 288.0},
        {"dtype": "float16", "_name_or_path": "/home/me", "transformers_version": "9.0", "id2label": {"0": "A"}},
    ],
)
def test_configs_that_ask_for_nothing_more(source, tmp_path, changes):
    content = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    expected = {key: changes[key] for key in ("num_attention_heads", "head_dim") if key in changes}
    assert read_config(tmp_path) == dataclasses.replace(read_config(source), **expected)

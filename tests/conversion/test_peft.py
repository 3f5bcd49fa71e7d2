"""Adapters in PEFT's files: those trained here work there, those trained there work here, and what can't be is said."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import load_model
from medllm_jax.cli.convert import main
from medllm_jax.config.schema import AdapterConfig, MeshConfig, PrecisionConfig
from medllm_jax.conversion.peft import open_adapter
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.training.loop import train
from tests.tiny_hf import make_hf_folder
from tests.training.test_adapters import MODEL, config_of

TOKENS = np.random.default_rng(0).integers(MODEL.vocab_size, size=48).tolist()
LORA = AdapterConfig(rank=4, alpha=16.0, rslora=True, base="float32", projections=("q_proj", "v_proj", "down_proj"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """`hf` and `base`: a model in both formats; `cpt`: adapters trained on it; `adapter`, `merged`: its exports."""
    root = tmp_path_factory.mktemp("peft")
    shape = {"layers": MODEL.num_hidden_layers, "heads": (MODEL.num_attention_heads, MODEL.num_key_value_heads)}
    more = {"intermediate_size": MODEL.intermediate_size, "rms_norm_eps": MODEL.rms_norm_eps}
    make_hf_folder(
        root / "hf", hidden=MODEL.hidden_size, vocab=MODEL.vocab_size, rope_theta=MODEL.rope_theta, **shape, **more
    )
    shutil.copytree(world.tokenizer, root / "hf", dirs_exist_ok=True)
    assert convert("from-hf", root / "hf", root / "base") == 0
    config = dataclasses.replace(config_of(world.token_store, root / "base", root / "cpt", adapter=LORA), model=None)
    train(config)
    assert convert("to-hf", root / "cpt", root / "adapter", "--adapter", "--base-name", "some/base") == 0
    assert convert("to-hf", root / "cpt", root / "merged") == 0
    return root


def convert(*arguments):
    return main([str(argument) for argument in arguments])


def logits_of_run(run):
    """float32 [tokens, V], of base and adapters unmerged where it has some."""
    model = load_model(
        open_checkpoint(run), PrecisionConfig(compute="float32"), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    row = jnp.asarray([TOKENS], jnp.int32)
    network = nnx.merge(model.structure, model.params)
    with jax.default_matmul_precision("highest"):
        hidden = network(row, jnp.arange(len(TOKENS))[None], jnp.ones_like(row), jnp.zeros_like(row))
        return np.asarray(hidden[0] @ network.head_weight.T)


def logits_of_torch(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def torch_model(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- from here to there ----------------------------------------------------------------------------------------------


def test_adapters_trained_here_work_in_peft(place):
    peft = pytest.importorskip("peft")
    ours = logits_of_run(place / "cpt")
    adapted = peft.PeftModel.from_pretrained(torch_model(place / "hf"), place / "adapter")
    theirs = logits_of_torch(adapted)
    assert np.abs(ours - logits_of_run(place / "base")).max() > 0.1  # they do something
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_merged_export_equals_what_peft_merges(place):
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(torch_model(place / "hf"), place / "adapter")
    theirs = {name: value.numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
    ours = load_file(place / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}  # tied
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_exported_adapters_stand_alone(place):
    names = {file.name for file in (place / "adapter").iterdir()}
    assert {WEIGHTS, CONFIG, "README.md", "NOTICE", "SHA256SUMS", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names
    content = json.loads((place / "adapter" / CONFIG).read_text())
    assert content["base_model_name_or_path"] == "some/base"
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (4, 16.0, True)
    weights = load_file(place / "adapter" / WEIGHTS)
    assert len(weights) == 2 * len(LORA.projections) * MODEL.num_hidden_layers


def test_adapters_come_back_byte_for_byte(place, tmp_path):
    assert (
        convert("from-hf", place / "adapter", tmp_path / "back", "--base", place / "base", "--base-storage", "float32")
        == 0
    )
    ours, back = (open_checkpoint(run).host_params() for run in (place / "cpt", tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, ours, back)
    assert open_checkpoint(tmp_path / "back").adapter == LORA
    np.testing.assert_array_equal(logits_of_run(tmp_path / "back"), logits_of_run(place / "cpt"))


def test_whole_models_have_no_adapter_to_export(place, tmp_path, capsys):
    assert convert("to-hf", place / "base", tmp_path / "out", "--adapter") == 2
    assert "holds a whole model, not adapters" in capsys.readouterr().err


# --- from there to here ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(place):
    """An adapter that PEFT made, of all projections, and its logits."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(torch_model(place / "hf"), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        batch = torch.tensor([TOKENS])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place / "theirs")
    return logits_of_torch(model)


def test_adapters_trained_by_peft_work_here(place, theirs, tmp_path, capsys):
    assert (
        convert("from-hf", place / "theirs", tmp_path / "run", "--base", place / "base", "--base-storage", "float32")
        == 0
    )
    assert "parameters of adapters in float32" in capsys.readouterr().out
    ours = logits_of_run(tmp_path / "run")
    assert np.abs(ours - logits_of_run(place / "base")).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert convert("to-hf", tmp_path / "run", tmp_path / "merged") == 0
    np.testing.assert_allclose(logits_of_torch(torch_model(tmp_path / "merged")), theirs, atol=1e-4)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "nothing was trained" not in text
    assert "Adapters of hf were trained with PEFT, outside medllm_jax (theirs: rank 3, alpha 7, scale 2.33333)" in text
    assert "Adapters: rank 3, alpha 7, scale 2.33333, on" in text and "exported merged into the base" in text
    assert convert("from-hf", tmp_path / "merged", tmp_path / "whole") == 0
    assert convert("to-hf", tmp_path / "whole", tmp_path / "again") == 0
    text = (tmp_path / "again" / "README.md").read_text()
    assert "Its weights are those of merged, converted; nothing was trained after that." in text
    assert "> Adapters of hf were trained with PEFT, outside medllm_jax (theirs: rank 3, alpha 7" in text


def test_adapters_of_peft_are_trained_on(world, place, theirs, tmp_path, metrics_of):
    convert("from-hf", place / "theirs", tmp_path / "run", "--base", place / "base", "--base-storage", "nf4")
    settings = open_checkpoint(tmp_path / "run").adapter
    assert settings == AdapterConfig(rank=3, alpha=7.0, dropout=0.1, base="nf4")
    config = config_of(world.token_store, tmp_path / "run", tmp_path / "more", adapter=settings)
    train(dataclasses.replace(config, model=None, steps=2))
    assert open_checkpoint(tmp_path / "more").base.checkpoint == str(place / "base")


# --- adapters that are refused ---------------------------------------------------------------------------------------


def change_config(**changes):
    def apply(folder):
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | changes))

    return apply


def change_weights(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "pickled": (pickled, "only adapter_model.bin: pickle files are refused"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "another method": (change_config(peft_type="IA3"), "only LORA can be converted"),
    "DoRA": (change_config(use_dora=True), "use_dora is True"),
    "biases": (change_config(bias="all"), "bias is 'all'"),
    "ranks by module": (change_config(rank_pattern={"q_proj": 8}), "rank_pattern is"),
    "another module": (change_config(target_modules=["q_proj", "lm_head"]), "target_modules has lm_head: some of"),
    "no module": (change_config(target_modules=[]), "target_modules has []"),
    "a regular expression": (change_config(target_modules=".*q_proj"), "target_modules has '.*q_proj': some of"),
    "another rank": (change_config(r=5), "[4, 128], for the base it would be [5, 128]"),
    "rank in words": (change_config(r="four"), "r is 'four': a whole number is expected"),
    "a broken rank": (change_config(r=4.5), "r is 4.5: a whole number is expected"),
    "PiSSA": (change_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa': its A and B stand on another"),
    "PiSSA, fast": (change_config(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "OLoRA": (change_config(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "LoftQ": (change_config(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    "CorDA": (change_config(init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    "aLoRA": (change_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is [1, 2]"),
    "some blocks": (change_config(layers_to_transform=[0]), "layers_to_transform is [0]"),
    "whole modules": (change_config(modules_to_save=["embed_tokens"]), "modules_to_save is ['embed_tokens']"),
    "parameters": (change_config(target_parameters=["x"]), "target_parameters is ['x']"),
    "another task": (change_config(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
    "a newer key": (change_config(use_newest=False), "use_newest is False: this key is not known here"),
    "missing": (change_weights(lambda w: w.pop(FIRST)), f"missing tensors: {FIRST}"),
    "extra": (change_weights(lambda w: w.update(extra=w[FIRST])), "tensors of no projection here: extra"),
    "integers": (change_weights(lambda w: w.update({k: v.astype(np.int8) for k, v in w.items()})), "is I8"),
    "two dtypes": (change_weights(lambda w: w.update({FIRST: w[FIRST].astype(np.float16)})), "several dtypes"),
}


NOTHING = {
    "r": 4.0,
    "init_lora_weights": "gaussian",
    "modules_to_save": [],
    "exclude_modules": [],
    "rank_pattern": {},
    "layers_to_transform": None,
    "eva_config": None,
    "peft_version": "9",
    "auto_mapping": {"unsloth_fixed": True},
}


def test_what_asks_for_nothing_is_taken(place, tmp_path):
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    expected = open_adapter(str(folder), MODEL, {"base": "float32"})
    change_config(**NOTHING)(folder)
    assert open_adapter(str(folder), MODEL, {"base": "float32"}) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_are_refused(place, tmp_path, capsys, case):
    change, message = REFUSED[case]
    folder = shutil.copytree(place / "adapter", tmp_path / "adapter")
    change(folder)
    capsys.readouterr()
    assert convert("from-hf", folder, tmp_path / "run", "--base", place / "base") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_without_its_base_and_with_a_wrong_one(place, tmp_path, capsys):
    assert convert("from-hf", place / "adapter", tmp_path / "run") == 2
    assert "give --base too" in capsys.readouterr().err
    assert convert("from-hf", place / "adapter", tmp_path / "run", "--base", place / "cpt") == 2
    assert "the whole model that they stand on is expected" in capsys.readouterr().err
    make_hf_folder(tmp_path / "deep", layers=MODEL.num_hidden_layers + 1, tokenizer=False)
    assert convert("from-hf", tmp_path / "deep", tmp_path / "other") == 0
    assert convert("from-hf", place / "adapter", tmp_path / "run", "--base", tmp_path / "other") == 2
    assert "missing tensors" in capsys.readouterr().err
    for option in (["--mesh", "fsdp=2"], ["--quantize", "nf4"], ["--resume"], ["--part", "1/2"]):
        assert convert("from-hf", place / "adapter", tmp_path / "run", "--base", place / "base", *option) == 2
        assert "has no meaning for an adapter" in capsys.readouterr().err


def test_adapters_are_merged_into_a_base_that_was_quantised_as_training_saw_it(world, place, tmp_path):
    assert convert("from-hf", place / "hf", tmp_path / "nf4", "--quantize", "nf4") == 0
    params = unflatten_dict(open_checkpoint(place / "cpt").host_params(), sep="/")
    settings = dataclasses.replace(LORA, base="nf4")
    for start, name in ((place / "base", "on_the_way"), (tmp_path / "nf4", "before")):
        config = config_of(world.token_store, start, tmp_path / name, adapter=settings)
        train(dataclasses.replace(config, model=None, steps=2))
        assert convert("to-hf", tmp_path / name, tmp_path / f"{name} merged") == 0
    first, second = (load_file(tmp_path / f"{name} merged" / "model.safetensors") for name in ("on_the_way", "before"))
    assert params.keys() == {"layers"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)

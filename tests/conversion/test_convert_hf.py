import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import load_base, load_model
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.cli.convert import main
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import AdapterConfig, MeshConfig, ModelConfig, PrecisionConfig
from medllm_jax.conversion.finite import non_finite
from medllm_jax.conversion.hf_config import config_json, read_config
from medllm_jax.conversion.hf_weights import open_hf, read_header
from medllm_jax.conversion.names import WEIGHTS, parameter_shapes, tensors_of
from medllm_jax.conversion.to_hf import parse_size
from medllm_jax.conversion.verify import stacked_weights
from medllm_jax.data.tokenizer import encode_plain, fingerprint, load_tokenizer
from medllm_jax.distributed.sharding import make_mesh, parameter_shardings
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import abstract_model
from medllm_jax.training.loop import train
from tests.tiny_hf import DTYPES, make_hf_folder, write_weights
from tests.training.test_train import config_of

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_same_tensors(first: Path, second: Path) -> None:
    ours, theirs = tensors_in(first), tensors_in(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tied bfloat16 checkpoint in one file."""
    return make_hf_folder(tmp_path_factory.mktemp("source") / "hf", dtype="bfloat16")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """`source` as a run folder."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    assert run("from-hf", source, folder) == 0
    return folder


@pytest.fixture
def broken(source, tmp_path):
    """A copy of `source` to break."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


# --- the table of names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_name(tied):
    config = ModelConfig(**{**to_plain(CONFIG), "tie_word_embeddings": tied})
    shapes = parameter_shapes(config)
    paths = [path for path, _ in WEIGHTS]
    assert len(set(paths)) == len(paths)
    assert set(paths) - shapes.keys() == ({"lm_head/weight"} if tied else set())
    assert shapes.keys() <= set(paths)

    tensors = tensors_of(config)
    names = [tensor.name for tensor in tensors]
    assert len(set(names)) == len(names) == 3 * 12 + (2 if tied else 3)
    assert names[0] == "model.embed_tokens.weight"
    sizes = sum(int(np.prod(tensor.shape)) for tensor in tensors)
    assert sizes == sum(int(np.prod(shape)) for shape in shapes.values())


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "dtype", "shards", "max_shard_size", "files_out"),
    [
        (True, "bfloat16", 1, "5GB", 1),
        (False, "float32", 3, "40KB", 5),
        (False, "float16", 2, "5GB", 1),
    ],
)
def test_round_trip_keeps_every_byte(tmp_path, capsys, tied, dtype, shards, max_shard_size, files_out):
    source = make_hf_folder(
        tmp_path / "hf", tied=tied, dtype=dtype, shards=shards, head_dim=16, heads=(6, 2), vocab=96, tokenizer=False
    )
    assert run("from-hf", source, tmp_path / "run") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out", "--max-shard-size", max_shard_size) == 0

    assert_same_tensors(source, tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(source)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files_out
    assert names_in(tmp_path) == ["hf", "out", "run"]
    assert "WITHOUT tokenizer" in capsys.readouterr().out


def test_run_folder_holds_stacked_weights_config_and_tokenizer(source, converted):
    params = unflatten_dict(open_checkpoint(converted).host_params(), sep="/")
    weights = tensors_in(source)
    q_proj = params["layers"]["self_attn"]["q_proj"]["weight"]
    assert q_proj.dtype == weights["model.norm.weight"].dtype
    for layer in range(2):
        np.testing.assert_array_equal(q_proj[layer], weights[f"model.layers.{layer}.self_attn.q_proj.weight"])
    assert open_checkpoint(converted).model == read_config(source)
    assert fingerprint(converted / "tokenizer") == fingerprint(source)
    assert (converted / "tokenizer" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


def test_shards_respect_the_size_and_the_index_names_every_tensor(converted, tmp_path):
    assert run("to-hf", converted, tmp_path / "out", "--max-shard-size", "20KB") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    total = 0
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights = load_file(file)
        assert {index["weight_map"][name] for name in weights} == {file.name}
        size = sum(value.nbytes for value in weights.values())
        assert size <= 20_000
        total += size
        with safe_open(file, "numpy") as content:
            assert content.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


def test_export_in_another_dtype_rounds_once(converted, source, tmp_path):
    assert run("to-hf", converted, tmp_path / "wide", "--dtype", "float32") == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    for name, value in tensors_in(source).items():
        np.testing.assert_array_equal(tensors_in(tmp_path / "wide")[name], value.astype(np.float32))


def test_export_of_a_step_is_that_step(converted, tmp_path, capsys):
    two = Path(shutil.copytree(converted, tmp_path / "run"))
    params = jax.tree.map(lambda x: x + 1, unflatten_dict(open_checkpoint(converted).host_params(), sep="/"))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))  # as training saves: each device its part
    params = jax.device_put(params, parameter_shardings(params, mesh))
    write_model(tmp_path / "other", params, to_plain(open_checkpoint(converted).model))
    (tmp_path / "other" / "checkpoints" / "0").rename(two / "checkpoints" / "7")

    assert run("to-hf", two, tmp_path / "newest") == 0
    assert run("to-hf", two, tmp_path / "first", "--step", 0) == 0
    newest, first = tensors_in(tmp_path / "newest"), tensors_in(tmp_path / "first")
    np.testing.assert_array_equal(newest["model.norm.weight"], first["model.norm.weight"] + 1)
    capsys.readouterr()
    assert run("to-hf", two, tmp_path / "none", "--step", 3) == 2
    assert capsys.readouterr().err == f"error: {two} has no checkpoint of step 3: it has 0, 7\n"

    (two / "checkpoints" / "7" / "commit_success.txt").unlink()
    assert run("to-hf", two, tmp_path / "older") == 0
    said = f"warning: {two}: step 7 lacks commit_success.txt, so it is still being written, or was cut off or damaged; "
    assert f"{said}step 0, the newest that is whole, is taken" in "".join(capsys.readouterr())
    assert_same_tensors(tmp_path / "older", tmp_path / "first")
    (two / "checkpoints" / "0" / "commit_success.txt").unlink()
    assert run("to-hf", two, tmp_path / "none") == 1
    assert "holds no whole checkpoint: step 0, 7 lack commit_success.txt" in capsys.readouterr().err


def test_a_run_on_a_mesh_of_eight_exports_on_one_cpu(world, tmp_path):
    config = config_of(world, tmp_path / "run", steps=1, mesh=MeshConfig(fsdp=4, tensor=2))
    train(config)
    alone = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    program = [sys.executable, "-m", "tools.convert_hf", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]
    subprocess.run(program, env=alone, check=True, capture_output=True)
    exported = stacked_weights(open_hf(tmp_path / "out"))
    trained = open_checkpoint(tmp_path / "run").host_params()
    assert exported.keys() == trained.keys()
    for path, value in trained.items():
        np.testing.assert_array_equal(exported[path], value, err_msg=path)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2"])
def test_models_stored_for_a_mesh_load_on_any(tmp_path, mesh):
    source = make_hf_folder(tmp_path / "hf", hidden=64, heads=(8, 8), layers=2, vocab=96, tokenizer=False)
    assert run("from-hf", source, tmp_path / "run", "--mesh", mesh) == 0
    expected = stacked_weights(open_hf(source))
    for sizes in ({"fsdp": 1}, {"fsdp": 4, "tensor": 2}, {"data": 8}):
        there = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[: np.prod(list(sizes.values()))])
        model = load_model(open_checkpoint(tmp_path / "run"), PrecisionConfig(compute="float32"), there)
        for path, value in flatten_dict(model.params, sep="/").items():
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize("mesh", ["fsdp", "fsdp=0", "rows=2", "fsdp=2;tensor=2"])
def test_meshes_that_are_none(source, tmp_path, capsys, mesh):
    assert run("from-hf", source, tmp_path / "run", "--mesh", mesh) == 2
    assert "sizes of axes are expected, such as fsdp=16,tensor=4" in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_says_what(source, tmp_path, capsys):
    assert run("from-hf", source, tmp_path / "run", "--mesh", "tensor=5") == 2
    assert "does not divide by mesh.tensor 5" in capsys.readouterr().err
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("options", [("int8",), ("int4",), ("nf4",), ("nf4", "--double-quantization")])
@pytest.mark.parametrize("mesh", [(), ("--mesh", "fsdp=2")])
def test_quantised_on_the_way_is_as_quantised_in_training(tmp_path, options, mesh):
    source = make_hf_folder(tmp_path / "hf", hidden=128, layers=2, vocab=96, dtype="bfloat16", tokenizer=False)
    assert run("from-hf", source, tmp_path / "whole") == 0
    assert run("from-hf", source, tmp_path / "quantised", "--quantize", *options, *mesh) == 0
    adapter = AdapterConfig(base=options[0], double_quantization=len(options) > 1)
    config = open_checkpoint(tmp_path / "whole").model
    plan = abstract_model(
        config, PrecisionConfig(compute="bfloat16"), make_mesh(MeshConfig(fsdp=2, data=4)), adapter=adapter
    )
    first, second = (load_base(plan, open_checkpoint(tmp_path / name))[0] for name in ("whole", "quantised"))
    first, second = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    assert first.keys() == second.keys()
    for path, value in first.items():
        assert value.dtype == second[path].dtype
        np.testing.assert_array_equal(value, second[path], err_msg=path)
    stored = [open_checkpoint(tmp_path / name).open_arrays().values() for name in ("whole", "quantised")]
    sizes = [sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays) for arrays in stored]
    assert sizes[1] < 0.7 * sizes[0]


def test_quantised_models_are_exported_as_what_they_stand_for(tmp_path):
    source = make_hf_folder(tmp_path / "hf", hidden=64, layers=1, vocab=96, tokenizer=False)
    assert run("from-hf", source, tmp_path / "run", "--quantize", "int8") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 0
    before, after = tensors_in(source), tensors_in(tmp_path / "out")
    for name, value in before.items():
        if name.endswith("_proj.weight"):
            assert 0 < np.abs(after[name] - value).max() < 0.01 * np.abs(value).max()
        else:
            np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--double-quantization",), "give --quantize too"),
        (("--base-storage", "nf4"), "give --base too"),
        (("--quantize", "nf4"), "blocks of 64 don't divide its rows"),
        (("--part", "0/2"), "--part 0/2"),
        (("--part", "half"), "--part half"),
        (("--part", "1/99999999999999999"), "--part 1/99999999999999999"),
    ],
)
def test_options_that_make_no_sense(source, tmp_path, capsys, options, message):
    assert run("from-hf", source, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_transformers_loads_the_export_with_the_same_logits(source, converted, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assert run("to-hf", converted, tmp_path / "out", "--max-shard-size", "20KB") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The patient has a fever. 患者は発熱"
    assert encode_plain(tokenizer, [text]) == encode_plain(load_tokenizer(source), [text])
    assert tokenizer.chat_template == load_tokenizer(source).chat_template

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_theta"] == 10_000.0
    assert config.dtype == torch.bfloat16

    tokens = torch.tensor([encode_plain(tokenizer, [text])[0]])
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, tmp_path / "out")
    )
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    assert after.generation_config.eos_token_id == [0, 2]


# --- config.json ---------------------------------------------------------------------------------------------------


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
    assert "head_dim" not in config_json(CONFIG, "float32", {})
    assert config_json(CONFIG, "float32", {"eos_token_id": 3})["eos_token_id"] == 3


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
    ],
)
def test_configs_that_are_refused(broken, tmp_path, capsys, changes, message):
    content = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | changes))
    assert_refused(broken, tmp_path, capsys, message)


def assert_refused(source, tmp_path, capsys, message) -> None:
    """Exit code 2, one line on stderr, and nothing left behind."""
    before = names_in(tmp_path)
    assert run("from-hf", source, tmp_path / "target") == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings)
    assert message in error
    assert len(error) < 500
    assert names_in(tmp_path) == before


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


# --- folders that are refused --------------------------------------------------------------------------------------


def rewrite(change):
    """Breaks a folder by what `change` makes of its tensors."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        write_weights(folder, weights)

    return apply


def reindex(change, *, shards: int = 2):
    """Breaks a folder of shards by what `change` makes of (folder, weight_map)."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_weights(folder, weights, shards)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def larger_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 200}))
    rewrite(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:200].copy()}))(folder)


def padded_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 284}))


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def frequencies(theta: float) -> np.ndarray:
    """What old checkpoints keep as `rotary_emb.inv_freq`, for heads of 8."""
    return (1.0 / theta ** (np.arange(0, 8, 2) / 8)).astype(np.float32)


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SECOND = "model-00002-of-00002.safetensors"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut short": (lambda folder: (folder / "config.json").write_text('{"vocab'), "is not JSON"),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "a JSON object is expected, found a list",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors file"),
    "pickles only": (pickles_only, "only pytorch_model.bin: pickle files are refused"),
    "shards without index": (no_index, "no model.safetensors.index.json"),
    "truncated": (truncate, "is not a whole safetensors file"),
    "missing tensor": (rewrite(lambda w: w.pop(Q_PROJ)), f"missing tensors: {Q_PROJ}"),
    "extra tensor": (rewrite(lambda w: w.update(extra=w[Q_PROJ])), "does not have: extra"),
    "head though tied": (
        rewrite(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        "lm_head.weight differs from the embedding though config.json sets tie_word_embeddings",
    ),
    "frequencies of another base": (
        rewrite(lambda w: w.update({INV_FREQ: frequencies(20_000.0)})),
        f"{INV_FREQ} has other frequencies than rope_theta 10000 gives",
    ),
    "blocks without end": (
        lambda folder: change_config(folder, num_hidden_layers=20_000_000),
        "config.json: model.num_hidden_layers is 20000000: it must be at least 1 and at most 1,000",
    ),
    "a config that is a folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "config.json is a folder",
    ),
    "a config 100,000 deep": (
        lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "config.json is not JSON",
    ),
    "a number of 5,000 digits": (
        lambda folder: (folder / "config.json").write_text('{"vocab_size": ' + "1" * 5000 + "}"),
        "config.json is not JSON",
    ),
    "generation config cut short": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 0'),
        "generation_config.json is not JSON",
    ),
    "generation config of another model": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0, 288]}'),
        "eos_token_id is [0, 288]: token ids below vocab_size 288 are expected",
    ),
    "a licence that is a link": (
        lambda folder: (folder / "LICENSE").symlink_to("/etc/hostname"),
        "LICENSE is a link to /etc/hostname, which is outside the folder",
    ),
    "a licence in bytes": (
        lambda folder: (folder / "LICENSE").write_bytes(b"\xff\xfe"),
        "LICENSE: not UTF-8 text at byte 0",
    ),
    "transposed": (
        rewrite(lambda w: w.update({Q_PROJ: w[Q_PROJ][:, :16].copy()})),
        f"{Q_PROJ} has shape [32, 16], config.json asks for [32, 32]",
    ),
    "two dtypes": (rewrite(lambda w: w.update({Q_PROJ: w[Q_PROJ].astype(np.float32)})), f"{Q_PROJ} is F32"),
    "integers": (
        rewrite(lambda w: w.update({k: v.astype(np.int8) for k, v in w.items()})),
        "is I8: only F32, BF16, F16",
    ),
    "missing shard": (reindex(lambda folder, _: (folder / SECOND).unlink()), f"{SECOND} missing"),
    "index leaves the folder": (
        reindex(lambda _, names: names.update({Q_PROJ: "../model.safetensors"})),
        f"{Q_PROJ} is in '../model.safetensors'",
    ),
    "index with an absolute path": (reindex(lambda _, names: names.update({Q_PROJ: "/x.safetensors"})), Q_PROJ),
    "index names a pickle": (reindex(lambda _, names: names.update({Q_PROJ: "x.bin"})), "'x.bin'"),
    "index of another file": (
        reindex(lambda _, names: names.update({k: SECOND for k in names if k == "model.embed_tokens.weight"})),
        "does not say where model.embed_tokens.weight is",
    ),
    "index empty": (reindex(lambda _, names: names.clear()), "weight_map is empty"),
    "index and a single file": (
        reindex(lambda folder, _: save_file({"x": np.ones(1)}, folder / "model.safetensors")),
        "remove one of them",
    ),
    "vocabulary padded otherwise": (padded_vocabulary, "padded to 288 rows there, and vocab_size is 284"),
    "tokenizer of another model": (larger_tokenizer, "they belong to different models"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_are_refused(broken, tmp_path, capsys, case):
    change, message = BROKEN[case]
    change(broken)
    assert_refused(broken, tmp_path, capsys, message)


def test_tensors_that_say_nothing_new_are_taken(source, broken):
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies(10_000.0).astype(np.float16)}
    extra |= {INV_FREQ: frequencies(10_000.0), "lm_head.weight": tensors_in(source)["model.embed_tokens.weight"]}
    rewrite(lambda w: w.update(extra))(broken)
    ours, theirs = (stacked_weights(open_hf(folder)) for folder in (broken, source))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)


HEADERS = {
    "longer than the file": (b"\xff" * 8, "its header should have 18446744073709551615 bytes"),
    "no JSON": (b"{]", "is not JSON"),
    "a list": (b"[]", "a JSON object is expected"),
    "a name twice": (b'{"a":{},"a":{}}', "the key 'a' stands twice"),
    "no fields": (b'{"a":7}', "is not a whole safetensors file"),
    "no offsets": (b'{"a":{"dtype":"F32","shape":[2]}}', "is not a whole safetensors file"),
    "text for offsets": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}', "than whole numbers"),
    "backwards": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "is not where the tensor before it ends"),
    "one over another": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "'b' is not where the tensor before it ends",
    ),
    "beyond the end": (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "bytes and has"),
    "a shape without end": (
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}',
        "which is not what its shape (4294967296, 4294967296, 4294967296) takes",
    ),
    "a negative shape": (b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}', "than whole numbers"),
    "a shape of words": (b'{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}', "than whole numbers"),
    "deep": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "is not a whole safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(tmp_path, case):
    header, message = HEADERS[case]
    data = header if case == "longer than the file" else len(header).to_bytes(8, "little") + header
    file = tmp_path / "x.safetensors"
    file.write_bytes(data + bytes(8))
    with pytest.raises(UserError) as raised:
        read_header(epath.Path(file))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_links_into_a_hub_cache_are_followed(source, tmp_path):
    """As `huggingface_hub` keeps models: the files in blobs, and links to them in a snapshot of each revision."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert run("from-hf", snapshot, tmp_path / "run") == 0
    carried = tmp_path / "run" / "tokenizer" / "generation_config.json"
    assert not carried.is_symlink() and carried.read_bytes() == (source / "generation_config.json").read_bytes()


# --- checksums, and weights that are no numbers --------------------------------------------------------------------


def write_sums(folder: Path) -> None:
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


SUMS = {
    "flipped": (flip, "SHA256SUMS says"),
    "missing": (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json missing, which"),
    "no sum": (
        lambda folder: (folder / "SHA256SUMS").write_text("config.json\n"),
        "SHA256SUMS:1: 'config.json': a sha",
    ),
    "elsewhere": (
        lambda folder: (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../hostname\n"),
        "the name of a file beside it are expected",
    ),
}


@pytest.mark.parametrize("case", SUMS)
def test_folders_that_are_not_what_their_sums_say(broken, tmp_path, capsys, case):
    change, message = SUMS[case]
    write_sums(broken)
    change(broken)
    assert_refused(broken, tmp_path, capsys, message)


def test_files_without_a_sum_are_said(broken, tmp_path, capsys):
    write_sums(broken)
    (broken / "notes.txt").write_text("mine")
    assert run("from-hf", broken, tmp_path / "run") == 0
    assert "not in SHA256SUMS, so not checked: notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_no_numbers_are_counted(dtype):
    values = np.random.default_rng(0).standard_normal((3, 700_001)).astype(DTYPES[dtype])
    assert non_finite(values) == (0, 0)
    values[0, :5], values[2, -3:], values[1, 7] = np.nan, np.inf, -np.inf
    assert non_finite(values) == (5, 4)
    assert non_finite(values[:, ::2]) == (3, 2)


def odd_weights(folder: Path) -> None:
    rewrite(lambda w: (w[Q_PROJ].__setitem__((0, slice(3)), np.nan), w[NORM].__setitem__(0, -np.inf)))(folder)


NORM = "model.norm.weight"


def test_weights_that_are_no_numbers_pass_only_if_asked_for(broken, tmp_path, capsys):
    odd_weights(broken)
    said = f"in 2 tensors: {Q_PROJ} (3 NaN), {NORM} (1 infinite); --allow-non-finite takes them as they are\n"
    assert run("from-hf", broken, tmp_path / "run") == 2
    assert said in capsys.readouterr().err
    assert run("from-hf", broken, tmp_path / "run", "--resume") == 2  # what was odd is looked at again
    assert said in capsys.readouterr().err
    assert run("from-hf", broken, tmp_path / "run", "--resume", "--allow-non-finite") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert run("to-hf", tmp_path / "run", tmp_path / "out", "--resume", "--allow-non-finite") == 0
    assert_same_tensors(broken, tmp_path / "out")


def test_what_float16_cannot_hold_is_counted(broken, tmp_path, capsys):
    rewrite(lambda w: w[Q_PROJ].__setitem__((0, slice(2)), 7e4))(broken)
    assert run("from-hf", broken, tmp_path / "run") == 0
    assert run("to-hf", tmp_path / "run", tmp_path / "out", "--dtype", "float16") == 2
    error = capsys.readouterr().err
    assert f"in 1 tensors: {Q_PROJ} (2 infinite); float16 can't hold all of bfloat16: give another --dtype" in error
    assert error.count("\n") == 1


def test_a_missing_source_is_refused(tmp_path, capsys):
    assert_refused(tmp_path / "nowhere", tmp_path, capsys, "no folder at")


# --- targets -------------------------------------------------------------------------------------------------------


def test_a_target_that_holds_something_stays_as_it_was(source, converted, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    for verb, start in (("from-hf", source), ("to-hf", converted)):
        assert run(verb, start, tmp_path) == 2
        assert "exists and is not empty" in capsys.readouterr().err
    assert run("to-hf", converted, tmp_path, "--overwrite") == 2
    assert "is not a Hugging Face folder" in capsys.readouterr().err
    assert names_in(tmp_path) == ["note.txt"]


def test_overwrite_replaces_a_hugging_face_folder_whole(source, converted, tmp_path):
    make_hf_folder(tmp_path / "out", shards=2, vocab=64, tokenizer=False)
    assert run("to-hf", converted, tmp_path / "out", "--overwrite") == 0
    assert_same_tensors(source, tmp_path / "out")
    assert names_in(tmp_path) == ["out"]


def test_an_empty_target_is_filled(converted, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("to-hf", converted, tmp_path / "out") == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_export_of_what_is_no_run(source, tmp_path, capsys):
    assert run("to-hf", source, tmp_path / "out") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("7", 7), ("500kb", 500_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "0", "5TB", "9" * 400])
def test_sizes_that_are_refused(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)


# --- verify --------------------------------------------------------------------------------------------------------


def test_verify_agrees_on_both_sides_of_a_conversion(source, converted, capsys):
    assert run("verify", source, converted, "--prompt", "The patient has a fever", "--prompt", "Hello") == 0
    out = capsys.readouterr().out
    assert "hash: 26 and 26 tensors, none differing" in out
    assert "second, here" in out
    assert "first, transformers" in out or "torch is not installed" in out
    assert out.endswith("agree\n")


def test_verify_finds_one_changed_value(source, converted, tmp_path, capsys):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    rewrite(lambda w: w[Q_PROJ].__setitem__((3, 5), w[Q_PROJ][3, 5] + 1))(other)
    assert run("verify", converted, other, "--by", "hash") == 1
    out = capsys.readouterr().out
    assert "1 differing" in out
    assert f"{Q_PROJ}: other values" in out
    assert run("verify", converted, other, "--by", "logits", "--random-tokens", 16) == 1
    assert capsys.readouterr().out.endswith("DIFFER\n")


def test_verify_finds_another_dtype_and_another_shape(source, converted, tmp_path, capsys):
    assert run("to-hf", converted, tmp_path / "wide", "--dtype", "float32") == 0
    assert run("verify", source, tmp_path / "wide", "--by", "hash") == 1
    assert "bfloat16 and float32" in capsys.readouterr().out
    make_hf_folder(tmp_path / "deep", dtype="bfloat16", layers=3, tokenizer=False)
    assert run("verify", source, tmp_path / "deep", "--by", "hash") == 1
    out = capsys.readouterr().out
    assert "num_hidden_layers 2 and 3" in out
    assert "only in the second" in out


def test_verify_of_neither_kind(source, tmp_path, capsys):
    assert run("verify", source, tmp_path) == 2
    assert "neither a Hugging Face checkpoint" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom medllm_jax.cli.convert import main\n"
        "try: main(['from-hf', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'transformers', 'orbax', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "tools.convert_hf", "from-hf", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no folder at")

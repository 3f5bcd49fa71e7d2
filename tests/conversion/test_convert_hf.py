import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import load_base, load_model
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.config.load import to_plain
from medllm_jax.config.schema import AdapterConfig, MeshConfig, ModelConfig, PrecisionConfig
from medllm_jax.conversion.hf_config import read_config
from medllm_jax.conversion.hf_weights import open_hf
from medllm_jax.conversion.names import WEIGHTS, parameter_shapes, tensors_of
from medllm_jax.conversion.to_hf import parse_size
from medllm_jax.conversion.verify import stacked_weights
from medllm_jax.data.tokenizer import encode_plain, fingerprint, load_tokenizer
from medllm_jax.distributed.sharding import make_mesh, parameter_shardings
from medllm_jax.errors import UserError
from medllm_jax.model.abstract import abstract_model
from medllm_jax.training.loop import train
from tests.conversion.hf_folders import Q_PROJ, assert_same_tensors, names_in, rewrite, run, tensors_in
from tests.tiny_hf import make_hf_folder
from tests.training.test_train import config_of

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


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


def test_a_folder_of_the_other_format_is_told_by_the_verb_that_takes_it(source, converted, tmp_path, capsys):
    out = tmp_path / "out"
    wrong = {
        ("to-hf", source, out): f"it is in Hugging Face's format; `medllm convert from-hf {source} RUN` makes",
        ("to-hf", tmp_path / "gone", out): "gone holds no checkpoint: nothing is there; a run folder",
        ("from-hf", converted, out): "it is a run folder; `medllm convert to-hf` exports it",
        ("from-hf", source, out, "--base", converted): "leave --base out to convert a whole model",
    }
    for arguments, expected in wrong.items():
        assert run(*arguments) == 2
        assert expected in capsys.readouterr().err
    assert not out.exists()


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

"""The model card and the notice say what run folders, stores and exam results record, and nothing of the machine."""

import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from flax.traverse_util import unflatten_dict

from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.write_model import write_model
from medllm_jax.cli.convert import main
from medllm_jax.config.load import load_model_config, to_plain
from medllm_jax.config.schema import AdapterConfig, DataConfig, InitConfig, ModelConfig, ObjectiveConfig, RunConfig
from medllm_jax.conversion import card
from medllm_jax.conversion.card import licence_of
from medllm_jax.conversion.history import history_of
from medllm_jax.conversion.names import parameter_shapes
from medllm_jax.errors import UserError
from medllm_jax.evaluation.evaluate import evaluate
from medllm_jax.storage.run_folder import record_config
from tests.data.stores import numbered_rows, write_rows
from tests.evaluation.test_evaluate import BOTH, EXAM, TEMPLATE, Model, asked_of
from tests.tiny import make_tokenizer

SHAPE = ModelConfig(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
STEP = 30


def documents(checkpoint, **more):
    return card.documents(checkpoint, history=history_of(checkpoint), **more)


@pytest.fixture
def place(tmp_path):
    """A converted model, a CPT run on it and an RPO run on that, with results of two steps; nothing was trained."""
    from etils import epath

    write_rows(tmp_path / "texts", numbered_rows(8), corpora={"guidelines": 5, "left out": 3})
    write_rows(tmp_path / "pairs", numbered_rows(4, kind="pairs"), kind="pairs", corpora={"pairs": 4})
    write(tmp_path / "start", source={"name": "Qwen/Qwen2.5-7B"})
    cpt = config_of(tmp_path, "cpt", "start", "texts", mix={"guidelines": 1.0, "left out": 0.0})
    rpo = config_of(tmp_path, "rpo", "cpt", "pairs", objective=ObjectiveConfig(name="rpo", beta=0.2))
    for config in (cpt, rpo):
        write(Path(config.run), config=to_plain(config))
        record_config(epath.Path(config.run), config)
    for step in (STEP, STEP - 1):
        model = asked_of(Model({"q1": "b"}), where=f"{rpo.run}@{step}")
        evaluate(EXAM, TEMPLATE, BOTH, model, epath.Path(rpo.run) / "evaluation" / f"at {step}")
    return tmp_path


def config_of(root, name, start, store, *, mix=None, **changes):
    data = DataConfig(store=str(root / store), mix=mix, batch_size=4)
    return RunConfig(
        run=str(root / name), steps=40, data=data, init=InitConfig(str(root / start)), model=SHAPE, **changes
    )


def write(run, **meta):
    params = {path: jnp.ones(shape) for path, shape in parameter_shapes(SHAPE).items()}
    write_model(run, unflatten_dict(params, sep="/"), to_plain(SHAPE), **meta)
    if "config" in meta:
        (run / "checkpoints" / "0").rename(run / "checkpoints" / str(STEP))
    make_tokenizer(run / "tokenizer")


def test_tells_the_whole_history(place):
    files = documents(open_checkpoint(place / "rpo", STEP), adapter=False, parameters=1234567)
    text = files["README.md"]
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["base_model"] == "Qwen/Qwen2.5-7B"
    assert "A model made from Qwen/Qwen2.5-7B" in body
    assert "Not for clinical use" in body
    assert f"| cpt | {STEP} | 4 |" in body
    assert "RPO: dpo, beta 0.2, alpha 1, NLL by sequence" in body
    assert "1,234,567 parameters" in body
    assert "| guidelines | cpt | 5 |" in body
    assert "| pairs | rpo | 4 |" in body
    assert "left out" not in body  # its weight is 0
    assert body.count("| small |") == 1  # of the other step there are results too
    assert str(place) not in text + files["NOTICE"]
    assert "\n\n\n" not in text
    assert files == documents(open_checkpoint(place / "rpo", STEP), adapter=False, parameters=1234567)


def test_says_what_is_not_at_hand(place):
    (place / "texts").rename(place / "elsewhere")
    text = documents(open_checkpoint(place / "rpo", STEP), adapter=False, parameters=1)["README.md"]
    assert "The manifest of the store texts, of cpt, was not at hand" in text
    (place / "cpt" / "checkpoints").rename(place / "gone")
    text = documents(open_checkpoint(place / "rpo", STEP), adapter=False, parameters=1)["README.md"]
    assert "a model of unknown name" in text
    assert "What came before the first of these stages is not known here" in text
    assert "base_model" not in text


def test_of_a_model_that_was_only_converted(place):
    text = documents(open_checkpoint(place / "start", 0), adapter=False, parameters=1)["README.md"]
    assert "nothing was trained" in text
    assert "## Exams" not in text


def test_results_are_added_by_their_folders(place):
    evaluate(EXAM, TEMPLATE, BOTH, asked_of(Model({})), (place / "other"))
    text = documents(
        open_checkpoint(place / "start", 0), adapter=False, parameters=1, evaluations=[str(place / "other")]
    )
    assert "| small | other |" in text["README.md"]
    for wrong in ("rpo", "texts"):
        with pytest.raises(UserError, match="exam results"):
            documents(
                open_checkpoint(place / "start", 0), adapter=False, parameters=1, evaluations=[str(place / wrong)]
            )


def test_adapters_are_described_and_loaded_as_such(place):
    adapted = config_of(place, "lora", "start", "texts", adapter=AdapterConfig(rank=8, base="nf4", rslora=True))
    write(place / "lora", config=to_plain(adapted))
    text = documents(open_checkpoint(place / "lora", STEP), adapter=True, parameters=1)["README.md"]
    assert "PeftModel.from_pretrained" in text
    assert "library_name: peft" in text
    assert "rank 8, alpha 32, scale 11.3137 (rsLoRA)" in text
    assert "trained on a base in nf4, exported alone" in text
    assert (
        "exported merged" in documents(open_checkpoint(place / "lora", STEP), adapter=False, parameters=1)["README.md"]
    )


@pytest.mark.parametrize(
    ("size", "licence", "must_say"),
    [
        ("7b", "apache-2.0", "Apache License 2.0"),
        ("3b", "other", "Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud"),
        ("72b", "other", "Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud"),
        ("tiny", "other", "whatever that is"),
    ],
)
def test_licence_is_that_of_the_published_model_of_this_shape(place, size, licence, must_say):
    shape = load_model_config(Path("configs/model") / f"qwen2.5-{size}.yaml")
    assert licence_of(shape).front["license"] == licence
    checkpoint = open_checkpoint(place / "rpo", STEP)
    checkpoint.model = shape
    notice = documents(checkpoint, adapter=False, parameters=1)["NOTICE"]
    assert notice.startswith("Built with Qwen\n")
    assert must_say in notice
    assert "No copy of the licence was beside the weights" in notice


def test_every_published_shape_has_its_licence():
    shapes = [load_model_config(file) for file in Path("configs/model").glob("*b.yaml")]
    assert len(shapes) == 7
    assert all(licence_of(shape) is not card._UNKNOWN for shape in shapes)


def test_of_random_weights_nothing_is_said_of_qwen(place):
    drawn = config_of(place, "drawn", "start", "texts")
    write(place / "drawn", config=to_plain(drawn) | {"init": {"checkpoint": None}})
    files = documents(open_checkpoint(place / "drawn", STEP), adapter=False, parameters=1)
    assert "made from random weights" in files["README.md"]
    assert "Qwen" not in files["NOTICE"]


def test_licence_and_notice_travel_with_the_model(place, capsys):
    (place / "rpo" / "tokenizer" / "LICENSE").write_text("the licence\n")
    (place / "rpo" / "tokenizer" / "NOTICE").write_text("somebody's notice\n")
    start, texts = str(place / "rpo"), []
    for turn in range(2):
        out, again = place / f"out{turn}", place / f"again{turn}"
        assert main(["to-hf", start, str(out)]) == 0
        assert (out / "LICENSE").read_text() == "the licence\n"
        texts.append((out / "NOTICE").read_text())
        assert main(["from-hf", str(out), str(again)]) == 0
        start = str(again)
    assert all(text.endswith("with those weights:\n\nsomebody's notice\n") for text in texts)
    assert [text.count("Built with Qwen") for text in texts] == [1, 1]
    assert "See NOTICE and LICENSE." in (place / "out0" / "README.md").read_text()
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=place / "out1", capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("warning: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["two\nlines", "a\u2028b", '"); import os; ("', "", "a|b", "x" * 300])
def test_base_names_that_are_none(place, capsys, name):
    assert main(["to-hf", str(place / "rpo"), str(place / "out"), "--base-name", name]) == 2
    error = capsys.readouterr().err
    assert "a name in one line" in error and error.count("\n") == 1 and len(error) < 250
    assert not (place / "out").exists()


def test_a_run_that_names_itself_as_its_beginning_ends(place):
    config = config_of(place, "circle", "circle", "texts")
    write(place / "circle", config=to_plain(config))
    text = documents(open_checkpoint(place / "circle", STEP), adapter=False, parameters=1)["README.md"]
    assert "What came before the first of these stages is not known here" in text

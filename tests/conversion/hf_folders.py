"""Folders in Hugging Face's format, converted, broken and compared."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from medllm_jax.cli.convert import main
from tests.tiny_hf import write_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


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


def rewrite(change):
    """Breaks a folder by what `change` makes of its tensors."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        write_weights(folder, weights)

    return apply


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))

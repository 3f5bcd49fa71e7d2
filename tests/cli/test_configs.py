"""`medllm configs`: shipped configs are found, shown and copied, and copies work."""

import pytest

from medllm_jax.cli import main
from medllm_jax.config.load import load_run_config
from medllm_jax.config.shipped import shipped_configs


def test_all_are_listed_with_what_they_are_for(capsys):
    assert main(["configs", "list"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in printed.splitlines() if line.startswith("  ")]
    names = [name for name, _ in lines]
    assert names == [name for kind in ("runs", "model", "rounds") for name in shipped_configs(kind)]
    assert all(len(about) > 20 for _, about in lines)
    assert names.index("qwen2.5-7b") < names.index("qwen2.5-14b") < names.index("qwen2.5-72b"), "by size"


def test_a_copy_is_the_same_config_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in shipped_configs("runs"):
        assert main(["configs", "copy", f"runs/{name}"]) == 0
        assert load_run_config(f"{name}.yaml") == load_run_config(name)
    assert main(["configs", "copy", "qwen2.5-7b", "own.yaml"]) == 0
    assert (tmp_path / "own.yaml").read_text() == shipped_configs("model")["qwen2.5-7b"].read_text()
    capsys.readouterr()
    assert main(["configs", "show", "qwen2.5-7b"]) == 0
    assert capsys.readouterr().out == (tmp_path / "own.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["copy", "cpt-tiny"], "cpt-tiny.yaml exists"),
        (["copy", "cpt-tiny", "no/such/folder/x.yaml"], "can't be written: No such file"),
        (["show", "rpo-tiny"], "say runs/rpo-tiny or rounds/rpo-tiny"),
        (["show", "cpt-tniy"], "did you mean cpt-tiny"),
        (["show", "zzz"], "see `medllm configs list`"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpt-tiny.yaml").write_text("mine")
    assert main(["configs", *words]) == 2
    assert line in capsys.readouterr().err and (tmp_path / "cpt-tiny.yaml").read_text() == "mine"

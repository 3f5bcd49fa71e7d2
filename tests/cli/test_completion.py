"""`medllm completion`: shells complete verbs, options and settings by what is printed."""

import shutil
import subprocess

import pytest

from medllm_jax.cli import completion, main


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_what_is_printed_is_a_script_of_that_shell(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "from-hf" in script and "optimizer.learning_rate" in script
    if shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(script)
        subprocess.run([shell, "-n", file], check=True)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("medllm tr", "train"),
        ("medllm convert to", "to-hf"),
        ("medllm train --conf", "--config"),
        ("medllm train --optimizer.lea", "--optimizer.learning_rate"),
        ("medllm data cpt --packing best", "best_fit"),
        ("medllm train --config fi", "file.yaml"),
    ],
)
def test_bash_completes(typed, offered, capsys, tmp_path):
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "file.yaml").touch()
    words = typed.split()
    program = (
        f"source ./script; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        f"$(complete -p medllm | sed 's/.*-F \\([^ ]*\\).*/\\1/') medllm {words[-1]} {words[-2]}; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert offered in done.stdout.split()

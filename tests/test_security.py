"""What must never be in the code: ways in for what a file or a hub holds to run, and ways out for secrets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from medllm_jax.config.load import to_yaml
from tests.training.test_train import config_of

ROOT = Path(__file__).parents[1]
FILES = sorted(file for room in ("medllm_jax", "tools", "launch", "benchmarks") for file in (ROOT / room).rglob("*.py"))
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
# A call -> what it must be told, as it is written.
MUST_SAY = {
    "np.load": ("allow_pickle", "False"),
    "torch.load": ("weights_only", "True"),
}
NEVER = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"}


def problems_in(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in NEVER:
                yield name
            if name in MUST_SAY and said.get(MUST_SAY[name][0]) != MUST_SAY[name][1]:
                yield f"{name} without {'='.join(MUST_SAY[name])}"
            if said.get("trust_remote_code", "False") != "False" or said.get("shell", "False") != "False":
                yield f"{name} with {said}"
            if "from_pretrained" in name and "AutoModel" in name + source and said.get("use_safetensors") == "False":
                yield f"{name} of pickled weights"
            if name == "yaml.load" and not any("Loader" in ast.unparse(argument) for argument in node.args[1:]):
                yield "yaml.load without a safe loader"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_what_a_file_holds(file):
    assert list(problems_in(file.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "torch.load(file)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_rule_sees_what_it_forbids(source):
    assert list(problems_in(source))


@pytest.mark.long
def test_secrets_of_the_environment_are_nowhere(world, tmp_path, monkeypatch):
    """In no file of a run that fails, nor in what it prints, even where an error speaks of one."""
    monkeypatch.setenv("HF_TOKEN", "hf_ThisIsNotForYourEyes")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/secret/place/key.json")
    (tmp_path / "run.yaml").write_text(to_yaml(config_of(world, tmp_path / "run", steps=2)))
    code = (
        "import os, sys, medllm_jax.observability.progress as p\n"
        "def fail(*_): raise RuntimeError('401 with ' + os.environ['HF_TOKEN'])\n"
        "p.Progress.summarise = fail\n"
        "from medllm_jax.cli import main\n"
        "try: main(['train', '--config', sys.argv[1]])\n"
        "except RuntimeError: sys.exit(7)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 7, done.stderr
    (report,) = (tmp_path / "run" / "crashes").iterdir()
    assert "401 with [hidden]" in report.read_text()
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 10
    for secret in ("hf_ThisIsNot", "0123456789abcdef0123", "secret/place"):
        assert secret not in done.stdout + done.stderr
        assert not [file for file in written if secret.encode() in file.read_bytes()]

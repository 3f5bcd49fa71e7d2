"""What a wheel installs: `medllm_jax` alone, which works from a folder that has other things of the same names."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = re.compile(r"\.(yaml|jinja|sha256|sh|typed)$")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tree, built without a network and without a trace in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    for name in ("medllm_jax", "configs", "tools", "launch", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    done = subprocess.run([*pip, "--no-build-isolation", "-w", folder, tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def medllm(wheel, tmp_path_factory):
    """The console command of a fresh environment, run in a folder with packages named like ours: text -> output."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    python = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
    # The dependencies of this environment; a .pth in a folder that a .pth names is not followed, so an editable
    # installation of the tree is not among them.
    (own,) = (place / "venv").glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    elsewhere = place / "elsewhere"
    for name in ("tools", "launch", "configs"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise ImportError('a package of somebody else')\n")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*arguments):
        command = [place / "venv" / "bin" / "medllm", *map(str, arguments)]
        environment = {**kept, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import medllm_jax; print(medllm_jax.__file__)"
    found = subprocess.run([python, "-c", where], cwd=elsewhere, env=kept, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == own / "medllm_jax" / "__init__.py"
    return run


def test_it_holds_the_package_and_all_its_data_alone(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"medllm_jax"}
    here = {str(file.relative_to(ROOT)) for file in (ROOT / "medllm_jax").rglob("*") if "__pycache__" not in file.parts}
    here |= {f"medllm_jax/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
    wanted = {name for name in here if name.endswith(".py") or DATA.search(name)}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    for name in ("launching/run_on_host.sh", "conversion/card.md.jinja", "evaluation/igakuqa.sha256", "py.typed"):
        assert f"medllm_jax/{name}" in wanted


def test_verbs_work_from_any_folder(medllm):
    assert "{from-hf,to-hf,verify}" in medllm("convert", "--help")
    assert "--workdir" in medllm("demo", "--help")
    assert re.match(r"\d+\.\d+", medllm("--version"))
    where = ("--topology", "v5p:4x4x4", "--run", "gs://bucket/run", "--image", "image", "--dry-run", "--")
    paths = ("--init.checkpoint", "gs://bucket/model", "--data.store", "gs://bucket/store")
    printed = medllm("launch", "gke", "--config", "cpt-72b-v5p-4x4x4", *where, *paths)
    assert '"kind": "JobSet"' in printed and "hidden_size: 8192" in printed
    where = ("--topology", "v5p:4x4x4", "--run", "gs://bucket/run", "--image", "image", "--project", "p", "--zone", "z")
    printed = medllm("launch", "tpu-vm", "--config", "cpt-72b-v5p-4x4x4", *where, "--dry-run", "--", *paths)
    (script,) = re.findall(r"scp .*?(\S+run_on_host\.sh)", printed)
    assert Path(script).is_file()


def test_a_shipped_config_trains_from_any_folder(medllm, world, tmp_path):
    small = ("--steps", 2, "--run", tmp_path / "run", "--data.store", world.token_store)
    assert f"trained: {tmp_path / 'run'}" in medllm("train", "--config", "cpt-tiny", *small)
    assert (tmp_path / "run" / "checkpoints").is_dir()

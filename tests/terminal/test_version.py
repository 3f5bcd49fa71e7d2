"""Which commit the code says it is of."""

import shutil
import subprocess
from pathlib import Path

import pytest

import medllm_jax
from medllm_jax.terminal import version
from medllm_jax.terminal.version import code_version

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's file in somebody's repository, as an installed wheel may be: its folder."""
    monkeypatch.delenv("MEDLLM_COMMIT", raising=False)
    folder = tmp_path / "repository" / "site-packages" / "medllm_jax"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "version.py"):
        shutil.copy(Path(version.__file__).with_name(name), folder)
    (tmp_path / "repository" / "theirs.txt").write_text("theirs")
    subprocess.run([*GIT, tmp_path / "repository", "init", "--quiet"], check=True)
    commit(tmp_path / "repository", "theirs.txt")
    monkeypatch.setattr(version, "__file__", str(folder / "version.py"))
    return folder


def commit(repository, *files):
    subprocess.run([*GIT, repository, "add", *files], check=True)
    subprocess.run([*GIT, repository, "commit", "--quiet", "--message", "it"], check=True)


def test_a_checkout_has_its_commit_and_says_that_it_was_changed(package):
    commit(package, "__init__.py", "version.py")
    named = subprocess.run([*GIT, package, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert code_version() == f"{medllm_jax.__version__}+{named[:12]}"
    (package / "__init__.py").write_text("changed = True")
    assert code_version() == f"{medllm_jax.__version__}+{named[:12]}-dirty"


def test_a_wheel_is_not_of_the_repository_that_it_lies_in(package):
    assert code_version() == medllm_jax.__version__


def test_an_image_has_the_commit_that_it_was_built_from(package, monkeypatch):
    monkeypatch.setenv("MEDLLM_COMMIT", "0123456789ab")
    assert code_version() == f"{medllm_jax.__version__}+0123456789ab"


def test_without_git_there_is_the_version_alone(package, monkeypatch):
    commit(package, "__init__.py")
    monkeypatch.setenv("PATH", "")
    assert code_version() == medllm_jax.__version__

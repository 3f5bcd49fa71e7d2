"""Fake launchers, and arguments of a launch that is right."""

import os

import pytest

from tests.launching.fakes import CONFIG, OWN, PLACES, Fakes


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return Fakes(folder)


@pytest.fixture
def arguments():
    """arguments(way, options, overrides) of a launch on a topology."""

    def make(
        way="gke", *options, overrides=PLACES, config=CONFIG, topology="v5p:4x4x4", run="gs://bucket/runs/cpt-72b"
    ):
        shared = ["--config", config, "--topology", topology, "--run", run, "--image", "registry.example/p/medllm:1"]
        return [way, *shared, *OWN[way], *options, "--", *overrides]

    return make

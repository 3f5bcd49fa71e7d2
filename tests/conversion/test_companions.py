import hashlib
import shutil
from pathlib import Path

import pytest

from tests.conversion.hf_folders import assert_refused, run


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


# --- checksums -----------------------------------------------------------------------------------------------------


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

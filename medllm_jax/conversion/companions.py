"""What stands beside weights: the tokenizer, generation_config.json, the licence, and SHA256SUMS of all of it.

All of it is judged before a conversion begins: what can't be used would else be found when a model is trained and
exported.
"""

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from medllm_jax.conversion.hf_weights import listed
from medllm_jax.data.tokenizer import load_tokenizer, named_token_ids, read_otherwise
from medllm_jax.errors import UserError, quoted
from medllm_jax.storage.json_files import parse_json, read_bounded, read_json
from medllm_jax.storage.remote import is_remote, is_there, names_in
from medllm_jax.storage.run_folder import TOKENIZER_FILES, copy_tokenizer
from medllm_jax.terminal.progress import Console

_log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
GENERATION = "generation_config.json"
_SUMS_BYTES = 4 << 20
_READ_BYTES = 16 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


# --- files that are copied -------------------------------------------------------------------------------------------


def check_companions(folder: epath.Path, vocab_size: int) -> bool:
    """Is there a tokenizer? UserError where it can't be loaded or has more tokens than the embedding, or where a file
    that goes where the model goes is not of its kind, or a link to what is not in the folder.
    """
    for name in TOKENIZER_FILES:
        if is_there(folder / name):
            _check_file(folder / name)
    if (folder / GENERATION).exists():
        read_generation(folder / GENERATION, vocab_size)
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        _log.info(f"{folder} has no tokenizer: the run folder will carry none, which is enough for training only")
        return False
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        said = f"the tokenizer has {len(tokenizer)} tokens, the embedding {vocab_size}"
        raise UserError(f"{folder}: {said}: they belong to different models")
    _check_alone(folder)
    text = read_otherwise(folder, tokenizer)
    if text is not None:
        _log.warning(
            f"warning: {folder}: transformers takes the tokenizer's class from config.json, and reads {quoted(text)} "
            "as other tokens than tokenizer.json, which is followed here"
        )
    return True


def _check_alone(folder: epath.Path) -> None:
    """UserError where the tokenizer can't be loaded from the files that are carried on: config.json is not of them."""
    with tempfile.TemporaryDirectory() as place:
        copy_tokenizer(folder, epath.Path(place))
        try:
            load_tokenizer(epath.Path(place) / "tokenizer")
        except UserError as error:
            reason = str(error).partition("loaded: ")[2] or str(error)
            raise UserError(
                f"{folder}: the tokenizer can't be loaded without config.json beside it: {reason}"
            ) from None


def _check_file(file: epath.Path) -> None:
    if not is_remote(file):
        _check_link(Path(file))
    content = read_bounded(file)
    if file.name.endswith(".json"):
        parse_json(content, str(file))
    elif not file.name.endswith(".model"):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text at byte {error.start}") from None


def _check_link(file: Path) -> None:
    """A file is copied into the run, and from there into exports: no link makes another file of this machine one of it.

    Hub caches keep their files in `blobs`, which links in `snapshots/<revision>` lead to.
    """
    folder, target = file.parent.resolve(), file.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if target.parent != folder and not in_cache:
        raise UserError(
            f"{file} is a link to {target}, which is outside the folder: put a copy of the file in its place"
        )


def read_generation(file: epath.Path, vocab_size: int) -> dict[str, object]:
    """generation_config.json, which is passed on as it is; UserError where it names tokens that can't be."""
    content = read_json(file)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        named_token_ids(content, key, str(file), vocab_size)
    return content


# --- checksums -------------------------------------------------------------------------------------------------------


def read_sums(folder: epath.Path) -> dict[str, str]:
    """File name -> sha256 (hex), as the SHA256SUMS of a folder has them; empty where there is none."""
    file = folder / SUMS
    if not is_there(file):
        return {}
    sums = {}
    for number, line in enumerate(read_bounded(file, _SUMS_BYTES).decode("utf-8", "replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        name = match[2].removeprefix("./") if match else ""
        if not match or name != Path(name).name or name == "..":
            raise UserError(
                f"{file}:{number}: {quoted(line)}: a sha256 and the name of a file beside it are expected, as "
                "sha256sum writes them"
            )
        if sums.setdefault(name, match[1]) != match[1]:
            raise UserError(f"{file}:{number}: {quoted(name)} stands twice, with two sums: keep one")
    return sums


def check_sums(folder: epath.Path, part: tuple[int, int] = (0, 1), *, whole: bool = True) -> None:
    """UserError where a file is missing or is not what SHA256SUMS says; says which files it says nothing of.

    part: (number, of): which share of the files this process reads. whole: all files that are listed must be there; of
    a repository on the hub, only those that are used are.
    """
    sums = read_sums(folder)
    if not sums:
        return
    present = names_in(folder)
    missing = sorted(sums.keys() - present)
    if missing and whole:
        raise UserError(f"{folder}: {listed(missing)} missing, which {SUMS} lists: copy the folder again")
    unlisted = sorted(present - sums.keys() - {SUMS})
    if unlisted:
        _log.info(f"{folder}: not in {SUMS}, so not checked: {listed(unlisted)}")
    sizes = {name: (folder / name).stat().length for name in sorted(sums.keys() & present)[part[0] :: part[1]]}
    done = 0
    with Console(f"checking {SUMS}", sum(sizes.values()), unit="bytes") as console:
        for name, size in sizes.items():
            found = hashlib.sha256()
            for block in _blocks(folder / name):
                found.update(block)
                done += len(block)
                console.update(done, name, every_seconds=10)
            if found.hexdigest() != sums[name]:
                raise UserError(
                    f"{folder / name} ({size:,} bytes) has sha256 {found.hexdigest()[:12]}, {SUMS} says "
                    f"{sums[name][:12]}: copy it again, or remove its line there if it was changed on purpose"
                )


def _blocks(file: epath.Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            yield block

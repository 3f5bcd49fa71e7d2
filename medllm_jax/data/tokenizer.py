"""Tokenizers: load one from a folder, say which one it is, and turn text into token ids.

Text is data: ``encode_plain`` never turns the *text* of a control token, such as ``<|im_end|>``, into the token itself,
so a document cannot end itself or open a chat turn. Only what a chat template wrote goes through ``encode_rendered``.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.remote import is_remote

# Any of these makes a folder a tokenizer; the order is the order in which they are hashed.
_VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")


def load_tokenizer(folder: str | epath.PathLike) -> Any:
    """The tokenizer in a folder (local or gs://), a ``transformers`` tokenizer; nothing is downloaded or executed.

    Raises UserError where the folder is missing or holds no tokenizer that can be loaded.
    """
    path = _require_tokenizer(folder)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    from transformers import AutoTokenizer  # slow to import

    with _local_copy(path) as local:
        try:
            return AutoTokenizer.from_pretrained(str(local), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many types, all meaning that these files are not usable
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the tokenizer in {path} cannot be loaded: {reason}") from error


def fingerprint(folder: str | epath.PathLike) -> str:
    """sha256 (hex) of what maps text to token ids; files that differ in formatting or chat template only are equal.

    Raises UserError where the folder holds no tokenizer.
    """
    path = _require_tokenizer(folder)
    digest = hashlib.sha256()
    if (path / "tokenizer.json").exists():
        try:
            content = json.loads((path / "tokenizer.json").read_bytes())
            merges = content["model"].get("merges")
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path / 'tokenizer.json'} is not a tokenizer file: {type(error).__name__}") from error
        # State of the last call, and two spellings of the same merges: neither changes what text becomes.
        content.pop("truncation", None)
        content.pop("padding", None)
        if merges:
            content["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        digest.update(json.dumps(content, sort_keys=True, ensure_ascii=True).encode())
        return digest.hexdigest()
    for name in _VOCABULARY_FILES:
        if (path / name).exists():
            content = (path / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as data: the text of a control token stays text. No special tokens are added."""
    if not texts:
        return []
    return _encode(tokenizer, texts, split_special_tokens=True)


def encode_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that a chat template wrote: control tokens count as such. No special tokens are added."""
    if not texts:
        return []
    return _encode(tokenizer, texts, split_special_tokens=False)


def _encode(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
    # verbose=False: a document longer than the model's context is no reason for a warning, it will be packed.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokenizer's control tokens, sorted."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}))


def _require_tokenizer(folder: str | epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    if not path.is_dir():
        raise UserError(f"no tokenizer folder at {path}: give the folder that holds tokenizer.json")
    if not any((path / name).exists() for name in ("tokenizer.json", *_VOCABULARY_FILES)):
        raise UserError(f"no tokenizer in {path}: expected tokenizer.json (or vocab.json and merges.txt) there")
    return path


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Iterator[Path]:
    """The folder itself, or for object storage, which transformers cannot read, a temporary copy of its small files."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in (*_FILES, *_VOCABULARY_FILES):
            if (path / name).exists():
                (Path(folder) / name).write_bytes((path / name).read_bytes())
        yield Path(folder)

"""Tokenizers: loading one, identifying it, and turning text into token ids.

Text is data: ``encode_plain`` never turns the *text* of a control token, such as ``<|im_end|>``, into the token itself,
so a document cannot end itself or open a chat turn. ``encode_rendered`` is for text that a chat template wrote.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_file, is_folder, is_remote

_SENTENCEPIECE = "tokenizer.model"
# A folder with any of these holds a tokenizer; they are hashed in this order.
_VOCABULARY_FILES = ("vocab.json", "merges.txt", _SENTENCEPIECE, "added_tokens.json")
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "config.json")
# Beside one of these a SentencePiece model is not the whole tokenizer, and transformers puts them together.
_MORE_THAN_A_MODEL = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def load_tokenizer(path: str | epath.PathLike) -> Any:
    """The tokenizer of a folder or of a SentencePiece file ``*.model``, local or gs://.

    A ``transformers`` tokenizer; or ``SentencePieceTokenizer`` for a .model file, and for a folder that has only a
    tokenizer.model. Nothing is downloaded or executed.

    Raises UserError where there is no tokenizer, or none that can be loaded.
    """
    path = _require_tokenizer(path)
    model = _lone_model(path)
    if model is not None:
        return SentencePieceTokenizer(model)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    from transformers import AutoTokenizer  # slow to import

    with _local_copy(path) as local:
        try:
            return AutoTokenizer.from_pretrained(str(local), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many types, all meaning that these files are not usable
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            hint = (
                f"; its SentencePiece model alone is {path / _SENTENCEPIECE}"
                if (path / _SENTENCEPIECE).exists()
                else ""
            )
            raise UserError(f"the tokenizer in {path} cannot be loaded: {reason}{hint}") from error


class SentencePieceTokenizer:
    """A SentencePiece model, with the part of a ``transformers`` tokenizer's interface that is used here.

    It has no chat template. The text of a control piece never becomes the piece. User-defined symbols are ordinary text
    to SentencePiece, and here too.
    """

    chat_template = None

    def __init__(self, file: epath.PathLike):
        """Raises UserError where the file is not a SentencePiece model."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=epath.Path(file).read_bytes())
        except RuntimeError as error:
            raise UserError(f"{file} cannot be loaded: it is not a SentencePiece model") from error
        ids = list(range(len(self)))
        # bool [vocabulary]: control pieces, and pieces that are one byte of a character.
        self.control = np.array(self._model.is_control(ids), bool)
        self.bytes = np.array(self._model.is_byte(ids), bool)
        self.bos_token_id = _known(self._model.bos_id())
        self.eos_token_id = _known(self._model.eos_id())

    def __len__(self) -> int:
        return self._model.get_piece_size()

    @property
    def all_special_tokens(self) -> list[str]:
        return self._model.id_to_piece(np.flatnonzero(self.control).tolist())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids, with control pieces as their names unless they are skipped."""
        parts = []
        for control, run in itertools.groupby(map(int, ids), key=self.control.__getitem__):
            if not control:
                parts.append(self._model.decode(list(run)))
            elif not skip_special_tokens:
                parts += self._model.id_to_piece(list(run))
        return "".join(parts)


def _known(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None  # SentencePiece gives -1 where there is none


def fingerprint(path: str | epath.PathLike) -> str:
    """sha256 (hex) of what maps text to token ids; formatting of the files and chat templates change nothing.

    A SentencePiece file has the fingerprint of a folder that holds only this file, as tokenizer.model.

    Raises UserError where there is no tokenizer.
    """
    path = _require_tokenizer(path)
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
    model = _lone_model(path)
    files = [(name, path / name) for name in _VOCABULARY_FILES] if model is None else [(_SENTENCEPIECE, model)]
    for name, file in files:
        if file.exists():
            content = file.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as data: the text of a control token stays text. No special tokens are added."""
    if not texts:
        return []
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode(texts)
    return _encode(tokenizer, texts, split_special_tokens=True)


def encode_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that a chat template wrote: control tokens are tokens. No special tokens are added.

    Raises UserError for a SentencePiece model: it has no chat template, so nothing can have been rendered for it.
    """
    if not texts:
        return []
    if isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError("a SentencePiece model has no chat template: use plain strings, or a tokenizer with a template")
    return _encode(tokenizer, texts, split_special_tokens=False)


def encode_prompts(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of prompts: either all are texts that a model continues, or all are chats that it answers.

    Raises UserError for messages where the tokenizer has no chat template, or one that refuses them.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        return encode_plain(tokenizer, texts)
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: put prompts as plain text, or give a tokenizer with one")
    import jinja2

    try:
        rendered = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in prompts]
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the prompts: {error}") from error
    return encode_rendered(tokenizer, rendered)


def _encode(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
    if tokenizer.is_fast:
        # Equal to calling the tokenizer, without the offsets and masks that nobody reads: they take half the time.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
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


def eos_of(tokenizer: Any, tokenizer_dir: str | epath.PathLike) -> int:
    """The id of the end-of-sequence token; UserError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {tokenizer_dir} has no end-of-sequence token: set eos_token in its config")
    return tokenizer.eos_token_id


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokenizer's control tokens, sorted."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tuple(sorted(tokenizer.all_special_tokens))
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*added, *tokenizer.all_special_tokens}))


def byte_pieces(tokenizer: Any) -> np.ndarray:
    """Which tokens are pieces of a character, bool [vocabulary]; control tokens and other added ones never are.

    In a byte-level vocabulary these are the tokens whose bytes alone are not valid UTF-8; in a vocabulary with byte
    fallback, the tokens such as ``<0xE3>``. Their share in a corpus measures how badly the vocabulary fits it.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.bytes
    vocabulary = tokenizer.get_vocab()
    is_piece = _is_part_of_a_character if _is_byte_level(tokenizer) else _BYTE_PIECE.fullmatch
    found = np.zeros(max(vocabulary.values()) + 1, bool)
    found[[token_id for token, token_id in vocabulary.items() if is_piece(token)]] = True
    found[list(tokenizer.added_tokens_decoder)] = False
    return found


def _is_byte_level(tokenizer: Any) -> bool:
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]))


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of the letters that a byte-level vocabulary is spelled in.

    Bytes that print in Latin-1 stand for themselves, the others follow from U+0100 on (GPT-2's bytes_to_unicode).
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printing)
    return {byte: byte for byte in printing} | {0x100 + place: byte for place, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _is_part_of_a_character(token: str) -> bool:
    if token.isascii():
        return False
    try:
        token.translate(_BYTE_ALPHABET).encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return True
    except UnicodeEncodeError:  # a token that is not spelled in bytes
        return False
    return False


def _require_tokenizer(path: str | epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    if path.name.endswith(".model") and is_file(path):
        return path
    if not is_folder(path):
        raise UserError(
            f"no tokenizer folder at {path}: give the folder that holds tokenizer.json, or a SentencePiece file *.model"
        )
    if not any((path / name).exists() for name in ("tokenizer.json", *_VOCABULARY_FILES)):
        raise UserError(
            f"no tokenizer in {path}: expected tokenizer.json (or vocab.json and merges.txt, or tokenizer.model) there"
        )
    return path


def _lone_model(path: epath.Path) -> epath.Path | None:
    """The SentencePiece model, where the tokenizer consists of nothing else."""
    if not is_folder(path):
        return path
    alone = not any((path / name).exists() for name in _MORE_THAN_A_MODEL)
    return path / _SENTENCEPIECE if alone and (path / _SENTENCEPIECE).exists() else None


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Iterator[Path]:
    """The folder itself; of one in object storage, which transformers can't read, a copy of the files it needs."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in (*_FILES, *_VOCABULARY_FILES):
            if (path / name).exists():
                (Path(folder) / name).write_bytes((path / name).read_bytes())
        yield Path(folder)

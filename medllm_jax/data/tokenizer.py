"""Tokenizers: loading one, identifying it, and turning text into token ids.

Text is data: ``encode_plain`` never turns the *text* of a control token, such as ``<|im_end|>``, into the token itself,
so a document cannot end itself or open a chat turn. ``encode_rendered`` is for text that a chat template wrote.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medllm_jax.data.deadline import DeadlineError, within
from medllm_jax.data.long_texts import LONG, encode_long
from medllm_jax.data.tokenizer_file import read_tokenizer_file
from medllm_jax.errors import UserError, first_line, quoted
from medllm_jax.storage.json_files import read_bounded, read_json
from medllm_jax.storage.json_lines import Row
from medllm_jax.storage.remote import is_file, is_folder, is_remote, is_there

_SENTENCEPIECE = "tokenizer.model"
# A folder with any of these holds a tokenizer; they are hashed in this order.
_VOCABULARY_FILES = ("vocab.json", "merges.txt", _SENTENCEPIECE, "added_tokens.json")
_log = logging.getLogger(__name__)

_TEMPLATE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_FILES = ("tokenizer.json", _CONFIG, "special_tokens_map.json", _TEMPLATE, "config.json")
# Beside one of these a SentencePiece model is not the whole tokenizer, and transformers puts them together.
_MORE_THAN_A_MODEL = ("tokenizer.json", _CONFIG, "vocab.json", "added_tokens.json")

# normalizer_spec { add_dummy_prefix: false }, as protobuf: appended to a SentencePiece model, it is merged into it.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_MAX_ADDED_CHARACTERS = 1000  # of an added token; those that are published have less than 100
_MAX_FILE_BYTES = 2**28  # the largest vocabularies that are published take an eighth of it

# Tokenizers that differ in anything but the vocabulary differ in the ids of one of these: case, accents, Unicode forms,
# widths, white space, digits, scripts, emoji, and how a text begins.
_PROBES = (
    "The patient's fever is 39.5°C; don't stop ASPIRIN 100mg/day.",
    "患者は38.5℃の発熱と、右下腹部痛を訴えている。",
    "答え: 胃癌である。",
    " leading, trailing ",
    "two  spaces\t\ttabs\r\n\r\n\n\n  lines\n",
    "\u3000全角　空白\xa0and\u2009thin",
    "ＡＢＣ１２３，：㎎㎡ﾊﾝｶｸ①½²ﬁⅣ",
    "\u304c \u304b\u3099 \xe9 e\u0301 \ufa19 \u795e \u212b",
    "1234567890 3.14 1,000,000 2026年11月26日",
    "🩺👩\u200d⚕️\u200b\ufeff\xad",
    "ΑΒΓ Привет ÀÉÎ ßſ İı",
    "def f(x_1):\n    return x_1 ** 2  # ~!@#$%^&*()",
    "<s></s><unk>▁Ġ##ing",
    "",
    " ",
    "\n",
)

# Parts of texts that tokenizers of words put a space between, or take one from.
_PARTS = (("答え:", "胃癌である。"), ("a", "b c"), ("a", " b"), ("a ", "b"))

_TEMPLATE_SECONDS = 10.0
_TEMPLATE_CHARACTERS = 2**20  # that a chat template may write beside the messages


def load_tokenizer(path: str | epath.PathLike) -> Any:
    """The tokenizer of a folder or of a SentencePiece file ``*.model``, local or gs://.

    A ``transformers`` tokenizer; or ``SentencePieceTokenizer`` for a .model file, and for a folder that has only a
    tokenizer.model. Nothing is downloaded or executed.

    Raises UserError where there is no tokenizer, or none that can be loaded, and where what was loaded does something
    else than the folder's tokenizer.json says.
    """
    path = _require_tokenizer(path)
    model = _lone_model(path)
    if model is not None:
        return SentencePieceTokenizer(model)
    if (path / _CONFIG).exists():
        _check_config(path / _CONFIG)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import

    with _local_copy(path) as local:
        try:
            file = local / "tokenizer.json"
            plain = read_tokenizer_file(file) if file.exists() else None
            kind = PreTrainedTokenizerFast if _follows_its_file(local) else AutoTokenizer
            tokenizer = kind.from_pretrained(str(local), local_files_only=True, trust_remote_code=False)
            stated = _stated_ids(plain, tokenizer)
        except BaseException as error:  # transformers raises many types, tokenizers' panics are not even Exceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = _reason(error)
            hint = (
                f"; its SentencePiece model alone is {path / _SENTENCEPIECE}"
                if (path / _SENTENCEPIECE).exists()
                else ""
            )
            raise UserError(f"the tokenizer in {path} cannot be loaded: {reason}{hint}") from error
    _check_added_tokens(tokenizer, path)
    _check_behaviour(tokenizer, stated, path)
    if (path / _TEMPLATE).exists() and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{path / _TEMPLATE} is empty: copy it again, or remove it")
    if (path / "tokenizer.json").exists() and not (path / _CONFIG).exists():
        _log.warning(
            f"warning: {path} has no tokenizer_config.json, which says what ends a text: "
            f"{quoted(getattr(tokenizer, 'eos_token', None))} is taken"
        )
    return tokenizer


def _reason(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:200]


# What tokenizer_config.json may say that transformers takes as it comes.
_TYPES: Mapping[str, Any] = {
    "model_max_length": int | float | None,
    **dict.fromkeys(("padding_side", "truncation_side", "tokenizer_class", "name_or_path", "errors"), str | None),
    **dict.fromkeys(("backend", "processor_class", "transformers_version"), str | None),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"), bool | None),
    **dict.fromkeys(("clean_up_tokenization_spaces", "legacy", "use_fast", "is_local"), bool | None),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), str | dict | None),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), list | dict | None),
    "added_tokens_decoder": dict | None,
    "chat_template": str | list | dict | None,
}


def _check_config(file: epath.Path) -> None:
    """UserError where a tokenizer_config.json has a setting of another type than transformers documents."""
    row = Row(read_json(file), str(file))
    for key, kind in _TYPES.items():
        row.get(key, kind, None)


def _follows_its_file(folder: Path) -> bool:
    """Whether tokenizer_config.json names the class that does what tokenizer.json says.

    `AutoTokenizer` would take the class of the model beside it, if config.json names one, and none in a run folder.
    """
    config, file = folder / _CONFIG, folder / "tokenizer.json"
    if not (config.exists() and file.exists()):
        return False
    return read_json(config).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")


def read_otherwise(folder: epath.PathLike, ours: Any) -> str | None:
    """A text that transformers, which asks config.json too, reads otherwise than `ours`, that folder's; or None."""
    from transformers import AutoTokenizer

    with _local_copy(epath.Path(folder)) as local:
        if not _follows_its_file(local):
            return None
        try:
            theirs = AutoTokenizer.from_pretrained(str(local), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many types
            raise UserError(f"{folder}: transformers can't read config.json ({_reason(error)})") from error
    both = zip(_PROBES, encode_plain(ours, _PROBES), encode_plain(theirs, _PROBES), strict=True)
    return next((text for text, here, there in both if here != there), None)


def _stated_ids(plain: Any, tokenizer: Any) -> list[list[list[int]]]:
    """The ids of each probe that a tokenizer.json allows, once it has the added tokens of the tokenizer; [] without it.

    plain: the ``tokenizers.Tokenizer`` of the file, or None. A class of transformers takes the vocabulary from the file
    and may bring its own normaliser and splitting.
    """
    if plain is None or not tokenizer.is_fast:
        return []
    plain.no_truncation()
    plain.no_padding()
    for token in tokenizer.added_tokens_decoder.values():
        plain.add_special_tokens([token]) if token.special else plain.add_tokens([token])
    plain.encode_special_tokens = True
    # A setting beside the file may have texts begin with a space, and changes nothing else.
    beginnings = ("", " ") if getattr(tokenizer, "add_prefix_space", False) else ("",)
    return [[plain.encode(begin + text, add_special_tokens=False).ids for begin in beginnings] for text in _PROBES]


def _check_added_tokens(tokenizer: Any, path: epath.Path) -> None:
    """UserError where one is a whole text: looking for it takes time that grows with the square of its length."""
    for number, token in tokenizer.added_tokens_decoder.items():
        if len(token.content) > _MAX_ADDED_CHARACTERS:
            raise UserError(
                f"the tokenizer in {path} has an added token of {len(token.content):,} characters (id {number}, "
                f"{quoted(token.content)}): at most {_MAX_ADDED_CHARACTERS:,} are read"
            )


def _check_behaviour(tokenizer: Any, stated: list[list[list[int]]], path: epath.Path) -> None:
    """UserError where ids are drawn by chance, or differ from those that tokenizer.json gives."""
    if tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise UserError(f"the tokenizer in {path} leaves out merges by chance: set dropout to null in tokenizer.json")
    if not stated:
        return
    for text, found, allowed in zip(_PROBES, encode_plain(tokenizer, _PROBES), stated, strict=True):
        if found not in allowed:
            raise UserError(
                f"{path / 'tokenizer.json'} and {type(tokenizer).__name__}, which is named beside it, read "
                f"{text[:20]!r} differently ({len(allowed[0])} tokens, {len(found)}): one of them is not the "
                'model\'s; where it is the class, set "tokenizer_class": "TokenizersBackend"'
            )


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
            content = read_bounded(epath.Path(file), _MAX_FILE_BYTES)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._continuing = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
            self._model.id_to_piece(list(range(len(self))))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be loaded: it is not a SentencePiece model") from error
        ids = list(range(len(self)))
        # bool [vocabulary]: control pieces, and pieces that are one byte of a character.
        self.control = np.array(self._model.is_control(ids), bool)
        self.bytes = np.array(self._model.is_byte(ids), bool)
        self.bos_token_id = _known(self._model.bos_id())
        self.eos_token_id = _known(self._model.eos_id())

    def __len__(self) -> int:
        return self._model.get_piece_size()

    def pieces(self) -> list[tuple[str, float, bool, bool]]:
        """Name and score of each token, and whether it is unknown or unused text."""
        ids = list(range(len(self)))
        of = self._model
        return list(zip(of.id_to_piece(ids), of.get_score(ids), of.is_unknown(ids), of.is_unused(ids), strict=True))

    @property
    def all_special_tokens(self) -> list[str]:
        return self._model.id_to_piece(np.flatnonzero(self.control).tolist())

    def encode(self, texts: Sequence[str], *, continued: bool = False) -> list[list[int]]:
        """Token ids; continued: of texts that go on after others, so that none begins with the space before a word."""
        return (self._continuing if continued else self._model).encode(list(texts))

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


def fingerprint(path: str | epath.PathLike, tokenizer: Any = None) -> str:
    """What identifies a tokenizer: a sha256 (hex) of what it does, "/", and one of its files; see ``same_tokenizer``.

    The first is of what maps text to token ids in the loaded tokenizer (``tokenizer``, where it is at hand): its
    vocabulary and merges, the ids of some texts that differ wherever tokenizers do, and the end-of-sequence token. How
    its files are written, chat templates, and tokens for padding change nothing in it. Older stores have the second
    alone.

    Raises UserError where there is no tokenizer, or none that can be loaded.
    """
    path = _require_tokenizer(path)
    tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
    return f"{_behaviour(tokenizer)}/{_hash_of_files(path)}"


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints are of tokenizers that do the same; of the files' hashes where one has nothing else."""
    if "/" in one and "/" in other:
        return one.partition("/")[0] == other.partition("/")[0]
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def _behaviour(tokenizer: Any) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        content: dict[str, Any] = {"pieces": tokenizer.pieces(), "plain": tokenizer.encode(_PROBES)}
    else:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        texts = [*_PROBES, *(f"a {token} b{token}\u3000{token}{token}\n" for token in added)]
        vocabulary = tokenizer.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)  # two lists are written sooner than a mapping
        content = {
            "tokens": tokens,
            "ids": [vocabulary[token] for token in tokens],
            "plain": encode_plain(tokenizer, texts),
            "rendered": encode_rendered(tokenizer, texts),
        }
        if tokenizer.is_fast:
            model = json.loads(tokenizer.backend_tokenizer.model.__getstate__())
            content["merges"] = [
                merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()
            ]
            content["scores"] = model["vocab"] if isinstance(model["vocab"], list) else None
    content["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_of_files(path: epath.Path) -> str:
    """sha256 (hex) of the files that hold the vocabulary."""
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


def named_token_ids(generation: Mapping[str, Any], key: str, where: str, vocab_size: int = 2**31) -> list[int]:
    """The ids that a generation_config.json gives under a key; UserError for others.

    There is one or none; of tokens that end a text there may be several.
    """
    value, several = generation.get(key), key == "eos_token_id"
    ids = [] if value is None else value if several and isinstance(value, list) and value else [value]
    if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
        expected = f"ids of tokens below {vocab_size} are" if several else f"the id of a token below {vocab_size} is"
        raise UserError(f"{where}: {key} is {quoted(value)}: {expected} expected")
    return ids


def end_of_turn(tokenizer: Any) -> int | None:
    """The control token that the chat template writes right after an assistant's message; None where it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    said = "1"
    try:
        turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": said}]
        _, found, rest = render_chat(tokenizer, turns).rpartition(said)
    except ChatTemplateError:
        return None  # what it is asked to render next will say so
    ids = encode_rendered(tokenizer, [rest])[0] if found else []
    added = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if added is not None and added.special else None


def encode_prompts(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of prompts: either all are texts that a model continues, or all are chats that it answers.

    Raises UserError for messages where the tokenizer has no chat template, or one that refuses them.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if len(texts) == len(prompts):
        return encode_plain(tokenizer, texts)
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: put prompts as plain text, or give a tokenizer with one")
    try:
        rendered = [render_chat(tokenizer, m, generation_prompt=True) for m in prompts if not isinstance(m, str)]
    except ChatTemplateError as error:
        raise UserError(f"the tokenizer's chat template {error}") from error
    return encode_rendered(tokenizer, rendered)


class ChatTemplateError(Exception):
    """A chat template cannot render messages; the message goes on from "the chat template"."""


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], *, generation_prompt: bool = False) -> str:
    """Messages as the tokenizer's chat template writes them, if asked with the beginning of the assistant's turn.

    Templates are programs that others wrote: one that takes more than a few seconds, or writes far more than it was
    given, is given up. Raises ChatTemplateError.
    """
    options = {"tokenize": False, "add_generation_prompt": generation_prompt}
    try:
        result = within(_TEMPLATE_SECONDS, lambda: tokenizer.apply_chat_template(messages, **options))
    except DeadlineError:
        raise ChatTemplateError(f"does not come to an end within {_TEMPLATE_SECONDS:g} s") from None
    except Exception as error:  # whatever a program can raise
        reason = f"{type(error).__name__}: {first_line(error, most=100)}"
        raise ChatTemplateError(f"cannot render the messages ({reason})") from error
    if len(result) > _TEMPLATE_CHARACTERS + 10 * sum(len(str(message["content"])) for message in messages):
        raise ChatTemplateError(f"writes {len(result):,} characters for a few")
    return result


def encode_parts(tokenizer: Any, examples: Sequence[Sequence[str]], *, rendered: bool) -> list[list[list[int]] | None]:
    """Token ids of the parts of some texts, each part by itself, so that no token spans two.

    rendered: whether a chat template wrote them, see ``encode_rendered``; else they are data, see ``encode_plain``.
    None for a text that its parts' tokens, one after the other, do not read as: tokenizers of words may begin every
    part with a space.
    """
    found = _encode_apart(tokenizer, examples, rendered)
    if all(_are_whole(tokenizer, _PARTS, _encode_apart(tokenizer, _PARTS, False), False)):
        return list(found)
    whole = _are_whole(tokenizer, examples, found, rendered)
    return [parts if is_whole else None for parts, is_whole in zip(found, whole, strict=True)]


def _encode_apart(tokenizer: Any, examples: Sequence[Sequence[str]], rendered: bool) -> list[list[list[int]]]:
    flat = [part for parts in examples for part in parts]
    encoded = encode_rendered(tokenizer, flat) if rendered else encode_plain(tokenizer, flat)
    if isinstance(tokenizer, SentencePieceTokenizer):
        encoded = iter(zip(encoded, tokenizer.encode(flat, continued=True), strict=True))
        return [[next(encoded)[number > 0] for number in range(len(parts))] for parts in examples]
    left = iter(encoded)
    return [list(itertools.islice(left, len(parts))) for parts in examples]


def _are_whole(
    tokenizer: Any, examples: Sequence[Sequence[str]], apart: Sequence[Sequence[Sequence[int]]], rendered: bool
) -> list[bool]:
    """Whether the parts' tokens read as those of the whole text."""
    joined = ["".join(parts) for parts in examples]
    encoded = encode_rendered(tokenizer, joined) if rendered else encode_plain(tokenizer, joined)
    return [
        tokenizer.decode([token for part in parts for token in part]) == tokenizer.decode(ids)
        for parts, ids in zip(apart, encoded, strict=True)
    ]


def _encode(tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
    if tokenizer.is_fast:
        # Equal to calling the tokenizer, without the offsets and masks that nobody reads: they take half the time.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        short = [text for text in texts if len(text) <= LONG]
        encoded = iter(backend.encode_batch_fast(short, add_special_tokens=False))
        return [next(encoded).ids if len(text) <= LONG else encode_long(backend, text) for text in texts]
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
    for file in (path / name for name in (*_FILES, *_VOCABULARY_FILES)):
        if is_there(file) and file.stat().length > _MAX_FILE_BYTES:
            raise UserError(f"{file} has more than {_MAX_FILE_BYTES // 2**20} MiB: that is no file of a tokenizer")
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
                (Path(folder) / name).write_bytes(read_bounded(path / name, _MAX_FILE_BYTES))
        yield Path(folder)

"""A corpus made up for benchmarks of data: the character mix, words and lengths of Japanese medical text, no meaning.

Words are drawn by Zipf's law from tens of thousands, as a byte-level vocabulary and the cache of a tokenizer meet them;
documents have log-normal lengths, a few of them very long. Everything is a function of the seed and the size.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = 40_000
_MEDIAN, _SIGMA = 800, 1.2  # characters of a document; one in a thousand has more than 32,000
_FILE_MEGABYTES = 50
_CHARACTERS_A_PAIR = 4.1  # of a word and what follows it
# What stands between words, with weights: particles, endings and punctuation.
_JOINTS = dict.fromkeys("やから（）", 1) | dict.fromkeys("でと", 6) | dict.fromkeys("はがにを", 9) | {"の": 20, "、": 8}
_JOINTS |= dict.fromkeys(("として", "による", "に対して", "を伴う", "が疑われ、", "が必要である。\n\n"), 1)
_JOINTS |= dict.fromkeys(("における", "を認め、", "とされる。", "を行った。", "と考えられる。\n", "を認める。\n"), 2)
_JOINTS |= dict.fromkeys(("した。", "である。"), 5)
_LATIN = ("CT", "MRI", "HbA1c", "CRP", "ACE", "mg/dL", "mmHg", "PCR", "IgG", "COPD", "DNA", "mL", "QOL", "ECG")
# Words that a scan for personal data has to look at, and finds to be none; among the first 500.
_LOOKED_AT = ("区別", "市販", "番号", "様々", "地区", "名称", "出生", "市中", "氏名", "生まれつき", "様子", "記号")
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Texts of about so many megabytes (of 10^6 bytes) of UTF-8."""
    rng = np.random.default_rng(seed)
    words = _vocabulary(np.random.default_rng(0))  # of the language, not of the corpus
    odds = 1 / (np.arange(len(words)) + 2.7)  # Zipf-Mandelbrot
    places = np.cumsum(odds / odds.sum())
    joints = np.array(list(_JOINTS), object)
    joint_places = np.cumsum(np.array(list(_JOINTS.values())) / sum(_JOINTS.values()))
    left = megabytes * 1e6
    while left > 0:
        pairs = max(1, int(rng.lognormal(np.log(_MEDIAN), _SIGMA) / _CHARACTERS_A_PAIR))
        parts = np.empty((pairs, 2), object)
        parts[:, 0] = words[np.minimum(np.searchsorted(places, rng.random(pairs)), len(words) - 1)]
        parts[:, 1] = joints[np.minimum(np.searchsorted(joint_places, rng.random(pairs)), len(joints) - 1)]
        text = "".join(parts.ravel().tolist()).strip()
        left -= len(text.encode())
        yield text


def _vocabulary(rng: np.random.Generator) -> np.ndarray:
    """Words, the most frequent first: mostly kanji, some katakana, hiragana, Latin letters and numbers."""
    kanji = rng.permutation(np.arange(0x4E00, 0x4E00 + 8000))[:2500]
    kana = {"katakana": np.arange(0x30A2, 0x30F4), "hiragana": np.arange(0x3042, 0x3094)}
    words: dict[str, None] = {}
    while len(words) < _WORDS:
        draw = rng.random()
        if draw < 0.62:  # the first kanji of the list are in most words
            places = (len(kanji) * rng.random(rng.integers(1, 5)) ** 2).astype(int)
            word = "".join(map(chr, kanji[places]))
        elif draw < 0.92:
            script = kana["katakana" if draw < 0.8 else "hiragana"]
            word = "".join(map(chr, rng.choice(script, rng.integers(2, 9))))
        elif draw < 0.96:
            word = f"{_LATIN[rng.integers(len(_LATIN))]}{rng.integers(100) if rng.random() < 0.5 else ''}"
        else:
            word = str(rng.integers(1, 1000) / 10 if rng.random() < 0.5 else rng.integers(1, 300))
        words[word] = None
        if len(words) % 40 == 20 and len(words) < 40 * len(_LOOKED_AT):
            words[_LOOKED_AT[len(words) // 40]] = None
    return np.array(list(words), object)


def write_corpus(folder: Path, megabytes: float) -> Path:
    """A folder with the documents as JSON lines, in files of about 50 MB of text."""
    folder.mkdir(parents=True)
    texts = documents(megabytes)
    for number in range(math.ceil(megabytes / _FILE_MEGABYTES)):
        left = _FILE_MEGABYTES * 1e6
        with (folder / f"{number:03}.jsonl").open("w", encoding="utf-8") as stream:
            while left > 0 and (text := next(texts, None)):
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                left -= len(text.encode())
    return folder


def train_tokenizer(folder: Path, vocab_size: int = 32_000, megabytes: float = 8) -> Any:
    """A byte-level BPE with Qwen2's normalisation and pre-tokenization, trained on such text; saved to the folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(megabytes, seed=1), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_SPECIAL_TOKENS[0],
        pad_token=_SPECIAL_TOKENS[0],
        extra_special_tokens=list(_SPECIAL_TOKENS[1:]),
    )
    tokenizer.save_pretrained(folder)
    return tokenizer

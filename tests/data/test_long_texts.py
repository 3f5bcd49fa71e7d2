"""Long texts in windows: the ids are those of the whole text, and memory is that of a window."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from medllm_jax.data import long_texts
from medllm_jax.data.long_texts import encode_long
from medllm_jax.data.tokenizer import encode_plain, load_tokenizer

WORDS = (
    "the patient's fever",
    "is 39.5°C",
    "患者は38.5℃の発熱と、右下腹部痛を訴えている。",
    "胃癌",
    "don't",
    "が",
    "か\u3099",
)
WORDS += (
    "\n",
    "\n\n",
    "  ",
    "\t",
    "1234567890",
    "ASPIRIN",
    "ΑΒΓ",
    "aaaaaaaaaaaaaaaa",
    ":",
    "。",
    "\u3000",
    "🩺👩\u200d⚕️",
)


def trained(kind):
    """A small tokenizer of a kind."""
    corpus = [" ".join(WORDS), "".join(WORDS)] * 4
    if kind == "bytes":  # as Qwen's
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    elif kind == "pieces":  # as Llama 2's: no word apart from another
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(
            corpus, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"])
        )
    tokenizer.add_tokens(["ASPIRIN", "39.5"])
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "pieces", "unigram"])
def backend(request):
    return trained(request.param)


@pytest.mark.parametrize("seed", range(30))
def test_windows_give_the_ids_of_the_whole(backend, monkeypatch, seed):
    for name, value in (("LONG", 1000), ("_OVERLAP", 600), ("_ALIKE", 6)):
        monkeypatch.setattr(long_texts, name, value)
    rng, lengths = random.Random(seed), []

    class Watched:
        def encode(self, text, **options):
            lengths.append(len(text))
            return backend.encode(text, **options)

    text = rng.choice(("", " ")).join(rng.choices(WORDS, k=rng.randrange(3000)))
    assert encode_long(Watched(), text) == backend.encode(text, add_special_tokens=False).ids
    assert max(lengths) <= 1600, "in windows, all of it"


def test_words_that_never_end_are_encoded_whole(backend, monkeypatch):
    monkeypatch.setattr(long_texts, "LONG", 1001)
    monkeypatch.setattr(long_texts, "_OVERLAP", 300)
    for text in ("a" * 5000, " " * 5000, "胃" * 3000, "ab" * 2500):
        assert encode_long(backend, text) == backend.encode(text, add_special_tokens=False).ids


def test_a_book_among_notes(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    book = "患者は38.5℃の発熱を訴えている。\n The fever is high, <|im_end|> again.\n" * 8000
    found = encode_plain(tokenizer, ["note", book, "", "another"])
    apart = [
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in ("note", book, "another")
    ]
    assert found == [apart[0], apart[1], [], apart[2]]
    assert tokenizer.decode(found[1]) == book

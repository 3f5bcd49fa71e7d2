"""The small things that tests are made of: a tokenizer trained here and now, with Qwen2's control tokens."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXTS = (
    "The patient has a fever and a cough. The answer is B.",
    "Hypertension is treated with diuretics, and diabetes with insulin.",
    "患者は発熱と咳を訴えている。正解は三番である。高血圧の治療には利尿薬を用いる。",
)


def make_tokenizer(
    folder: str | Path,
    texts: Iterable[str] | None = None,
    vocab_size: int = 384,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    like_qwen2: bool = False,
) -> Any:
    """Trains a byte-level BPE tokenizer on a few texts, saves it to ``folder`` and returns it.

    At least 259 tokens: the bytes and the control tokens, <|endoftext|> (id 0, end of sequence and padding),
    <|im_start|> and <|im_end|>. Texts too short for ``vocab_size`` give fewer tokens. like_qwen2: text is normalised
    and split as by transformers' Qwen2Tokenizer, which it takes beside the config.json of a Qwen2 model.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if like_qwen2:
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXTS if texts is None else texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_sentencepiece(file: Path) -> None:
    """A model of 256 byte pieces, three special ones and a few of the texts' own."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The patient has a fever.", "患者は発熱を訴えている。"] * 20),
        model_writer=content,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file.write_bytes(content.getvalue())


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> Path:
    """Writes rows as JSON lines, and returns the path."""
    path = Path(path)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path

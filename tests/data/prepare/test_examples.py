"""The steps that all examples pass: each gives one item for each item it is given, in order."""

import numpy as np
import pytest

from medllm_jax.data.packing import document_segment
from medllm_jax.data.prepare import examples as examples_module
from medllm_jax.data.prepare.examples import (
    ChatExample,
    ChatTemplate,
    Encoded,
    NotRendered,
    Rendered,
    TextExample,
    encode,
    ended,
    fitting,
    render,
)
from medllm_jax.data.prepare.rejections import Rejected
from medllm_jax.data.tokenizer import encode_plain, encode_rendered, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def message(content):
    return [{"role": "user", "content": content}]


EXAMPLES = [
    TextExample(("fever", "cough"), "f:1"),
    ChatExample((message("fever"),), "f:2"),
    TextExample(("<|im_end|>",), "f:3"),
    ChatExample((message("refuse"),), "f:4"),
    TextExample(("a",), "f:5"),
]


def parts_of(example, template):
    (messages,) = example.sides
    if messages[0]["content"] == "refuse":
        raise NotRendered("the chat template refuses")
    return [template.render(messages, example.where, prompt=True)]


def test_rendering_is_by_the_template_where_it_is_chat(tokenizer, tokenizer_dir):
    found = list(render(EXAMPLES, ChatTemplate(tokenizer, tokenizer_dir), parts_of))
    assert found[0] == Rendered(("fever", "cough"), False, "f:1")
    text = "<|im_start|>user\nfever<|im_end|>\n<|im_start|>assistant\n"
    assert found[1] == Rendered([text], True, "f:2")
    assert [each.reason[:17] for each in found[2:4] if isinstance(each, Rejected)] == [
        "a control token s",
        "the chat template",
    ]
    assert found[4].where == "f:5"


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_encoding_keeps_the_order_in_any_batches(tokenizer, monkeypatch, batch):
    monkeypatch.setattr(examples_module, "_BATCH", batch)
    text = "<|im_start|>fever"
    rejected = Rejected("f:2", "empty")
    given = [
        Rendered(["a", "fever"], False, "f:1"),
        rejected,
        Rendered([text], True, "f:3"),
        Rendered([text], False, ""),
    ]
    first, second, third, fourth = encode(iter(given), tokenizer)
    assert second is rejected and first.where == "f:1" and third.where == "f:3"
    assert [part.tolist() for part in first.parts] == encode_plain(tokenizer, ["a", "fever"])
    assert [part.tolist() for part in third.parts] == encode_rendered(tokenizer, [text])
    assert [part.tolist() for part in fourth.parts] == encode_plain(tokenizer, [text])
    assert len(third.parts[0]) < len(fourth.parts[0]), "a control token is one token only where a template wrote it"
    assert all(part.dtype == np.int32 for each in (first, third, fourth) for part in each.parts)
    assert isinstance(third, Encoded)


def test_ends_and_lengths():
    response = np.array([5, 6], np.int32)
    assert ended(response, 0).tolist() == [5, 6, 0] and ended(response, 0).dtype == np.int32
    assert ended(response, 6) is response
    assert ended(response[:0], 0).tolist() == [0]
    segment = document_segment(response)
    assert fitting(segment, 2, "f:1", "the pair is") is segment
    assert fitting(segment, 1, "f:1", "the pair is") == Rejected(
        "f:1", "the pair is longer than a row of 1 tokens", True, needs=(("--sequence-length", 2),)
    )


def test_masking_reaches_every_text():
    def mask(text):
        return text.replace("fever", "X")

    assert EXAMPLES[0].masked(mask) == TextExample(("X", "cough"), "f:1")
    assert EXAMPLES[1].masked(mask) == ChatExample((message("X"),), "f:2")
    assert EXAMPLES[1].texts() == ("fever",)

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from medllm_jax.data import tokenizer as tokenizer_module
from medllm_jax.data.loader import BatchStream
from medllm_jax.data.prepare.pii_gate import PiiGate
from medllm_jax.data.prepare.preference_pairs import prepare_pairs, read_pairs
from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.data.prepare.store_report import report
from medllm_jax.data.reference_log_probs import read_reference, write_reference
from medllm_jax.data.store import RowStore
from medllm_jax.data.tokenizer import encode_plain, encode_rendered, load_tokenizer
from medllm_jax.errors import UserError
from tests.data.stores import numbered_rows, write_rows
from tests.tiny import make_tokenizer, write_json_lines


def say(role, content):
    return {"role": role, "content": content}


def plain_rows(count):
    return [
        {
            "prompt": f"Question {n}: fever " + "and cough " * (n % 5),
            "chosen": f"Because of this, {n}. " * (1 + n % 3),
            "rejected": f"No {n}.",
            "source": "ignored",
        }
        for n in range(count)
    ]


def chat_rows(count):
    return [
        {
            "prompt": [say("system", "Be brief."), say("user", row["prompt"])],
            "chosen": [say("assistant", row["chosen"])],
            "rejected": [say("assistant", row["rejected"])],
        }
        for row in plain_rows(count)
    ]


def pairs_of(path):
    """(prompt, chosen, rejected) token ids of each pair of a store, row by row."""
    store = RowStore.open(path)
    unpacked = []
    for tokens, segments, branches in store.read(range(len(store))):
        pairs = []
        for number in range(1, segments.max() + 1, 2):
            mine = segments == number
            assert (np.diff(branches[mine]) >= 0).all(), "prompt, then chosen, then rejected"
            pairs.append(tuple(tuple(tokens[mine & (branches == branch)].tolist()) for branch in range(3)))
        unpacked.append(pairs)
    return unpacked


@pytest.mark.parametrize("pairs_per_row", [None, 1, 2])
def test_the_store_holds_the_pairs(tmp_path, tokenizer_dir, pairs_per_row):
    rows = plain_rows(23)
    file = write_json_lines(tmp_path / "pairs.jsonl", rows)
    progress = []
    found = prepare_pairs(
        file,
        tokenizer_dir,
        tmp_path / "store",
        256,
        pairs_per_row=pairs_per_row,
        progress=lambda *so_far: progress.append(so_far),
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    eos = tokenizer.eos_token_id

    def ids(text):
        return tuple(encode_plain(tokenizer, [text])[0])

    expected = Counter((ids(r["prompt"]), (*ids(r["chosen"]), eos), (*ids(r["rejected"]), eos)) for r in rows)
    unpacked = pairs_of(tmp_path / "store")
    assert Counter(pair for row in unpacked for pair in row) == expected
    most = max(map(len, unpacked))
    assert most == (pairs_per_row or most) and most > (0 if pairs_per_row else 2)
    assert (found.kind, found.packing, found.examples, found.pairs_per_row) == ("pairs", "pairs", 23, most)
    assert found.tokens == sum(len(part) for pair in expected.elements() for part in pair)
    assert progress[-1] == (23,)
    assert found.recipe["pairs_per_row"] == pairs_per_row and found.recipe["prompts"] == "shared"
    (listed,) = found.corpora[0].manifest["files"]
    assert listed["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"1 files of {listed['bytes']:,} bytes" in report(found)
    assert found == RowStore.open(tmp_path / "store").metadata


def test_messages_go_through_the_chat_template(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "pairs.jsonl", chat_rows(3) + plain_rows(2))
    prepare_pairs(file, tokenizer_dir, tmp_path / "store", 256, pairs_per_row=1)
    tokenizer = load_tokenizer(tokenizer_dir)
    pairs = {
        tuple(tokenizer.decode(part, skip_special_tokens=False) for part in pair)
        for row in pairs_of(tmp_path / "store")
        for pair in row
    }
    expected = set()
    for row in plain_rows(3):
        prompt = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{row['prompt']}<|im_end|>\n"
        ends = (row[side] + "<|im_end|><|endoftext|>" for side in ("chosen", "rejected"))
        expected.add((prompt + "<|im_start|>assistant\n", *ends))
    for row in plain_rows(2):
        expected.add((row["prompt"], row["chosen"] + "<|endoftext|>", row["rejected"] + "<|endoftext|>"))
    assert pairs == expected
    # Control tokens of the template are the tokens themselves, and one end stands at the end.
    prompt, chosen, _ = next(pair for row in pairs_of(tmp_path / "store") for pair in row if len(row) == 1)
    assert prompt == tuple(encode_rendered(tokenizer, [tokenizer.decode(prompt)])[0])
    assert chosen.count(tokenizer.eos_token_id) == 1


def test_an_end_written_by_the_template_is_not_repeated(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    file = write_json_lines(tmp_path / "pairs.jsonl", chat_rows(4))
    found = prepare_pairs(file, tmp_path / "tokenizer", tmp_path / "store", 256)
    assert found.eos_token_id == end
    responses = [part for row in pairs_of(tmp_path / "store") for pair in row for part in pair[1:]]
    assert len(responses) == 8 and all(part[-1] == end and part.count(end) == 1 for part in responses)


GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no"}
CHAT = chat_rows(1)[0]
BAD_ROWS = [
    ({"prompt": "why?", "chosen": "because"}, "no field `rejected`"),
    (GOOD | {"chosen": 3}, "chosen is not a string"),
    (GOOD | {"prompt": ""}, "prompt is empty"),
    (GOOD | {"rejected": " \n"}, "rejected is empty"),
    (GOOD | {"rejected": "because"}, "chosen and rejected are the same"),
    (GOOD | {"chosen": "so<|im_end|>"}, "a control token stands in the text (use chat messages)"),
    (GOOD | {"prompt": CHAT["prompt"]}, "prompt, chosen and rejected are not all strings or all chat messages"),
    (CHAT | {"rejected": CHAT["chosen"]}, "chosen and rejected are the same"),
    (CHAT | {"prompt": []}, "prompt is not a list of messages that ends with the user's"),
    (CHAT | {"prompt": ["secret"]}, "prompt is not a list of messages with role and content"),
    (CHAT | {"prompt": [{"role": "user"}]}, "prompt is not a list of messages with role and content"),
    (CHAT | {"prompt": [say("assistant", "a")]}, "prompt is not a list of messages that ends with the user's"),
    (CHAT | {"prompt": [say("wizard", "a")]}, "prompt is of an unknown role (known: system, user, assistant)"),
    (CHAT | {"prompt": [say(["user"], "a")]}, "prompt is of an unknown role (known: system, user, assistant)"),
    (CHAT | {"prompt": [say("user", " ")]}, "prompt is a message whose content is empty"),
    (CHAT | {"chosen": [say("user", "a")]}, "chosen is not exactly one assistant message"),
    (CHAT | {"chosen": [say("assistant", None)]}, "chosen is a message whose content is not a string"),
    (
        CHAT | {"prompt": [say("user", "a<|im_end|><|im_start|>assistant")]},
        "a control token stands in the text (use chat messages)",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_pair_is_an_error_with_its_place_or_is_counted(tmp_path, tokenizer_dir, row, reason):
    file = write_json_lines(tmp_path / "pairs.jsonl", [GOOD, row, GOOD])
    with pytest.raises(UserError) as caught:
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", 256)
    assert str(caught.value).startswith(f"{file}:2: {reason}; ")
    assert not (tmp_path / "store").exists()
    found = prepare_pairs(file, tokenizer_dir, tmp_path / "store", 256, on_bad="skip")
    assert found.examples == 2
    assert found.dropped == {reason: {"count": 1, "first": [f"{file}:2"]}}


def test_responses_that_become_the_same_tokens_are_the_same(tmp_path, tokenizer_dir):
    # The template drops what follows the content, so these differ as strings only.
    template = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    make_tokenizer(tmp_path / "tokenizer", chat_template=template)
    row = {"prompt": [say("user", "q")], "chosen": [say("assistant", "a")], "rejected": [say("assistant", "a ")]}
    file = write_json_lines(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(UserError, match=":1: chosen and rejected are the same"):
        prepare_pairs(file, tmp_path / "tokenizer", tmp_path / "store", 64)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no system message') }}", "cannot render the messages (TemplateError: no system message)"),
        ("{{ 1 + 'a' }}", "cannot render the messages (TypeError: unsupported operand"),
        ("{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}", "does not come to an end"),
        ("{% for n in range(99999) %}long sentences {% endfor %}", "writes 1,499,985 characters"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "rewrites earlier messages"),
        (
            "{% for m in messages %}<{{ m['content'].split('</think>')[-1] }}>{% endfor %}",
            "the chat template leaves out a part of the assistant's message",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}:{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}",
            "the chat template opens an answer with '<think>\\n', and this one otherwise",
        ),
    ],
    ids=["refuses", "fails", "endless", "huge", "rewrites the prompt", "cuts a part", "opens the answer"],
)
def test_templates_that_cannot_render_a_pair(tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr(tokenizer_module, "_TEMPLATE_SECONDS", 0.5)
    make_tokenizer(tmp_path / "tokenizer", chat_template=template)
    chat = CHAT | {"chosen": [{"role": "assistant", "content": "<think>...</think> A"}]}
    file = write_json_lines(tmp_path / "pairs.jsonl", [GOOD, chat])
    found = prepare_pairs(file, tmp_path / "tokenizer", tmp_path / "store", 64, on_bad="skip")
    assert found.examples == 1
    [(told, entry)] = found.dropped.items()
    assert reason in told and entry == {"count": 1, "first": [f"{file}:2"]}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_messages_without_a_chat_template(tmp_path, on_bad):
    make_tokenizer(tmp_path / "tokenizer", chat_template=None)
    file = write_json_lines(tmp_path / "pairs.jsonl", [GOOD, CHAT])
    with pytest.raises(UserError, match=r"pairs.jsonl:2 has chat messages, and the tokenizer in .* no chat template"):
        prepare_pairs(file, tmp_path / "tokenizer", tmp_path / "store", 64, on_bad=on_bad)


def test_over_long_pairs(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    rows = plain_rows(5)
    length = [sum(map(len, encode_plain(tokenizer, [r["prompt"], r["chosen"], r["rejected"]]))) + 2 for r in rows]
    prompt = [len(encode_plain(tokenizer, [r["prompt"]])[0]) for r in rows]
    file = write_json_lines(tmp_path / "pairs.jsonl", rows)
    assert prepare_pairs(file, tokenizer_dir, tmp_path / "exact", max(length)).examples == 5
    longest = length.index(max(length)) + 1
    assert length.count(max(length)) == 1
    reason = f"prompt, chosen and rejected together are longer than a row of {max(length) - 1} tokens"
    with pytest.raises(UserError) as caught:
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", max(length) - 1, on_bad="skip")
    assert str(caught.value).startswith(f"{file}:{longest}: {reason}; ")
    with pytest.raises(
        UserError, match=rf"5 rows are too long, first at .*; --sequence-length {max(length)} would take all"
    ):
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", min(length) - 1)
    found = prepare_pairs(file, tokenizer_dir, tmp_path / "store", max(length) - 1, on_long="skip")
    assert found.dropped == {reason: {"count": 1, "first": [f"{file}:{longest}"]}}

    limit = sorted(prompt)[2]
    found = prepare_pairs(file, tokenizer_dir, tmp_path / "short", max(length), max_prompt_tokens=limit, on_long="skip")
    assert found.examples == sum(n <= limit for n in prompt) < 5
    assert list(found.dropped) == [f"the prompt is longer than {limit} tokens"]


def test_all_bad_rows_are_counted_before_it_stops(tmp_path, tokenizer_dir):
    rows = [GOOD, {"prompt": "a"}, GOOD | {"chosen": 3}, {"prompt": "b"}, GOOD | {"chosen": "so<|im_end|>"}]
    file = write_json_lines(tmp_path / "pairs.jsonl", rows)
    counted = (
        r"pairs.jsonl:2: no field `chosen`; 3 of 5 rows are bad: 2 no field `chosen` \(first at .*:2, .*:4\), 1 chosen"
    )
    with pytest.raises(UserError, match=counted):
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", 64)
    assert not (tmp_path / "store").exists()


def test_nothing_left_to_prepare(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "pairs.jsonl", plain_rows(3))
    with pytest.raises(UserError, match=r"no pairs to prepare in .*3 prompt, chosen and rejected together"):
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", 4, on_long="skip")
    with pytest.raises(UserError, match="pairs_per_row is 0"):
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", 64, pairs_per_row=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_read_pairs_reads_in_order(tmp_path):
    file = write_json_lines(tmp_path / "pairs.jsonl", [GOOD | {"prompt": f"{n}"} for n in range(4)])
    rejections = RejectionCounts()
    pairs = list(read_pairs([file], "error", rejections))
    assert [pair.sides[0] for pair in pairs] == ["0", "1", "2", "3"]
    assert pairs[2].where == f"{file}:3" and rejections.total == 0


# Reference log-probabilities


@pytest.fixture
def pair_store(tmp_path):
    return write_rows(tmp_path / "pairs", numbered_rows(9, kind="pairs"), kind="pairs")


def values_for(store, seed=0):
    shape = (len(store), store.metadata.pairs_per_row, 2)
    return -np.random.default_rng(seed).random(shape, np.float32)


def test_reference_comes_back_for_its_model_and_pairs_alone(tmp_path, pair_store):
    first, second = values_for(pair_store, 1), values_for(pair_store, 2)
    write_reference(pair_store, "model a", first)
    write_reference(pair_store, "model b", second)
    assert np.array_equal(read_reference(pair_store, "model a"), first)
    read = read_reference(RowStore.open(pair_store.path), "model b")
    assert np.array_equal(read, second) and read.dtype == np.float32
    write_reference(pair_store, "model a", second)
    assert np.array_equal(read_reference(pair_store, "model a"), second)
    batch = next(BatchStream(pair_store, 4, 0, reference=read)).arrays
    assert np.array_equal(batch.reference_log_probs, second[batch.tokens[:, 0]])
    with pytest.raises(UserError, match="run `medllm reference`"):
        read_reference(pair_store, "model c")

    other = write_rows(tmp_path / "other", numbered_rows(9, kind="pairs")[::-1].copy(), kind="pairs")
    (pair_store.path / "reference").rename(other.path / "reference")
    with pytest.raises(UserError, match="run `medllm reference`"):
        read_reference(other, "model a")


def test_damaged_reference_is_refused(pair_store):
    write_reference(pair_store, "model", values_for(pair_store))
    (folder,) = (pair_store.path / "reference").iterdir()
    for name in ("values.npy", "reference.json"):
        content = (folder / name).read_bytes()
        for place in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[place] ^= 4
            (folder / name).write_bytes(damaged)
            with pytest.raises(UserError, match="damaged: run `medllm reference`"):
                read_reference(pair_store, "model")
        (folder / name).write_bytes(content)
    for broken in (b"[]", b"{", b"\xff"):
        (folder / "reference.json").write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            read_reference(pair_store, "model")
    write_reference(pair_store, "model", values_for(pair_store))
    (folder / "values.npy").unlink()
    with pytest.raises(UserError, match="damaged"):
        read_reference(pair_store, "model")


def test_reference_of_another_shape_is_refused(tmp_path, pair_store):
    values = values_for(pair_store)
    for wrong in (values[:-1], values[..., :1], values.astype(np.float64)):
        with pytest.raises(ValueError, match="needs float32"):
            write_reference(pair_store, "model", wrong)
    with pytest.raises(ValueError, match="not finite"):
        write_reference(pair_store, "model", values * np.float32(np.inf))
    documents = write_rows(tmp_path / "documents", numbered_rows(3))
    with pytest.raises(ValueError, match="holds no pairs"):
        write_reference(documents, "model", values)
    assert not (pair_store.path / "reference").exists()


def test_personal_data_in_pairs(tmp_path, tokenizer_dir):
    """All three sides are looked at, before anything is written; messages are masked inside."""
    number = "090-1234-5678"
    plain = {"prompt": "Whom to call?", "chosen": " nobody", "rejected": f" call {number}"}
    chat = {
        "prompt": [{"role": "user", "content": f"Is {number} right?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    file = write_json_lines(tmp_path / "rows.jsonl", [plain, chat])
    with pytest.raises(
        UserError, match=r"2 of 2 documents of the pairs .*2 phone \(first at .*rows.jsonl:1 char"
    ) as caught:
        prepare_pairs(file, tokenizer_dir, tmp_path / "store", 256)
    assert number not in str(caught.value) and not (tmp_path / "store").exists()
    found = prepare_pairs(file, tokenizer_dir, tmp_path / "store", 256, gate=PiiGate("mask"))
    assert found.corpora[0].manifest["personal_data"]["flagged"] == 2
    tokens = RowStore.open(tmp_path / "store").read([0])[0, 0]
    assert "1234" not in (text := load_tokenizer(tokenizer_dir).decode(tokens)) and "Whom to call?" in text

import pytest

from medllm_jax.data.batch import batch_of
from medllm_jax.data.prepare.instructions import prepare_instructions
from medllm_jax.data.prepare.pii_gate import PiiGate
from medllm_jax.data.store import RowStore
from medllm_jax.data.tokenizer import encode_plain, load_tokenizer
from medllm_jax.errors import UserError
from tests.tiny import make_tokenizer, write_json_lines


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def say(role, content):
    return {"role": role, "content": content}


CHAT = [say("system", "Be brief."), say("user", "Fever?"), say("assistant", "Rest."), say("user", "And a cough?")]
CHAT += [say("assistant", "See a doctor.")]


def learnt(store):
    """The tokens that are learnt, and those that are given, of each conversation of a store."""
    rows = store.read(range(len(store)))
    batch = batch_of(rows, "sft")
    assert not batch.branch_ids.any(), "a conversation is one sequence"
    for row in range(len(store)):
        for segment in range(1, batch.segment_ids[row].max() + 1, 2):
            mine = batch.segment_ids[row] == segment
            assert batch.positions[row, mine].tolist() == list(range(mine.sum()))
            weights = batch.loss_weights[row, mine] > 0
            yield batch.tokens[row, mine][weights], batch.tokens[row, mine][~weights]


def test_responses_are_learnt_and_prompts_are_not(tmp_path, tokenizer_dir):
    rows = [{"prompt": f"Q{n}: fever?", "response": f" Rest {n} days."} for n in range(5)]
    file = write_json_lines(tmp_path / "in.jsonl", rows)
    found = prepare_instructions(file, tokenizer_dir, tmp_path / "store", 64)
    assert (found.kind, found.examples) == ("sft", 5) and found.pairs_per_row > 1
    tokenizer = load_tokenizer(tokenizer_dir)
    expected = {
        (*encode_plain(tokenizer, [row["response"]])[0], tokenizer.eos_token_id): encode_plain(
            tokenizer, [row["prompt"]]
        )[0]
        for row in rows
    }
    store = RowStore.open(tmp_path / "store")
    assert {tuple(response.tolist()): prompt.tolist() for response, prompt in learnt(store)} == expected


def test_every_turn_of_the_assistant_is_learnt(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "in.jsonl", [{"messages": CHAT}])
    prepare_instructions(file, tokenizer_dir, tmp_path / "store", 256)
    tokenizer = load_tokenizer(tokenizer_dir)
    ((response, _),) = learnt(RowStore.open(tmp_path / "store"))
    said = tokenizer.decode(response, skip_special_tokens=False)
    assert "Rest." in said and "See a doctor." in said and "Fever" not in said and "cough" not in said
    assert response[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Q"}, "no field `response`"),
        ({"prompt": "Q", "response": ""}, "response is"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": CHAT[:-1]}, "end with the assistant's"),
        ({"messages": [say("doctor", "x"), CHAT[-1]]}, "unknown role"),
        ({"messages": [say("user", "x"), say("assistant", "")]}, "content is"),
        ({"prompt": "Q <|im_end|>", "response": "A"}, "control token"),
        ({"prompt": "fever " * 99, "response": "A"}, "longer than a row of 64"),
    ],
)
def test_what_is_no_conversation_is_one_line_or_a_count(tmp_path, tokenizer_dir, row, problem):
    good = {"prompt": "Q", "response": "A"}
    file = write_json_lines(tmp_path / "in.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"in.jsonl:2: .*{problem}"):
        prepare_instructions(file, tokenizer_dir, tmp_path / "store", 64)
    assert not (tmp_path / "store").exists()
    options = {"on_bad": "skip", "on_long": "skip"}
    found = prepare_instructions(file, tokenizer_dir, tmp_path / "store", 64, **options)
    assert found.examples == 1 and [dropped["count"] for dropped in found.dropped.values()] == [1]


def test_personal_data_stops_it_or_is_masked(tmp_path, tokenizer_dir):
    file = write_json_lines(tmp_path / "in.jsonl", [{"prompt": "電話 090-1234-5678", "response": "はい"}])
    with pytest.raises(UserError, match="personal data"):
        prepare_instructions(file, tokenizer_dir, tmp_path / "store", 64)
    prepare_instructions(file, tokenizer_dir, tmp_path / "store", 64, gate=PiiGate("mask"))
    ((_, given),) = learnt(RowStore.open(tmp_path / "store"))
    assert "5678" not in load_tokenizer(tokenizer_dir).decode(given)

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medllm_jax.data.prepare.instructions import instruction_forms, prepare_instructions
from medllm_jax.data.prepare.preference_pairs import pair_forms, prepare_pairs
from medllm_jax.data.store import RowStore
from medllm_jax.errors import UserError
from tests.tiny import write_json_lines


def say(role, content):
    return {"role": role, "content": content}


def turn(role, content):
    return {"from": role, "value": content}


PREPARE = {"sft": prepare_instructions, "pairs": prepare_pairs}


def rows_of(folder, tokenizer_dir, kind, rows, **options):
    """The rows of the store that rows of input become, and its recipe."""
    folder.mkdir()
    found = PREPARE[kind](write_json_lines(folder / "in.jsonl", rows), tokenizer_dir, folder / "store", 256, **options)
    store = RowStore.open(folder / "store")
    return store.read(range(len(store))).tolist(), found.recipe


def refusal(folder, tokenizer_dir, kind, row, **options):
    with pytest.raises(UserError) as caught:
        rows_of(folder / "refused", tokenizer_dir, kind, [row], **options)
    message = str(caught.value)
    assert "\n" not in message and not (folder / "refused" / "store").exists()
    return message.partition("in.jsonl:1: ")[2]


PLAIN = {"prompt": "Fever?\nOld man.", "response": "Rest."}
SYSTEM, ASK, ANSWER = say("system", "Be brief."), say("user", PLAIN["prompt"]), say("assistant", "Rest.")
BEFORE = [say("user", "Hello."), say("assistant", "Yes?")]
ALPACA = {"instruction": "Fever?", "input": "Old man.", "output": "Rest."}
SHARE_GPT = {"conversations": [turn("human", ASK["content"]), turn("gpt", "Rest.")]}
PAIR = {"prompt": "Fever?", "chosen": "Rest.", "rejected": "Run."}
GOOD, BAD = say("assistant", "Rest."), say("assistant", "Run.")
CHAT_PAIR = {"prompt": [SYSTEM, say("user", "Fever?")], "chosen": [GOOD], "rejected": [BAD]}
USER = CHAT_PAIR["prompt"]

# What each form says, in a form that was always read.
TWINS = {
    "Alpaca": ("sft", ALPACA, PLAIN, {}),
    "Alpaca without input": ("sft", {"instruction": PLAIN["prompt"], "input": "", "output": "Rest."}, PLAIN, {}),
    "Alpaca, nothing before": ("sft", ALPACA | {"system": "", "history": []}, PLAIN, {}),
    "Alpaca as chat": (
        "sft",
        ALPACA | {"system": "Be brief.", "history": [["Hello.", "Yes?"]]},
        {"messages": [SYSTEM, *BEFORE, ASK, ANSWER]},
        {"chat": True},
    ),
    "ShareGPT": ("sft", SHARE_GPT, {"messages": [ASK, ANSWER]}, {}),
    "ShareGPT with system": ("sft", SHARE_GPT | {"system": "Be brief."}, {"messages": [SYSTEM, ASK, ANSWER]}, {}),
    "TRL": ("sft", {"prompt": PLAIN["prompt"], "completion": "Rest."}, PLAIN, {}),
    "TRL, messages": (
        "sft",
        {"prompt": [SYSTEM, ASK], "completion": [ANSWER]},
        {"messages": [SYSTEM, ASK, ANSWER]},
        {},
    ),
    "strings as chat": ("sft", PLAIN, {"messages": [ASK, ANSWER]}, {"chat": True}),
    "columns": (
        "sft",
        {"q": PLAIN["prompt"], "a": "Rest.", "messages": 3},
        PLAIN,
        {"columns": {"prompt": "q", "response": "a"}},
    ),
    "two chats": ("pairs", {"chosen": [*USER, GOOD], "rejected": [*USER, BAD]}, CHAT_PAIR, {}),
    "two chats and their question": (
        "pairs",
        {"prompt": "Fever?", "chosen": [*USER, GOOD], "rejected": [*USER, BAD], "messages": [*USER, GOOD]},
        CHAT_PAIR,
        {},
    ),
    "ShareGPT pair": (
        "pairs",
        {
            "conversations": [turn("human", "Fever?")],
            "chosen": turn("gpt", "Rest."),
            "rejected": turn("gpt", "Run."),
            "system": "Be brief.",
        },
        CHAT_PAIR,
        {},
    ),
    "messages and answers": ("pairs", {"messages": USER, "chosen": GOOD, "rejected": BAD}, CHAT_PAIR, {}),
    "Alpaca pair": ("pairs", {"instruction": "Fever?", "chosen": "Rest.", "rejected": "Run."}, PAIR, {}),
    "pair as chat": ("pairs", PAIR | {"system": "Be brief."}, CHAT_PAIR, {"chat": True}),
    "pair columns": (
        "pairs",
        {"question": "Fever?", "good": "Rest.", "bad": "Run.", "prompt": "left aside"},
        PAIR,
        {"columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_form_gives_the_rows_of_its_twin(tmp_path, tokenizer_dir, name):
    kind, row, twin, options = TWINS[name]
    found, recipe = rows_of(tmp_path / "a", tokenizer_dir, kind, [row], **options)
    expected, plain = rows_of(tmp_path / "b", tokenizer_dir, kind, [twin])
    assert found == expected
    assert recipe == plain | options, "what rows depend on stands in the recipe, and nothing else does"


def test_of_a_prompt_and_its_completion_the_completion_is_learnt(tmp_path, tokenizer_dir):
    apart, _ = rows_of(tmp_path / "a", tokenizer_dir, "sft", [{"prompt": [*BEFORE, ASK], "completion": [ANSWER]}])
    whole, _ = rows_of(tmp_path / "b", tokenizer_dir, "sft", [{"messages": [*BEFORE, ASK, ANSWER]}])
    assert apart[0][0] == whole[0][0], "the same tokens"
    assert sum(map(bool, apart[0][2])) < sum(map(bool, whole[0][2])), "fewer of them learnt"


def test_forms_may_be_mixed_and_a_table_has_nulls(tmp_path, tokenizer_dir):
    rows = [ALPACA, SHARE_GPT, {"messages": [SYSTEM, ASK, ANSWER]}, PLAIN]
    expected, _ = rows_of(tmp_path / "lines", tokenizer_dir, "sft", rows)
    pq.write_table(
        pa.Table.from_pylist([dict.fromkeys(key for row in rows for key in row) | row for row in rows]),
        tmp_path / "in.parquet",
    )
    prepare_instructions(tmp_path / "in.parquet", tokenizer_dir, tmp_path / "store", 256)
    store = RowStore.open(tmp_path / "store")
    assert store.read(range(len(store))).tolist() == expected


TOOL = {"messages": [ASK, say("tool", "39 C"), ANSWER]}
REFUSED = [
    ("sft", TOOL, "messages has a turn of a tool (role `tool`), which is not read"),
    (
        "sft",
        {"conversations": [turn("function_call", "x")]},
        "conversations has a turn of a tool (role `function_call`)",
    ),
    ("sft", {"messages": [ASK, ANSWER | {"tool_calls": [{"x": 1}]}]}, "messages is a message with `tool_calls`"),
    ("sft", {"messages": [ASK, ANSWER | {"weight": 0}]}, "messages is a message with `weight`, which is not read"),
    ("sft", {"conversations": [turn("doctor", "secret")]}, "conversations is of an unknown role (known: system, human"),
    ("sft", SHARE_GPT | {"tools": "[{}]"}, "`tools` stands beside conversations, and is not read in such rows"),
    ("sft", PLAIN | {"history": [["a", "b"]]}, "`history` stands beside prompt, response, and is not read"),
    ("sft", ALPACA | {"system": "secret"}, "`system` stands beside plain strings, and only a chat can hold it; --chat"),
    (
        "sft",
        ALPACA | PLAIN,
        "a row of two forms, prompt+response (prompt and response) and instruction+output (Alpaca)",
    ),
    ("sft", ALPACA | {"input": 3}, "input is not a string"),
    (
        "sft",
        {"messages": [SYSTEM, ASK, ANSWER], "system": "secret"},
        "`system` is not the system message that the chat",
    ),
    ("sft", {"prompt": [ASK], "completion": [ASK]}, "completion does not begin and end with the assistant's messages"),
    (
        "sft",
        {"question": "secret"},
        "no field `prompt`, and no `messages`; it has question, and these are read: messages",
    ),
    (
        "pairs",
        {"chosen": "secret", "rejected": "b"},
        "no field `prompt`; name the field that holds the prompt with --col",
    ),
    (
        "pairs",
        {"chosen": [ASK, GOOD], "rejected": [SYSTEM, BAD]},
        "chosen and rejected do not begin with the same mess",
    ),
    (
        "pairs",
        {"chosen": [ASK, GOOD, ASK], "rejected": [ASK, BAD]},
        "chosen is not exactly one assistant message after",
    ),
    ("pairs", PAIR | {"images": ["secret"]}, "`images` stands beside prompt, chosen, rejected, and is not read"),
    ("pairs", PAIR | {"system": "secret"}, "`system` stands beside plain strings, and only a chat can hold it; --chat"),
    (
        "pairs",
        {"prompt": "other", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "prompt, chosen and rejected are not",
    ),
]


@pytest.mark.parametrize(("kind", "row", "reason"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path, tokenizer_dir, kind, row, reason):
    message = refusal(tmp_path, tokenizer_dir, kind, row)
    assert message.startswith(reason) and "secret" not in message
    assert "--on-bad skip" in message


def test_fields_that_no_form_has_are_refused():
    with pytest.raises(
        UserError, match=r"--columns answer=x: no form of rows has the field answer; the forms: messages"
    ):
        instruction_forms({"answer": "x"})
    with pytest.raises(UserError, match="no form of rows has the fields prompt, output"):
        instruction_forms({"prompt": "x", "output": "y"})
    with pytest.raises(UserError, match="no form"):
        pair_forms({"response": "x"})


def test_a_field_with_another_name_is_asked_for_by_that(tmp_path, tokenizer_dir):
    message = refusal(tmp_path, tokenizer_dir, "pairs", PAIR, columns={"prompt": "question"})
    assert message.startswith("no field `question`; it has prompt, chosen, rejected")


def test_a_table_without_a_field_that_is_read_is_told_what_it_has(tmp_path, tokenizer_dir):
    pq.write_table(pa.table({"question": ["secret"] * 3, "embedding": [[1.0]] * 3}), tmp_path / "in.parquet")
    told = "in.parquet:1: no field `prompt`; 3 rows are bad, first at .* it has question, embedding, and"
    with pytest.raises(UserError, match=told) as caught:
        prepare_pairs(tmp_path / "in.parquet", tokenizer_dir, tmp_path / "store", 64)
    assert "secret" not in str(caught.value)


def test_what_is_left_aside_is_known(tmp_path):
    forms = pair_forms()
    forms.example(PAIR | {"source": "x", "id": 3}, "f:1")
    forms.example(PAIR | {"id": 4}, "f:2")
    assert forms.unread == {"id": 2, "source": 1}

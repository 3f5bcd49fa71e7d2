"""`medllm chat`: a run says what its Hugging Face folder says, turns are remembered, and a fault ends only its turn."""

import io
import shutil
import sys

import pytest

from medllm_jax.cli import main
from medllm_jax.cli.convert import main as convert
from medllm_jax.evaluation.sampling import Completion
from medllm_jax.inference.openai_client import OpenAIClient
from tests.inference.test_openai_client import Engine
from tests.tiny import make_tokenizer
from tests.tiny_hf import make_hf_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in Hugging Face format and the same as a run."""
    root = tmp_path_factory.mktemp("chat")
    make_hf_folder(root / "hf", hidden=64, seed=3)
    assert convert(["from-hf", str(root / "hf"), str(root / "run")]) == 0
    return root


@pytest.fixture
def chat(monkeypatch, capsys):
    """What is answered to lines, and what is said beside; the exit code must be `code`."""

    def run(lines, *arguments, code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *map(str, arguments)]) == code
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("plain", [(), ("--plain",)], ids=["chat", "plain"])
def test_a_run_says_what_its_folder_says(place, chat, plain):
    pytest.importorskip("torch")
    lines, more = ["発熱と咳がある。", "", "なぜか。"], ("--max-new-tokens", 12, *plain)
    ours = chat(lines, "--run", place / "run", *more)
    theirs = chat(lines, "--hf", place / "hf", *more)
    assert ours.out == theirs.out and len(ours.out.strip()) > 1
    assert "not for clinical use" in ours.err and "the limit of 12 tokens: --max-new-tokens" in ours.err


def test_turns_are_remembered_until_a_new_conversation(chat):
    with Engine() as engine:
        named = ("--server", engine.url, "--model", "m", "--system", "be brief", "--seed", 7)
        answered = chat(["one", "two", "/new", "three"], *named)
        assert answered.out == "ONE\nTWO\nTHREE\n"
        asked = [[message["content"] for message in body["messages"]] for _, body in engine.requests]
        assert asked == [["be brief", "one"], ["be brief", "one", "ONE", "two"], ["be brief", "three"]]
        engine.requests.clear()
        chat(["one", "two"], "--server", engine.url, "--model", "m", "--plain")
        assert [body["prompt"] for _, body in engine.requests] == ["one", "two"]


def test_ctrl_c_stops_an_answer_and_what_is_too_long_ends_nothing(place, chat, monkeypatch):
    def sample(self, prompts, seeds, params):
        if prompts[0][-1]["content"] == "endless":
            raise KeyboardInterrupt
        yield [Completion(str(len(prompts[0])), "stop")]

    monkeypatch.setattr(OpenAIClient, "sample", sample)
    said = chat(["a", "endless", "b"], "--server", "http://127.0.0.1:9", "--model", "m")
    assert said.out == "1\n3\n" and "(stopped)" in said.err, "what was stopped is no part of the conversation"

    said = chat(["熱", "長" * 2000, "/new", "咳"], "--run", place / "run", "--max-new-tokens", 4)
    assert "but the model's context is 512" in said.err and "/new begins a new conversation" in said.err
    assert len(said.out.splitlines()) >= 2


def test_what_cannot_chat_says_what_would_do(world, chat, place, tmp_path):
    without = shutil.copytree(world.model, tmp_path / "model")
    make_tokenizer(without / "tokenizer", chat_template=None)
    (without / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    assert "give --run, --hf, or --server with --model" in chat([], code=2).err
    assert "give --plain, and it continues" in chat([], "--run", without, code=2).err
    assert "one model is asked at a time" in chat([], "--run", "a", "--hf", "b", code=2).err
    assert "--system is part of a chat" in chat([], "--run", place / "run", "--plain", "--system", "x", code=2).err

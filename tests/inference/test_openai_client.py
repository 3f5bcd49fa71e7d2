"""A server's model: completions in order, faults borne, refusals told in one line, and a real server at the end."""

import dataclasses
import json
import logging
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medllm_jax.errors import RunError, UserError
from medllm_jax.evaluation.sampling import UNANSWERED, Completion, SamplingParams
from medllm_jax.inference import openai_client as server_module
from medllm_jax.inference.openai_client import OpenAIClient


class Engine(ThreadingHTTPServer):
    """Answers a prompt with itself, capitals for small letters; `faults` go wrong first, each once."""

    daemon_threads = True

    def __init__(self, faults=(), answer=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults, self.answer = list(faults), answer
        self.lock = threading.Lock()
        self.requests, self.answered, self.headers_seen = [], [], []
        self.under_way = self.most_under_way = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        engine = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with engine.lock:
            engine.requests.append((self.path, body))
            engine.headers_seen.append(dict(self.headers))
            engine.under_way += 1
            engine.most_under_way = max(engine.most_under_way, engine.under_way)
            fault = engine.faults.pop(0) if engine.faults else None
        time.sleep(random.random() / 50)  # answers overtake each other
        with engine.lock:
            engine.under_way -= 1
            engine.answered.append(body.get("prompt"))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self._send(fault, self._completion(body) if engine.answer is None else engine.answer)

    def _completion(self, body):
        if "messages" in body:
            said = body["messages"][-1]["content"].upper()
            return {"choices": [{"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}]}
        return {"choices": [{"text": body["prompt"].upper(), "finish_reason": "length"}]}

    def _send(self, fault, answer):
        """`fault` is a status, a status with headers, a body for once, or "cut"."""
        data = fault if isinstance(fault, bytes) else json.dumps(answer).encode()
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self.send_response(status if isinstance(status, int) else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server_module, "_BACKOFF", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


LIMITS = SamplingParams(max_new_tokens=7, stop=("\nQ", "。"))


def test_answers_are_in_order_though_they_overtake_each_other_and_few_are_under_way():
    prompts = [f"prompt {number}" for number in range(60)]
    with Engine() as engine:
        answers = list(OpenAIClient(engine.url, "m", concurrency=4)(prompts, LIMITS))
    assert [each.text for each in answers] == [prompt.upper() for prompt in prompts]
    assert engine.answered != prompts, "nothing overtook anything"
    assert 1 < engine.most_under_way <= 4


def test_what_is_asked_is_what_was_said():
    with Engine() as engine:
        server = OpenAIClient(f"{engine.url}/v1/", "m")
        hot = dataclasses.replace(LIMITS, temperature=0.8, top_p=0.9)
        assert list(server(["a", "b"], hot, seeds=[5, 6])) == [Completion("A", "length"), Completion("B", "length")]
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
        assert list(server([chat], dataclasses.replace(hot, max_new_tokens=3, stop=()))) == [
            Completion("HELLO", "stop")
        ]
    asked = {body.get("prompt", "chat"): (path, body) for path, body in engine.requests}
    path, body = asked["b"]
    assert path == "/v1/completions"
    assert body == {
        "model": "m", "prompt": "b", "max_tokens": 7, "temperature": 0.8, "top_p": 0.9,
        "stop": ["\nQ", "。"], "seed": 6,
    }  # fmt: skip
    path, body = asked["chat"]
    assert path == "/v1/chat/completions"
    assert body == {"model": "m", "messages": chat, "max_tokens": 3, "temperature": 0.8, "top_p": 0.9}


_NO_COMPLETIONS = [
    b'{"choices": []}',
    b'{"error": {"message": "the engine is restarting"}}',
    b"<html>502 Bad Gateway</html>",
    b"",
    b"[1]",
    b'{"choices": null}',
    b'{"choices": [{"text": 5, "finish_reason": "stop"}]}',
    b'{"choices": [{"text": {"type": "text"}, "finish_reason": "stop"}]}',
    b'{"choices": [{"text": "", "finish_reason": ["stop"]}]}',
    b'{"choices": [{"text": [{"type": "image_url"}], "finish_reason": "stop"}]}',
    b"[" * 100_000,
    b"1" * 5_000,
    b"\xff\xfe\xfd",
    b" " * (2**23 + 1),
]
_STATUSES = [
    408,
    409,
    425,
    429,
    500,
    502,
    503,
    504,
    520,
    524,
    529,
    (429, {"Retry-After": "0"}),
    (503, {"Retry-After": "x"}),
]


@pytest.mark.parametrize("faults", [_STATUSES, ["reset", "cut"] * 3, _NO_COMPLETIONS], ids=["status", "torn", "body"])
def test_passing_faults_are_repeated(faults):
    prompts = [str(number) for number in range(20)]
    with Engine(faults=faults) as engine:
        answers = list(OpenAIClient(engine.url, "m", concurrency=10)(prompts, LIMITS))
    assert [each.text for each in answers] == prompts
    assert len(engine.requests) == len(prompts) + len(faults)


def test_a_stop_string_that_the_server_ignores_ends_the_text():
    answer = {"choices": [{"text": " one。two\nQ", "finish_reason": "length"}]}
    with Engine(answer=answer) as engine:
        assert list(OpenAIClient(engine.url, "m")(["a"], LIMITS)) == [Completion(" one", "stop")]


def test_a_refusal_is_told_once_and_without_the_prompt():
    answer = {"error": {"message": "the model `m` does not exist"}}
    with Engine(faults=[404], answer=answer) as engine:
        with pytest.raises(UserError, match=r"/v1/completions: status 404 for model 'm': the model `m` does not exist"):
            list(OpenAIClient(engine.url, "m")(["a secret"], LIMITS))
        assert len(engine.requests) == 1
    with Engine(faults=[400], answer={"error": {"message": "too long: x\nA secret\n"}}) as engine:
        with pytest.raises(UserError, match="status 400") as error:
            list(OpenAIClient(engine.url, "m")(["x\nA secret"], LIMITS))
        assert "secret" not in str(error.value)


def test_a_fault_that_stays_is_a_line_that_says_what_to_do():
    with Engine(faults=[503] * 100) as engine, pytest.raises(RunError, match="status 503"):
        list(OpenAIClient(engine.url, "m")(["a"], LIMITS))
    assert len(engine.requests) == 1 + server_module._RETRIES
    with pytest.raises(RunError, match=r"no answer after .* run this again"):
        list(OpenAIClient(engine.url, "m")(["a"] * 20, LIMITS))  # nobody listens there any more


@pytest.mark.parametrize("fault", [524, b"{}"])
def test_a_prompt_without_an_answer_is_left_out_and_said(fault, caplog, monkeypatch):
    monkeypatch.setattr(server_module, "_RETRIES", 1)
    monkeypatch.setattr(logging.getLogger("medllm_jax"), "propagate", True)
    with Engine(faults=[fault] * (1 + server_module._RETRIES)) as engine:
        answers = list(OpenAIClient(engine.url, "m", concurrency=1)(["a", "b", "c"], LIMITS))
    assert answers == [Completion("", UNANSWERED), Completion("B", "length"), Completion("C", "length")]
    (said,) = set(caplog.messages)
    assert "status 524" in said or "no completion" in said


def test_a_server_that_answers_nothing_any_more_ends_the_run(monkeypatch):
    monkeypatch.setattr(server_module, "_RETRIES", 1)
    with Engine(answer={}) as engine:
        answers = OpenAIClient(engine.url, "m", concurrency=1)([str(number) for number in range(50)], LIMITS)
        with pytest.raises(RunError, match="no completion"):
            list(answers)
    assert len(engine.requests) <= server_module._MAX_LOST * (1 + server_module._RETRIES) + 1


@pytest.mark.parametrize("wait", ["3600", "Thu, 01 Jan 2099 00:00:00 GMT"])
def test_a_server_that_asks_for_a_long_wait_is_asked_again_before_and_that_is_said(wait, caplog, monkeypatch):
    monkeypatch.setattr(server_module, "_MAX_WAIT", 0.01)
    monkeypatch.setattr(logging.getLogger("medllm_jax"), "propagate", True)
    with Engine(faults=[(429, {"Retry-After": wait})] * 3) as engine:
        assert [each.text for each in OpenAIClient(engine.url, "m")(["a"], LIMITS)] == ["A"]
    assert "asks to wait" in caplog.messages[0] and "status 429" in caplog.messages[0]


@pytest.mark.parametrize(
    "location", ["http://127.0.0.2:1/v1/completions?key=hidden", "//elsewhere/x", "https:/x", "http://["]
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_go_to_no_other_host(location, status):
    with (
        Engine(faults=[(status, {"Location": location})]) as engine,
        pytest.raises(UserError, match="redirects to") as e,
    ):
        list(OpenAIClient(engine.url, "m")(["a"], LIMITS))
    assert "hidden" not in str(e.value) and len(engine.requests) == 1


def test_a_redirect_of_the_same_host_is_followed_but_not_for_ever():
    moved = (307, {"Location": "/moved/v1/completions"})
    with Engine(faults=[moved]) as engine:
        assert [each.text for each in OpenAIClient(engine.url, "m")(["a"], LIMITS)] == ["A"]
    assert [path for path, _ in engine.requests] == ["/v1/completions", "/moved/v1/completions"]
    with Engine(faults=[moved] * 9) as engine, pytest.raises(UserError, match="again and again"):
        list(OpenAIClient(engine.url, "m")(["a"], LIMITS))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *((word, "stop") for word in ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP", None)),
        *((word, "length") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
        ("content_filter", "content_filter"),
        ("x" * 100, "x" * 40),
    ],
)
def test_finish_reasons_of_all_kinds_of_servers(said, meant):
    with Engine(answer={"choices": [{"text": "A", "finish_reason": said}]}) as engine:
        assert list(OpenAIClient(engine.url, "m")(["a"], LIMITS)) == [Completion("A", meant)]


@pytest.mark.parametrize(("used", "meant"), [(7, "length"), (6, "stop"), (None, "stop")])
def test_without_a_finish_reason_the_count_of_tokens_tells(used, meant):
    with Engine(answer={"choices": [{"text": "A"}], "usage": {"completion_tokens": used}}) as engine:
        assert list(OpenAIClient(engine.url, "m")(["a"], LIMITS)) == [Completion("A", meant)]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}, "one two"),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text"}]}, {"type": "output_text", "text": "A"}]},
            "A",
        ),
        ({"content": ["one", "two"]}, "onetwo"),
        ({"content": []}, ""),
        ({"content": None, "reasoning_content": "hm"}, ""),
        ({"content": None, "refusal": "No."}, "No."),
    ],
)
def test_the_content_of_a_message_in_all_its_forms(message, text):
    with Engine(answer={"choices": [{"message": message, "finish_reason": "stop"}]}) as engine:
        chat = [{"role": "user", "content": "hello"}]
        assert list(OpenAIClient(engine.url, "m")([chat], LIMITS)) == [Completion(text, "stop")]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_pass_ends_the_run_at_once(status):
    with Engine(faults=[status] * 9) as engine, pytest.raises(UserError, match=f"status {status}"):
        list(OpenAIClient(engine.url, "m", concurrency=1)(["a"] * 9, LIMITS))
    assert len(engine.requests) <= 2


def test_a_key_that_is_none_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hid\nden")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        OpenAIClient("http://host", "m")
    assert "hid" not in str(error.value).replace("OPENAI_API_KEY", "")


def test_the_key_goes_with_requests_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    caplog.set_level("DEBUG")
    with Engine(faults=["reset", 503, 401]) as engine, pytest.raises(UserError) as error:
        list(OpenAIClient(engine.url, "m")(["a"], LIMITS))
    assert {headers["Authorization"] for headers in engine.headers_seen} == {"Bearer sk-hidden"}
    assert "sk-hidden" not in caplog.text + str(error.value)


def test_whoever_stops_listening_ends_the_asking(monkeypatch):
    monkeypatch.setattr(server_module, "_AHEAD", 50)
    with Engine() as engine:
        answers = OpenAIClient(engine.url, "m", concurrency=2)([str(number) for number in range(1000)], LIMITS)
        next(answers)
        answers.close()
        assert len(engine.requests) < 50
        assert engine.under_way == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"url": "host:8000"}, "must be like http://host:8000"),
        ({"url": "http://user:word@host"}, "without a user name or password"),
        ({"model": ""}, "name is missing"),
        ({"concurrency": 0}, "at least 1"),
        ({"url": "http://host:99999"}, "that is no URL"),
        ({"url": "http://"}, "that is no URL"),
    ],
)
def test_senseless_arguments_are_refused(arguments, line):
    with pytest.raises(UserError, match=line) as error:
        OpenAIClient(**({"url": "http://host", "model": "m"} | arguments))
    assert "word@" not in str(error.value)


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory):
    """`transformers serve` with a tiny random model in Hugging Face format: its URL and the model's folder."""
    pytest.importorskip("torch")
    from transformers.utils.import_utils import is_serve_available

    from tests.tiny_hf import make_hf_folder

    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai (pip install transformers[serving])")
    folder = make_hf_folder(tmp_path_factory.mktemp("served") / "hf")
    # Without this, whatever the temperature in a request, this server takes the likeliest token.
    ending = {"eos_token_id": [0, 2], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(ending))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=log, stderr=log
        )
        try:
            _wait_for(port, process, folder.parent / "log")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_for(port, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text()[-2000:])


@pytest.mark.slow
def test_a_real_server_says_greedily_what_our_model_says(transformers_server, tmp_path):
    """The text of both, up to control tokens, which the server leaves out."""
    import re

    from medllm_jax.checkpoint.handle import open_checkpoint
    from medllm_jax.cli.convert import main
    from medllm_jax.config.schema import PrecisionConfig
    from medllm_jax.inference.generator import Generator

    url, folder = transformers_server
    prompts = ["The patient has a fever", "患者は発熱", "Which drug?"]
    served = list(OpenAIClient(url, str(folder), concurrency=2)(prompts, SamplingParams(max_new_tokens=24)))
    assert main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    precision = PrecisionConfig(params="float32", compute="float32")
    generator = Generator.from_checkpoint(open_checkpoint(tmp_path / "run"), batch_size=8, precision=precision)
    ours = list(generator(prompts, SamplingParams(max_new_tokens=24)))
    assert [each.text for each in served] == [re.sub(r"<\|\w+\|>", "", each.text) for each in ours]
    assert [each.finish_reason for each in served] == [each.finish_reason for each in ours]

    chat = [{"role": "user", "content": "発熱"}]
    (said,) = OpenAIClient(url, str(folder))([chat], SamplingParams(max_new_tokens=5))
    assert said.text and said.finish_reason == "length"


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_pairs_from_a_real_server(transformers_server, tmp_path, chat):
    from medllm_jax.cli import main
    from tests.tiny import write_json_lines

    url, folder = transformers_server
    row = {"question": "Which?", "choices": ["red", "green"], "answer": "b", "explanation": "Leaves."}
    exam = write_json_lines(tmp_path / "exam.jsonl", [{"id": f"q{n}", **row} for n in range(3)])
    template = tmp_path / "short.yaml"
    # Hot enough, random weights say anything, so that a letter that ends the text comes soon.
    condition = "{cue: '答え:', solution: ' {explanation} 答え: {answer}', stop: [a, e, o, t], max_new_tokens: 60}"
    template.write_text(
        f"question: '{{question}} {{choices}}'\nnumber_question: '{{question}}'\nconditions: {{explain: {condition}}}\n"
    )
    output, store = tmp_path / "pairs.jsonl", tmp_path / "store"
    arguments = ["pairs", "--server", url, "--model", str(folder), "--exam", str(exam), "--template", str(template)]
    arguments += ["--conditions", "explain", "--samples", "4", "--temperature", "20", "--strategy", "gold"]
    assert main([*arguments, "--output", str(output), *(["--chat"] if chat else [])]) == 0
    drawn = [json.loads(line) for line in (tmp_path / "pairs.samples.jsonl").read_text("utf-8").split("\n")[1:-1]]
    texts = {sample["text"] for row in drawn for sample in row["samples"]}
    assert [len(row["samples"]) for row in drawn] == [4] * 3 and len(texts) > 3
    assert not any(letter in text for letter in "aeot" for text in texts)
    prepare = ["data", "pairs", "--input", str(output), "--tokenizer", str(folder), "--output", str(store)]
    assert main([*prepare, "--sequence-length", "512"]) == 0


@pytest.mark.slow
def test_an_exam_by_a_real_server_is_the_one_by_torch(transformers_server, tmp_path):
    """Up to control tokens, which the server leaves out."""
    import re

    from medllm_jax.cli import main
    from tests.tiny import write_json_lines

    url, folder = transformers_server
    rows = [
        {"id": f"q{n}", "question": f"Which of {n}?", "choices": ["red", "green"], "answer": "b"} for n in range(12)
    ]
    exam = write_json_lines(tmp_path / "exam.jsonl", rows)
    template = tmp_path / "short.yaml"
    conditions = "{answer_only: {cue: '答え:', max_new_tokens: 8}, explain: {cue: '解説:', max_new_tokens: 16}}"
    template.write_text(
        f"question: '{{question}} {{choices}}'\nnumber_question: '{{question}}'\nconditions: {conditions}\n"
    )
    found = []
    for name, model in (("server", ["--server", url, "--model", str(folder)]), ("hf", ["--hf", str(folder)])):
        arguments = ["--exam", str(exam), "--template", str(template), "--output", str(tmp_path / name)]
        assert main(["evaluate", *model, *arguments]) == 0
        lines = (tmp_path / name / "samples.jsonl").read_text("utf-8").split("\n")[1:-1]
        found.append([re.sub(r"<\|\w+\|>", "", json.loads(line)["samples"][0]["text"]) for line in lines])
    assert found[0] == found[1] and len(found[0]) == 24

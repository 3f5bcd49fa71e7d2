"""Samples: the same wherever drawing was interrupted, of one model and its settings, and nothing that came is lost."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_jax.cli import main
from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.samples import sample_exam
from medllm_jax.evaluation.sampling import UNANSWERED, Completion, Sampler, SamplingParams, cut_at_stop
from medllm_jax.storage import append
from tests.tiny import write_json_lines

TEMPLATE = load_template("plain")
BOTH = ("answer_only", "explain")
PARAMS = SamplingParams(n=3, temperature=1.0)
GOLD = frozenset({frozenset("a")})
QUESTIONS = tuple(Question(id=f"問{n}", text=f"{n}はどれか。", choices=("甲", "乙"), gold=GOLD) for n in range(5))
EXAM = Exam("small", QUESTIONS)


class Model:
    """Says what it was asked and by which seed; can break off after so many prompts."""

    def __init__(self, breaks_after=None):
        self.breaks_after, self.asked = breaks_after, []

    def __call__(self, prompts, seeds, params):
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise ConnectionError("gone")
            self.asked.append(prompt)
            yield [Completion(f"{prompt} {seed} {number}\u2028\n\ud800", "stop") for number in range(params.n)]


def collect(file, model=None, params=PARAMS, *, exam=EXAM, name="tiny", **more):
    sampler = model and Sampler(name, "here", model)
    return sample_exam(exam, TEMPLATE, BOTH, file, sampler, params, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of a file that was written without an interruption."""
    file = tmp_path_factory.mktemp("samples") / "whole.jsonl"
    collect(file, Model())
    return file.read_bytes()


def test_what_a_server_left_without_an_answer_is_asked_for_again(whole, tmp_path, capsys):
    class Server(Model):
        def __call__(self, prompts, seeds, params):
            for number, drawn in enumerate(super().__call__(prompts, seeds, params)):
                yield [*drawn[:2], Completion("", UNANSWERED)] if number == 1 else drawn

    file = tmp_path / "samples.jsonl"
    samples = collect(file, Server())
    assert samples.unanswered == 2 and "2 of 10 prompts were not answered" in capsys.readouterr().err
    assert [each.finish_reason for each in samples.of("問1", "explain")] == ["stop", "stop", UNANSWERED]
    model = Model()
    samples = collect(file, model)
    assert len(model.asked) == 2 and not samples.unanswered
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_anywhere_goes_on_to_the_same_content(whole, tmp_path_factory, data):
    file = tmp_path_factory.mktemp("cut") / "samples.jsonl"
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    file.write_bytes(kept)
    model = Model()
    collect(file, model)
    assert file.read_bytes() == whole
    assert len(model.asked) == 10 - max(0, kept.count(b"\n") - 1), "what was there was asked again"


def test_what_came_before_a_failure_is_kept_and_counted(whole, tmp_path):
    file, seen = tmp_path / "samples.jsonl", []
    with pytest.raises(ConnectionError):
        collect(file, Model(breaks_after=7))
    assert whole.startswith(file.read_bytes()) and file.read_bytes().count(b"\n") == 8
    collect(file, model := Model(), progress=seen.append)
    assert file.read_bytes() == whole and len(model.asked) == 3
    assert seen == [7, 8, 9, 10]


def test_a_bucket_holds_the_same(whole, tmp_path, monkeypatch):
    """Nothing can be appended to there."""
    monkeypatch.setattr(append, "is_remote", lambda path: True)
    with pytest.raises(ConnectionError):
        collect(tmp_path / "samples.jsonl", Model(breaks_after=7))
    assert (tmp_path / "samples.jsonl").read_bytes().count(b"\n") == 8
    collect(tmp_path / "samples.jsonl", Model())
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_every_prompt_has_its_own_seed_which_others_do_not_change(tmp_path):
    def texts(name, exam=EXAM, **params):
        held = collect(tmp_path / name, Model(), SamplingParams(n=2, temperature=0.8, **params), exam=exam)
        return {(q.id, c): held.of(q.id, c)[0].text.split(" ")[-2] for q in exam.questions for c in BOTH}

    first = texts("a")
    assert len(set(first.values())) == 10
    other_way = texts("b", Exam("other", QUESTIONS[::-1][:3]))
    assert other_way.items() <= first.items()
    assert not set(texts("c", seed=1).values()) & set(first.values())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "another"}, "model was tiny and is now another"),
        ({"params": SamplingParams(n=3, temperature=0.8)}, "temperature was 1.0 and is now 0.8"),
        ({"params": SamplingParams(n=4, temperature=1.0, seed=2)}, "samples was 3 and is now 4; seed was 0 and"),
    ],
)
def test_samples_of_another_kind_are_refused(whole, tmp_path, change, line):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(whole)
    with pytest.raises(UserError, match=line):
        collect(file, model := Model(), **change)
    assert file.read_bytes() == whole and not model.asked
    collect(file, model, **change, anew=True)
    assert len(model.asked) == 10


def test_another_prompt_is_refused_and_more_questions_are_welcome(whole, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_bytes(whole)
    changed = Exam("changed", (QUESTIONS[0], Question(id="問1", text="another", choices=("a", "b"))))
    with pytest.raises(UserError, match=r"samples of 問1 \(answer_only\) in .* are of another prompt"):
        collect(file, Model(), exam=changed)
    explain = dataclasses.replace(TEMPLATE.condition("explain"), max_new_tokens=9)
    limited = dataclasses.replace(TEMPLATE, conditions=TEMPLATE.conditions | {"explain": explain})
    with pytest.raises(UserError, match=r"samples of 問0 \(explain\) in .* or other limits"):
        sample_exam(EXAM, limited, BOTH, file, Sampler("tiny", "here", Model()), PARAMS)
    more = Exam("more", (*QUESTIONS, Question(id="q", text="more", choices=("a", "b"))))
    collect(file, model := Model(), exam=more)
    assert len(model.asked) == 2 and file.read_bytes().startswith(whole)


def test_without_a_model_the_file_must_hold_all(whole, tmp_path):
    file = tmp_path / "samples.jsonl"
    with pytest.raises(UserError, match="holds no samples: name the model"):
        collect(file)
    file.write_bytes(whole)
    first = collect(file, params=SamplingParams(n=9, temperature=0.8, seed=5)).of("問0", "explain")
    assert len(first) == 3 and first[0].text.endswith("\u2028\n\ufffd")
    file.write_bytes(whole[:-300])
    with pytest.raises(UserError, match="lacks the samples of 1 of 10 prompts"):
        collect(file)


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([{"prompt": "a", "chosen": "b"}], "samples.jsonl:1: not the head of a file of samples"),
        ([None, {"id": "q", "condition": "explain", "prompt_hash": "0", "samples": []}], "samples.jsonl:2: 0 samples"),
        ([None, {"id": "q", "condition": "explain"}], "samples.jsonl:2: the field 'samples' is missing"),
    ],
)
def test_other_files_are_refused(whole, tmp_path, lines, line):
    head = json.loads(whole.split(b"\n")[0])
    file = write_json_lines(tmp_path / "samples.jsonl", [each or head for each in lines])
    with pytest.raises(UserError, match=line):
        collect(file, Model())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"temperature": []}, "samples.jsonl:1: temperature: expected a number"),
        ({"temperature": -1}, "samples.jsonl:1: temperature is -1"),
        ({"samples": "3"}, "samples.jsonl:1: n: expected a whole number"),
        ({"seed": None}, "samples.jsonl:1: seed: expected a whole number"),
        ({"model": 1}, "samples.jsonl:1: the field 'model' is 1"),
        ({"chat": "yes"}, "samples.jsonl:1: the field 'chat' is \"yes\""),
    ],
)
def test_settings_that_nothing_was_drawn_with_are_refused(whole, tmp_path, changes, line):
    head, *rows = map(json.loads, whole.splitlines())
    file = write_json_lines(tmp_path / "samples.jsonl", [head | {"settings": head["settings"] | changes}, *rows])
    with pytest.raises(UserError, match=line):
        collect(file)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_senseless_params_are_refused(wrong, name):
    with pytest.raises(UserError, match=name):
        SamplingParams(**({"n": 8, "temperature": 0.8} | wrong))


def test_the_first_stop_string_cuts():
    assert cut_at_stop("one。two\nQ", ("\nQ", "。")) == "one"
    assert cut_at_stop("。two", ("。",)) == ""
    assert cut_at_stop("one", ("two",)) is None and cut_at_stop("one", ()) is None


def test_the_verb_goes_on_and_pairs_anew_without_the_model(world, tmp_path, capsys):
    """From a model's samples to a store; interrupted, with another batch size, by another strategy."""
    row = {"choices": ["one", "two"], "answer": "b", "explanation": "Because."}
    exam = write_json_lines(tmp_path / "exam.jsonl", [{"id": f"q{n}", "question": f"{n}?", **row} for n in range(3)])
    template = tmp_path / "hot.yaml"  # random weights say anything, so that a letter that ends the text comes soon
    form = "{cue: '答え:', stop: [a, e, o, t], max_new_tokens: 32}"
    template.write_text(
        f"question: '{{question}} {{choices}}'\nnumber_question: '{{question}}'\nconditions: {{answer_only: {form}}}\n"
    )
    asked = ["--exam", exam, "--template", template, "--conditions", "answer_only"]
    output, samples = tmp_path / "pairs.jsonl", tmp_path / "pairs.samples.jsonl"
    drawn = ["--run", world.model, "--samples", 5, "--temperature", 5.0]

    def pairs(*arguments):
        return main(["pairs", *map(str, [*asked, *arguments])])

    assert pairs(*drawn, "--output", output, "--strategy", "gold") == 0
    assert "15 samples" in capsys.readouterr().out
    whole = samples.read_bytes()
    samples.write_bytes(whole[: len(whole) * 2 // 3])
    assert pairs(*drawn, "--output", output) == 2 and "--overwrite" in capsys.readouterr().err
    assert pairs(*drawn, "--output", output, "--overwrite", "--batch-size", 16, "--mesh", "data=8,fsdp=1") == 0
    assert samples.read_bytes() == whole
    assert pairs("--output", tmp_path / "again.jsonl", "--samples-file", samples, "--most", 1) == 0
    rows = (tmp_path / "again.jsonl").read_text("utf-8").split("\n")[:-1]
    assert len(rows) == 3
    report = json.loads((tmp_path / "again.jsonl.report.json").read_text("utf-8"))
    assert report["samples_of"]["where"].startswith(str(world.model)) and report["pairs"]["gold"] == 3

    prepare = ["data", "pairs", "--input", output, "--tokenizer", world.tokenizer, "--output", tmp_path / "store"]
    assert main([*map(str, prepare), "--sequence-length", "128"]) == 0
    assert pairs("--output", tmp_path / "x.jsonl", "--server", "http://h") == 2
    assert "--server URL and --model NAME, both" in capsys.readouterr().err
    assert pairs("--output", tmp_path / "x.jsonl", "--chat") == 2
    assert pairs(*drawn, "--output", tmp_path / "x.jsonl", "--evaluation-exam", exam) == 2
    assert "3 of 3 questions" in capsys.readouterr().err and not (tmp_path / "x.samples.jsonl").exists()

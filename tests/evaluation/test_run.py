"""Running an exam: outputs on disk first, resuming, and the tables."""

import json
import re
from dataclasses import dataclass

import pytest
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.evaluation import run
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.run import evaluate, format_table

BOTH = ("answer_only", "explain")
TEMPLATE = load_template("plain")
EXAM = Exam(
    "small",
    tuple(
        Question(
            id=f"q{i}",
            text=f"問{i}はどれか。",
            choices=("甲", "乙"),
            gold=frozenset({frozenset("ab"[i % 2])}),
            year=2018 + i % 2,
        )
        for i in range(6)
    ),
)


@dataclass
class Completion:
    text: str
    finish_reason: str = "stop"


class Model:
    """Answers a to everything, in the form that the prompt asks for; can break off after some answers."""

    def __init__(self, answers=None, breaks_after=None):
        self.answers, self.breaks_after = answers or {}, breaks_after
        self.asked, self.settings = [], []

    def __call__(self, prompts, *, max_new_tokens, stop):
        self.settings.append((max_new_tokens, stop))
        for prompt in prompts:
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise ConnectionError("gone")
            self.asked.append(prompt)
            key = "q" + re.search(r"問(\d)", prompt)[1]
            default = " a" if prompt.endswith("答え:") else " 説明\u2028する。\n答え: a"
            yield Completion(self.answers.get(key, default))


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_scores_and_files(tmp_path):
    model, seen = Model({"q1": "\ud800乙", "q2": "a,b"}), []
    scores = evaluate(EXAM, TEMPLATE, BOTH, model, tmp_path / "out", model="tiny", progress=seen.append)
    assert (scores["answer_only"].n, scores["answer_only"].correct) == (6, 3)
    assert (scores["answer_only"].wrong_count, scores["answer_only"].unparseable) == (1, 0)
    assert (scores["explain"].correct, scores["explain"].rules["cue_letters"]) == (3, 4)
    assert seen == [*range(7), *range(6, 13)]
    assert [TEMPLATE.condition(c).max_new_tokens for c in BOTH] == [s[0] for s in model.settings]
    assert [TEMPLATE.condition(c).stop for c in BOTH] == [s[1] for s in model.settings]

    raw = lines(tmp_path / "out/raw-answer_only.jsonl")
    assert [r["id"] for r in raw] == [q.id for q in EXAM.questions]
    assert [set(r) for r in raw] == [{"id", "prompt_hash", "text", "finish_reason"}] * 6
    assert raw[1]["text"] == "\ud800乙"
    graded = {g["id"]: g for g in lines(tmp_path / "out/grades-answer_only.jsonl")}
    assert (graded["q1"]["answer"], graded["q1"]["rule"], graded["q1"]["correct"]) == ("b", "words", True)
    assert (graded["q2"]["answer"], graded["q2"]["problem"], graded["q2"]["correct"]) == ("a,b", "wrong_count", False)
    written = json.loads((tmp_path / "out/scores.json").read_text("utf-8"))
    assert (written["exam"], written["template"], written["model"]) == ("small", "plain", "tiny")
    assert written["conditions"] == {c: s.as_dict() for c, s in scores.items()}
    table = (tmp_path / "out/table.md").read_text("utf-8").splitlines()
    assert table[0].startswith("| condition | questions | correct |")
    assert table[2] == "| answer_only | 6 | 3 | 50.0% | 50.0% | 0 | 1 |"


@pytest.mark.parametrize("after", [0, 1, 4, 6, 9, 11])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, after):
    whole = Model()
    expected = evaluate(EXAM, TEMPLATE, BOTH, whole, tmp_path / "whole")
    broken, rest, seen = Model(breaks_after=after), Model(), []
    with pytest.raises(ConnectionError):
        evaluate(EXAM, TEMPLATE, BOTH, broken, tmp_path / "parts")
    kept = sum(len(lines(f)) for f in (tmp_path / "parts").glob("raw-*.jsonl"))
    assert kept == after
    assert not (tmp_path / "parts/scores.json").exists()
    assert evaluate(EXAM, TEMPLATE, BOTH, rest, tmp_path / "parts", progress=seen.append) == expected
    assert broken.asked + rest.asked == whole.asked
    assert (seen[0], seen[-1]) == (min(after, 6), 12)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_outputs_are_on_disk_before_the_next_is_made(tmp_path):
    counts = []

    def model(prompts, *, max_new_tokens, stop):
        for _ in prompts:
            counts.append(len(lines(tmp_path / "raw-answer_only.jsonl")))
            yield Completion("a")

    evaluate(EXAM, TEMPLATE, ["answer_only"], model, tmp_path)
    assert counts == list(range(6))


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_torn_by_the_interruption_is_asked_again(tmp_path, cut):
    expected = evaluate(EXAM, TEMPLATE, ["explain"], Model(), tmp_path)
    before = files(tmp_path)
    (tmp_path / "raw-explain.jsonl").write_bytes(before["raw-explain.jsonl"][:-cut])
    again = Model()
    assert evaluate(EXAM, TEMPLATE, ["explain"], again, tmp_path) == expected
    assert len(again.asked) == 1
    assert files(tmp_path) == before


def test_other_prompts_settings_or_models_are_refused(tmp_path):
    evaluate(EXAM, TEMPLATE, ["answer_only"], Model(), tmp_path, model="one")
    before = files(tmp_path)
    reworded = Exam(
        "small", (Question(**{**vars(EXAM.questions[0]), "text": "問0を変えた。どれか。"}), *EXAM.questions[1:])
    )
    for exam, template, model in (
        (reworded, TEMPLATE, "one"),
        (EXAM, load_template("igakuqa"), "one"),
        (EXAM, TEMPLATE, "two"),
    ):
        asked = Model()
        with pytest.raises(UserError, match=r"raw-answer_only.jsonl:1: .*q0 was made with another .*delete this file"):
            evaluate(exam, template, ["answer_only"], asked, tmp_path, model=model)
        assert asked.asked == []
    assert files(tmp_path) == before
    evaluate(EXAM, TEMPLATE, ["answer_only"], Model(breaks_after=0), tmp_path, model="one")


def test_a_longer_exam_asks_only_what_is_new(tmp_path):
    evaluate(Exam("few", EXAM.questions[:2]), TEMPLATE, ["answer_only"], Model(), tmp_path)
    more = Model()
    assert evaluate(EXAM, TEMPLATE, ["answer_only"], more, tmp_path)["answer_only"].n == 6
    assert len(more.asked) == 4


def test_a_broken_file_and_wrong_conditions_are_named(tmp_path):
    (tmp_path / "raw-answer_only.jsonl").write_text('{"id": "q0"}\n')
    with pytest.raises(UserError, match=r"raw-answer_only.jsonl:1: the field 'prompt_hash' is missing"):
        evaluate(EXAM, TEMPLATE, ["answer_only"], Model(), tmp_path)
    for wrong in ([], ["answer"], ["explain", "explain"]):
        with pytest.raises(UserError, match=r"conditions: .* one or both of answer_only, explain"):
            evaluate(EXAM, TEMPLATE, wrong, Model(), tmp_path)


def test_a_model_that_returns_too_little_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        evaluate(EXAM, TEMPLATE, ["answer_only"], lambda p, **_: [Completion("a")], tmp_path)


def test_a_bucket_gets_the_same_lines_in_whole_rewrites(tmp_path, monkeypatch):
    """What a bucket sees: no appending, a rewrite every few lines, and nothing lost when the run breaks off."""
    rewrites = []
    real = run._RawOutputs._rewrite
    monkeypatch.setattr(run, "_LINES_PER_REWRITE", 2)
    monkeypatch.setattr(run._RawOutputs, "_rewrite", lambda self: (rewrites.append(len(self._lines)), real(self)))
    monkeypatch.setattr(run, "_appendable", lambda file: False)
    with pytest.raises(ConnectionError):
        evaluate(EXAM, TEMPLATE, ["answer_only"], Model(breaks_after=3), tmp_path / "bucket")
    assert rewrites == [2, 3]
    rest = Model()
    evaluate(EXAM, TEMPLATE, ["answer_only"], rest, tmp_path / "bucket")
    assert rewrites == [2, 3, 5, 6]
    monkeypatch.undo()
    evaluate(EXAM, TEMPLATE, ["answer_only"], Model(), tmp_path / "local")
    assert len(rest.asked) == 3
    assert files(tmp_path / "bucket") == files(tmp_path / "local")
    assert run._appendable(epath.Path("/tmp/x"))
    assert not run._appendable(epath.Path("gs://bucket/x"))


def test_the_terminal_table(tmp_path):
    table = format_table(evaluate(EXAM, TEMPLATE, BOTH, Model(), tmp_path)).splitlines()
    assert len(table) == 3
    assert (
        " ".join(table[0].split()) == "condition questions correct accuracy weighted accuracy unparseable wrong count"
    )
    assert table[1].split() == ["answer_only", "6", "3", "50.0%", "50.0%", "0", "0"]

"""Running an exam: outputs on disk before grades, going on, votes, and the tables."""

import json
import re

import pytest

from medllm_jax.errors import UserError
from medllm_jax.evaluation.evaluate import evaluate, format_table
from medllm_jax.evaluation.exam import Exam, Question
from medllm_jax.evaluation.extraction.extract import Extraction, vote
from medllm_jax.evaluation.grading import read_grades
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.sampling import Completion, Sampler, SamplingParams

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


class Model:
    """Answers a to everything, in the form that the prompt asks for; can break off after some answers."""

    def __init__(self, answers=None, breaks_after=None):
        self.answers, self.breaks_after = answers or {}, breaks_after
        self.asked, self.settings = [], []

    def __call__(self, prompts, seeds, params):
        self.settings.append((params.max_new_tokens, params.stop))
        for prompt in prompts:
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise ConnectionError("gone")
            self.asked.append(prompt)
            key = "q" + re.search(r"問(\d)", prompt)[1]
            default = " a" if prompt.endswith("答え:") else " 説明\u2028する。\n答え: a"
            given = self.answers.get(key, default)
            yield [Completion(text, "stop") for text in (given if isinstance(given, list) else [given] * params.n)]


def asked_of(model, name="tiny", where="here"):
    return model and Sampler(name, where, model)


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_scores_and_files(tmp_path):
    model, seen = Model({"q1": "\ud800乙", "q2": "a,b"}), []
    scores = evaluate(EXAM, TEMPLATE, BOTH, asked_of(model), tmp_path / "out", progress=seen.append)
    assert (scores["answer_only"].n, scores["answer_only"].correct) == (6, 3)
    assert (scores["answer_only"].wrong_count, scores["answer_only"].unparseable) == (1, 0)
    assert (scores["explain"].correct, scores["explain"].rules["cue_letters"]) == (3, 4)
    assert seen == list(range(13))
    assert [TEMPLATE.condition(c).max_new_tokens for c in BOTH] == [s[0] for s in model.settings]
    assert [TEMPLATE.condition(c).stop for c in BOTH] == [s[1] for s in model.settings]

    _, *raw = lines(tmp_path / "out/samples.jsonl")
    assert [(r["condition"], r["id"]) for r in raw] == [(c, q.id) for c in BOTH for q in EXAM.questions]
    assert raw[1]["samples"] == [{"text": "\ufffd乙", "finish_reason": "stop"}]
    graded = {g.id: g for g in read_grades(tmp_path / "out/grades-answer_only.jsonl")}
    assert (graded["q1"].answer, graded["q1"].rule, graded["q1"].correct) == ("b", "words", True)
    assert (graded["q2"].answer, graded["q2"].problem, graded["q2"].correct) == ("a,b", "wrong_count", False)
    written = json.loads((tmp_path / "out/scores.json").read_text("utf-8"))
    assert (written["exam"], written["template"], written["model"]) == ("small", "plain", "here")
    assert (written["settings"]["model"], written["settings"]["samples"]) == ("tiny", 1)
    assert written["conditions"] == json.loads(json.dumps({c: s.as_dict() for c, s in scores.items()}))
    table = (tmp_path / "out/table.md").read_text("utf-8").splitlines()
    assert table[0].startswith("| condition | questions | correct |")
    assert table[2] == "| answer_only | 6 | 3 | 50.0% | 50.0% | 0 | 1 |"


@pytest.mark.parametrize("after", [0, 1, 6, 9])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, after):
    whole = Model()
    expected = evaluate(EXAM, TEMPLATE, BOTH, asked_of(whole), tmp_path / "whole")
    broken, rest = Model(breaks_after=after), Model()
    with pytest.raises(ConnectionError):
        evaluate(EXAM, TEMPLATE, BOTH, asked_of(broken), tmp_path / "parts")
    assert not (tmp_path / "parts/scores.json").exists()
    assert evaluate(EXAM, TEMPLATE, BOTH, asked_of(rest), tmp_path / "parts") == expected
    assert broken.asked + rest.asked == whole.asked
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_outputs_are_on_disk_before_the_next_is_made(tmp_path):
    counts = []

    def model(prompts, seeds, params):
        for _ in prompts:
            counts.append(len(lines(tmp_path / "samples.jsonl")) - 1)
            yield [Completion("a", "stop")]

    evaluate(EXAM, TEMPLATE, ["answer_only"], asked_of(model), tmp_path)
    assert counts == list(range(6))


def test_what_is_there_is_graded_again_without_a_model(tmp_path):
    expected = evaluate(EXAM, TEMPLATE, BOTH, asked_of(Model()), tmp_path)
    before = files(tmp_path)
    for name in ("scores.json", "grades-explain.jsonl"):
        (tmp_path / name).unlink()
    assert evaluate(EXAM, TEMPLATE, BOTH, None, tmp_path) == expected
    assert files(tmp_path) == before


def test_other_prompts_or_models_are_refused(tmp_path):
    evaluate(EXAM, TEMPLATE, ["answer_only"], asked_of(Model(), "one"), tmp_path)
    before = files(tmp_path)
    reworded = Exam(
        "small", (Question(**{**vars(EXAM.questions[0]), "text": "問0を変えた。どれか。"}), *EXAM.questions[1:])
    )
    for exam, template, name, error in (
        (reworded, TEMPLATE, "one", "q0 .*of another prompt"),
        (EXAM, load_template("igakuqa"), "one", "of another prompt"),
        (EXAM, TEMPLATE, "two", "model was one and is now two"),
    ):
        model = Model()
        with pytest.raises(UserError, match=error):
            evaluate(exam, template, ["answer_only"], asked_of(model, name), tmp_path)
        assert model.asked == [] and files(tmp_path) == before


def test_a_longer_exam_asks_only_what_is_new(tmp_path):
    evaluate(Exam("few", EXAM.questions[:2]), TEMPLATE, ["answer_only"], asked_of(Model()), tmp_path)
    more = Model()
    assert evaluate(EXAM, TEMPLATE, ["answer_only"], asked_of(more), tmp_path)["answer_only"].n == 6
    assert len(more.asked) == 4


def test_of_several_outputs_the_majority_counts(tmp_path):
    answers = {"q0": ["a", "b", "a"], "q1": ["b", "a", "b"], "q2": ["どちらも", "b", "a,b"], "q3": ["?", "?", "?"]}
    options = SamplingParams(n=3, temperature=1.0)
    scores = evaluate(EXAM, TEMPLATE, ["answer_only"], asked_of(Model(answers)), tmp_path, options)
    graded = {g.id: g for g in read_grades(tmp_path / "grades-answer_only.jsonl")}
    assert [graded[f"q{n}"].answer for n in range(4)] == ["a", "b", "b", None]
    assert graded["q3"].problem == "placeholder" and scores["answer_only"].n == 6


def test_a_vote():
    a, b = (Extraction(letters=frozenset(letter), rule="letters") for letter in "ab")
    unread, loose = Extraction(problem="refusal"), Extraction(letters=frozenset("b"), rule="mentioned", lenient=True)
    assert vote([a, b]) == a and vote([b, a]) == b, "of equals, the first"
    assert vote([unread, unread, a]) == a, "what can't be read has no vote"
    assert vote([loose, loose, a]) == a and vote([unread, loose]) == loose
    assert vote([unread, Extraction(problem="empty")]) == unread


def test_wrong_conditions_are_named(tmp_path):
    for wrong in ([], ["answer"], ["explain", "explain"]):
        with pytest.raises(UserError, match=r"conditions: .* one or both of answer_only, explain"):
            evaluate(EXAM, TEMPLATE, wrong, asked_of(Model()), tmp_path)


def test_the_terminal_table(tmp_path):
    table = format_table(evaluate(EXAM, TEMPLATE, BOTH, asked_of(Model()), tmp_path)).splitlines()
    assert len(table) == 3
    assert (
        " ".join(table[0].split()) == "condition questions correct accuracy weighted accuracy unparseable wrong count"
    )
    assert table[1].split() == ["answer_only", "6", "3", "50.0%", "50.0%", "0", "0"]

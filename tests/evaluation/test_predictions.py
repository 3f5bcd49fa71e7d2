"""Predictions of others: read in both forms, scored in three tiers, and each mistake in one line."""

import json
import time

import pytest

from medllm_jax.cli import main
from medllm_jax.evaluation.grading import read_grades
from tests.evaluation.test_exam import igakuqa_row, repository  # noqa: F401 (a fixture)
from tests.evaluation.test_grading import PUBLISHED
from tests.tiny import write_json_lines

GOLD = {"112B1": "d", "112B2": "c", "112B3": "b,e", "112B4": "a", "112B5": "d"}


@pytest.fixture
def published(repository, tmp_path):  # noqa: F811
    """Predictions for 2018 by two systems, as they are published."""

    def write(system, answers):
        rows = [{"problem_id": key, "prediction": text, "explanation": ""} for key, text in answers.items()]
        return write_json_lines(tmp_path / f"predictions/112-B_{system}.jsonl", rows)

    (tmp_path / "predictions").mkdir()
    write("exact", GOLD)
    write("wordy", GOLD | {"112B1": "答え: a", "112B3": "b, e", "112B5": "迷うが、dが正しい気がする"})
    return repository, tmp_path / "predictions"


def score(data, predictions, *arguments):
    return main(["score", "--data", str(data), "--predictions", str(predictions), *arguments])


def test_three_tiers_of_two_systems(published, tmp_path, capsys):
    data, predictions = published
    assert score(data, predictions, "--years", "2018", "--output", str(tmp_path / "out"), "--json") == 0
    systems = json.loads(capsys.readouterr().out)["systems"]
    assert list(systems) == ["exact", "wordy"]
    points = {
        name: [tiers[tier]["points"] for tier in ("official", "strict", "lenient")] for name, tiers in systems.items()
    }
    # 112B1 is worth 3 points and accepts a and d; 112B4 is worth none.
    assert points == {"exact": [6, 6, 6], "wordy": [1, 5, 6]}
    assert {name: tiers["strict"]["correct"] for name, tiers in systems.items()} == {"exact": 5, "wordy": 4}
    assert systems["exact"]["strict"]["groups"]["2 answers"]["n"] == 1
    assert systems["exact"]["strict"]["required"]["points"] == 6 and systems["exact"]["strict"]["passed"] is None
    grades = read_grades(tmp_path / "out/wordy/grades-answer_only.jsonl")
    assert [g.correct for g in grades] == [True, True, True, True, False]
    assert json.loads((tmp_path / "out/wordy/scores.json").read_text())["conditions"]["answer_only"]["points"] == 5


def test_the_tables_and_the_comparison(published, capsys):
    data, predictions = published
    assert score(data, predictions, "--years", "2018", "--against", "exact", "--tier", "official") == 0
    printed = capsys.readouterr().out
    assert "points by year and tier" in printed and "the parts of the exam (official)" in printed
    assert "wordy against exact (official)\n  right: both 2, only exact 3, only wordy 0\n" in printed
    assert "p = 0.25" in printed


def test_outputs_with_ids_of_any_exam(tmp_path, capsys):
    rows = [{"id": f"q{n}", "question": "?", "choices": ["x", "y"], "answer": "ab"[n]} for n in range(2)]
    data = write_json_lines(tmp_path / "exam.jsonl", rows)
    answers = [{"id": "q0", "text": "理由は…\n答え: a"}, {"id": "q1", "text": "理由は", "finish_reason": "length"}]
    file = write_json_lines(tmp_path / "mine.jsonl", answers)
    assert score(data, file, "--exam", "questions", "--condition", "explain", "--json") == 0
    strict = json.loads(capsys.readouterr().out)["systems"]["mine"]["strict"]
    assert (strict["correct"], strict["truncated"], strict["problems"]) == (1, 1, {"truncated": 1})
    assert strict["required"] is None and strict["passed"] is None


def _case(change):
    rows = [{"problem_id": key, "prediction": text} for key, text in GOLD.items()]
    return change(rows)


@pytest.mark.parametrize(
    ("change", "arguments", "line"),
    [
        (lambda rows: rows[:3], [], r"one: 2 of 5 questions have no prediction (112B4, 112B5): give all files"),
        (lambda rows: [*rows, rows[1]], [], r"one.jsonl:6: the question '112B2' was answered at"),
        (lambda rows: [*rows, {"problem_id": "112B9", "prediction": ""}], [], "one.jsonl:6: '112B9' is no question"),
        (lambda rows: [*rows, {"problem_id": "9" * 10**5, "prediction": ""}], [], "99... is no question of igakuqa"),
        (lambda rows: [*rows, *2 * [{"problem_id": "9" * 10**5, "prediction": ""}]], [], "99... was answered at"),
        (lambda rows: [{"problem_id": "99A1", "prediction": ""}], [], "and all other ids of one are not of igakuqa"),
        (lambda rows: [{"problem_id": "112B1"}], [], "one.jsonl:1: the field 'prediction' is missing"),
        (lambda rows: [{"problem_id": "112B1", "prediction": 3}], [], "'prediction' is 3; a string was expected"),
        (lambda rows: rows, ["--against", "two"], "--against two: there are predictions of one; two are compared"),
        (lambda rows: rows, ["--years", "1999"], "no questions of 1999"),
    ],
)
def test_mistakes_are_named(repository, tmp_path, capsys, change, arguments, line):  # noqa: F811
    file = write_json_lines(tmp_path / "one.jsonl", _case(change))
    years = [] if "--years" in arguments else ["--years", "2018"]
    assert score(repository, file, *years, *arguments) == 2
    error = capsys.readouterr().err
    *warnings, last = error.splitlines()  # the sections of this exam that hold no question
    assert line in last and all("files hold no question" in each for each in warnings)


def test_what_is_not_there(repository, tmp_path, capsys):  # noqa: F811
    for path in ("nowhere", "*.json", str(tmp_path / "empty")):
        assert score(repository, path) == 2
        assert f"{path}: no predictions" in capsys.readouterr().err
    file = write_json_lines(tmp_path / "one.jsonl", [{"id": "q", "text": "a"}])
    exam = write_json_lines(tmp_path / "exam.jsonl", [{"id": "q", "question": "?", "choices": ["x"], "answer": "a"}])
    assert score(exam, file) == 2
    assert "holds other questions than IgakuQA's" in capsys.readouterr().err


def test_an_exam_without_an_official_tier_says_so(tmp_path, capsys):
    file = write_json_lines(tmp_path / "one.jsonl", [{"id": "q", "text": "a", "finish_reason": "max_tokens"}])
    exam = write_json_lines(tmp_path / "exam.jsonl", [{"id": "q", "question": "?", "choices": ["x"], "answer": "a"}])
    assert score(exam, file, "--exam", "questions", "--output", str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "official: none" in out and "0.000" not in out
    assert json.loads((tmp_path / "out/one/scores.json").read_text())["tiers"].keys() == {"strict", "lenient"}
    assert json.loads((tmp_path / "out/one/grades-answer_only.jsonl").read_text())["truncated"]
    assert score(exam, file, "--exam", "questions", "--tier", "official") == 2
    assert "--tier official" in capsys.readouterr().err


def test_a_system_is_named_like_a_folder(tmp_path, capsys):
    file = write_json_lines(tmp_path / "112-A_...jsonl", [{"id": "q", "text": "a"}])
    exam = write_json_lines(tmp_path / "exam.jsonl", [{"id": "q", "question": "?", "choices": ["x"], "answer": "a"}])
    assert score(exam, file, "--exam", "questions") == 2
    assert "'..' can't be" in capsys.readouterr().err


def test_missing_answers_can_be_counted_as_wrong(repository, tmp_path, capsys):  # noqa: F811
    file = write_json_lines(tmp_path / "one.jsonl", [{"problem_id": "112B2", "prediction": "c"}])
    assert score(repository, file, "--years", "2018", "--allow-missing", "--json") == 0
    strict = json.loads(capsys.readouterr().out)["systems"]["one"]["strict"]
    assert (strict["n"], strict["correct"], strict["problems"]) == (5, 1, {"empty": 4})


def test_the_published_points_come_out_of_the_command(igakuqa, tmp_path, capsys):
    start, out = time.process_time(), tmp_path / "out"
    years = ("--years", "2018", "2019", "2020")
    assert score(igakuqa, igakuqa / "baseline_results", *years, "--json", "--output", str(out)) == 0
    assert time.process_time() - start < 5
    systems = json.loads(capsys.readouterr().out)["systems"]
    start = time.process_time()
    assert main(["report", *map(str, out.iterdir()), "--output", str(tmp_path / "report")]) == 0
    assert time.process_time() - start < 5
    for name, points in PUBLISHED.items():
        official = systems[name]["official"]["by_year"]
        assert tuple(official[str(year)]["points"] for year in (2018, 2019, 2020)) == points
    by_year = systems["gpt4"]["strict"]["by_year"]
    assert (
        all(by_year[year]["passed"] for year in by_year) and not systems["gpt3"]["strict"]["by_year"]["2018"]["passed"]
    )
    assert {name: s["strict"]["max_points"] for name, s in systems.items()} == dict.fromkeys(systems, 1491)

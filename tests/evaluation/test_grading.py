"""Grades, counts, and the published points."""

import dataclasses
import json
from collections import Counter

import pytest

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Question, load_exam
from medllm_jax.evaluation.extraction.extract import Extraction, extract
from medllm_jax.evaluation.grading import grade, grade_by_tier, read_grades, score_official, summarize, write_grades

# Points of 2018, 2019 and 2020: github.com/jungokasai/IgakuQA, table 1 of arXiv 2303.18027.
PUBLISHED = {
    "gpt4": (382, 385, 387),
    "chatgpt": (266, 250, 266),
    "gpt3": (209, 210, 208),
    "student-majority": (472, 470, 471),
    "translate_chatgpt-en": (281, 274, 263),
}


def choice(id="q", gold=("a",), k=1, points=1, year=None):
    return Question(
        id=id,
        text="?",
        choices=("一", "二", "三", "四"),
        gold=frozenset(map(frozenset, gold)),
        k=k,
        points=points,
        year=year,
    )


def number(*numbers, boxes=None):
    return Question(id="n", text="?", numbers=numbers, boxes=boxes)


def letters(text):
    return Extraction(letters=frozenset(text), rule="letters")


def test_letters_are_right_when_they_are_an_accepted_set():
    assert grade(choice(gold=("ac",), k=2), letters("ca")).correct
    assert not grade(choice(gold=("ac",), k=2), letters("ab")).correct
    assert grade(choice(gold=("a", "d")), letters("a")).correct
    assert grade(choice(gold=("a", "d")), letters("d")).correct
    assert not grade(choice(gold=("a", "d")), letters("b")).correct


def test_points_are_those_of_the_question():
    assert grade(choice(points=3), letters("a")).points == 3
    assert grade(choice(points=3), letters("b")).points == 0
    excluded = grade(choice(points=0), letters("a"))
    assert (excluded.correct, excluded.points) == (True, 0)


def test_a_wrong_count_is_wrong_even_where_its_letters_hold_the_gold():
    found = extract(choice(gold=("a", "d")), "a,d")
    assert found.problem == "wrong_count"
    assert not grade(choice(gold=("a", "d")), found).correct


@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        (number("26", "26", boxes="①②"), "26", True),
        (number("26", "26", boxes="①②"), "26.0", True),
        (number("26", "26", boxes="①②"), "25", False),
        (number("7.20", "7.20", boxes="①.②③"), "7.2", True),
        (number("7.20", "7.20", boxes="①.②③"), "720", True),
        (number("7.20", "7.20", boxes="①.②③"), "72.0", False),
        (number("100", "10.0", boxes="①②.③"), "10.0", True),
        (number("100", "10.0", boxes="①②.③"), "10", True),
        (number("100", "10.0", boxes="①②.③"), "100", True),
        (number("100", "10.0", boxes="①②.③"), "1.00", False),
        (number("130", "1130", boxes="1, ①②③"), "1130", True),
        (number("130", "1130", boxes="1, ①②③"), "130", True),
        (number("04", "0.4", boxes="①.②"), "0.4", True),
        (number("04", "0.4", boxes="①.②"), "4", False),
        (number("21", boxes=""), "2.1", True),
        (number("21", boxes=""), "2.2", False),
        (number("21"), "2.1", False),
        (number("1,130"), "1130", True),
        (number("2.5"), "2.50", True),
    ],
)
def test_numbers_compare_as_decimals_and_as_boxes(question, text, right):
    assert grade(question, Extraction(number=text, rule="number")).correct is right


def test_boxes_filled_one_by_one_are_right():
    question = number("100", "10.0", boxes="①②.③")
    assert grade(question, extract(question, "①1②0③0")).correct


def test_counts():
    years = [2018, 2018, 2018, 2019, 2019, 2019]
    points = [1, 3, 1, 1, 0, 1]
    found = [
        letters("a"),
        letters("b"),
        Extraction(letters=frozenset("ab"), rule="letters", problem="wrong_count"),
        Extraction(problem="truncated", truncated=True),
        letters("a"),
        Extraction(letters=frozenset("a"), rule="mentioned", lenient=True),
    ]
    questions = [choice(id=str(i), points=p, year=y) for i, (p, y) in enumerate(zip(points, years, strict=True))]
    s = summarize([grade(q, f) for q, f in zip(questions, found, strict=True)])
    assert (s.n, s.correct, s.points, s.max_points) == (6, 2, 1, 7)
    assert (s.accuracy, s.weighted_accuracy) == (pytest.approx(2 / 6), pytest.approx(1 / 7))
    assert (s.unparseable, s.wrong_count, s.truncated, s.lenient_correct) == (2, 1, 1, 3)
    assert s.problems == {"truncated": 1, "wrong_count": 1, "unparseable": 1}
    assert s.rules == {"letters": 4, "mentioned": 1}
    assert {y: (t.n, t.correct, t.max_points) for y, t in s.by_year.items()} == {2018: (3, 1, 5), 2019: (3, 1, 2)}
    as_json = json.loads(json.dumps(s.as_dict()))
    assert as_json["accuracy"] == s.accuracy
    assert as_json["by_year"]["2018"]["weighted_accuracy"] == pytest.approx(1 / 5)


def test_every_question_stays_in_the_denominator():
    grades = [grade(choice(), Extraction(problem="empty")), grade(choice(), letters("a"))]
    assert summarize(grades).accuracy == 0.5
    assert summarize([]).accuracy == 0.0


def test_the_official_rule_is_an_exact_match():
    question = choice(gold=("ac",), k=2, points=3)
    assert score_official(question, "a,c") == score_official(question, "c,a") == 3
    assert score_official(question, "a, c") == score_official(question, "ac") == score_official(question, "") == 0
    assert score_official(choice(gold=("a", "d")), "d") == 1
    assert score_official(choice(gold=("a", "d")), "a,d") == 0
    assert score_official(number("1.2", "1.2", boxes="①.②"), "1.2") == 1
    assert score_official(number("1.2", "1.2", boxes="①.②"), "12") == 0


def test_tiers_differ_in_what_they_read():
    question = choice(gold=("ac",), k=2, points=3)
    for text, right in (("a,c", "osl"), ("a, c", "sl"), ("迷うが、aとcが正しい気がする", "l"), ("b,d", "")):
        found = grade_by_tier(question, text)
        assert "".join(tier[0] for tier, g in found.items() if g.correct) == right, text
    credited = dataclasses.replace(question, credited=True)
    for text in ("b", "", "わからない"):
        assert all(g.correct for g in grade_by_tier(credited, text).values())
    assert grade_by_tier(credited, "")["strict"].problem == "empty"


def test_a_contraindicated_choice_counts_in_the_tier_that_reads_it():
    question = dataclasses.replace(choice(), contraindicated=frozenset("d"))
    counts = {text: summarize([grade_by_tier(question, text)["strict"]]).contraindicated for text in ("d", "a", "")}
    assert counts == {"d": 1, "a": 0, "": 0}
    loose = grade_by_tier(question, "dがよいだろうと思う")
    assert (loose["strict"].contraindicated, loose["lenient"].contraindicated) == (False, True)


def licensing_exam(required, general, contraindicated):
    """Grades of 2018 in which so many points are earned; its questions here are all worth one."""
    of = {"B": (200, required), "A": (299, general)}
    questions = [
        dataclasses.replace(choice(id=f"{s}{n}", year=2018), section=s, contraindicated=frozenset("d"))
        for s, (count, _) in of.items()
        for n in range(count)
    ]
    answers = ["a" if int(q.id[1:]) < of[q.section][1] else "b" for q in questions]
    wrong = [n for n, answer in enumerate(answers) if answer == "b"][:contraindicated]
    return [grade(q, letters("d" if n in wrong else answers[n])) for n, q in enumerate(questions)]


@pytest.mark.parametrize(
    ("required", "general", "contraindicated", "passed"),
    [(160, 208, 0, True), (159, 299, 0, False), (200, 207, 0, False), (160, 208, 3, True), (160, 208, 4, False)],
)
def test_all_three_thresholds_must_hold(required, general, contraindicated, passed):
    found = summarize(licensing_exam(required, general, contraindicated))
    assert (found.required.points, found.general.points) == (required, general)
    assert (found.contraindicated, found.passed) == (contraindicated, passed)


def test_a_part_of_an_exam_is_neither_passed_nor_failed():
    grades = licensing_exam(200, 299, 0)
    assert summarize(grades).passed and summarize(grades[1:]).passed is None
    two_years = [*grades, *(dataclasses.replace(g, year=2019) for g in grades)]
    assert summarize(two_years).passed is None and summarize(two_years).by_year[2018].passed


def test_groups_tell_questions_apart():
    grades = [
        grade(dataclasses.replace(choice(id="1", year=2018), section="A", case="1"), letters("a")),
        grade(dataclasses.replace(choice(id="2", year=2018), section="A", case="1"), letters("b")),
        grade(dataclasses.replace(choice(id="3", gold=("ac",), k=2, year=2018), section="C"), letters("ac")),
        grade(number("26"), Extraction(number="26", rule="number")),
    ]
    groups = {name: (group.n, group.correct) for name, group in summarize(grades).groups.items()}
    assert groups == {
        "section A": (2, 1),
        "section C": (1, 1),
        "1 answer": (2, 1),
        "2 answers": (1, 1),
        "a number": (1, 1),
        "first of a case": (1, 1),
        "follow-up questions": (1, 0),
        "without a case": (2, 2),
    }
    assert summarize(grades[:2]).groups.keys() == {"first of a case", "follow-up questions"}


def test_grades_are_read_as_they_were_written(tmp_path):
    grades = [*licensing_exam(2, 3, 1)[:3], grade(number("26"), Extraction(problem="truncated", truncated=True))]
    write_grades(tmp_path / "grades.jsonl", grades)
    assert read_grades(tmp_path / "grades.jsonl") == grades
    (tmp_path / "grades.jsonl").write_text('{"id": "q"}\n')
    with pytest.raises(UserError, match=r"grades.jsonl:1: the field 'kind' is missing"):
        read_grades(tmp_path / "grades.jsonl")


def _predictions(igakuqa, system):
    files = sorted((igakuqa / "baseline_results").glob(f"*/???-?_{system}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("system", PUBLISHED)
def test_the_published_points_are_reproduced(igakuqa, system):
    questions = {q.id: q for q in load_exam(igakuqa).questions}
    predictions = _predictions(igakuqa, system)
    assert {p["problem_id"] for p in predictions} == set(questions)
    points = Counter()
    for p in predictions:
        points[questions[p["problem_id"]].year] += score_official(questions[p["problem_id"]], p["prediction"])
    assert (points[2018], points[2019], points[2020]) == PUBLISHED[system]


@pytest.mark.parametrize("system", PUBLISHED)
def test_the_extractor_reads_at_least_what_the_official_rule_reads(igakuqa, system):
    questions = {q.id: q for q in load_exam(igakuqa).questions}
    compared = 0
    for p in _predictions(igakuqa, system):
        question = questions[p["problem_id"]]
        ours = grade(question, extract(question, p["prediction"]))
        assert ours.points >= score_official(question, p["prediction"]), p
        compared += score_official(question, p["prediction"]) > 0
    assert compared > 400

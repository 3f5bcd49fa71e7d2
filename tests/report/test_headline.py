"""The sentence at the head of a report says what the grades say, and no more than that."""

import dataclasses

import pytest

from medllm_jax.config.load import load_run_config
from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.grading import grade
from medllm_jax.report.collect import RecordedRun, Results
from medllm_jax.report.headline import of_exam, of_page
from medllm_jax.report.scored import Scored


def model(name, questions=100, **right):
    """Scores of a model that answers the first so many questions right, under each condition."""
    grades = {}
    for condition, count in right.items():
        asked = [
            Question(id=f"q{n}", text="?", choices=("x", "y"), gold=frozenset({frozenset("a")}))
            for n in range(questions)
        ]
        answers = ["a" if n < count else "b" for n in range(questions)]
        grades[condition] = [
            grade(question, extract(question, answer, "stop", "answer_only"))
            for question, answer in zip(asked, answers, strict=True)
        ]
    return Scored.of(Results(name, None, "small", name, grades, None, None))


CPT = model("cpt", answer_only=93, explain=79)
RPO = model("rpo", answer_only=96, explain=93)
SAME = model("same", answer_only=50, explain=50)
BASE = model("base", answer_only=40, explain=46)
ALONE = model("gpt", answer_only=60)


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (
            [CPT, RPO],
            "rpo answers 93.0 % of 100 questions right with an explanation, 3.0 percentage points fewer than without "
            "(may be chance); cpt loses 14.0",
        ),
        ([SAME], "same answers 50.0 % of 100 questions right with an explanation, as many as without"),
        (
            [BASE, SAME, ALONE],
            "same answers 50.0 % of 100 questions right with an explanation, as many as without; base gains 6.0; "
            "1 model asked in one way only",
        ),
        ([BASE], "base answers 46.0 % of 100 questions right with an explanation, 6.0 percentage points more than "
         "without"),
        ([ALONE], "gpt answers 60.0 % of 100 questions right without explaining"),
        (
            [ALONE, model("small", 10, answer_only=1)],
            "gpt answers 60.0 % of 100 questions right without explaining; small 10.0 % of 10 questions",
        ),
        ([model("one", 1, explain=1)], "one answers 100.0 % of 1 question right with an explanation"),
        (
            [ALONE, *(model(f"m{n}", answer_only=n) for n in range(5))],
            "gpt answers 60.0 % of 100 questions right without explaining; m0 0.0 %; m1 1.0 %; m2 2.0 %; "
            "and 2 more models",
        ),
    ],
)  # fmt: skip
def test_what_an_exam_came_to(models, sentence):
    assert of_exam(models).sentence == sentence
    assert of_page([], [models]) == of_exam(models)


def test_intervals_are_told_beside_it():
    low, high = (100 * end for end in RPO.change.difference.interval)
    assert low < 0 <= high
    found = of_exam([CPT, RPO]).intervals
    assert found.startswith("95 % intervals: rpo ") and "; cpt " in found
    assert f"% with an explanation, \u2212{-low:.1f} to {high:+.1f} by explaining; cpt" in found


def test_of_several_exams_each_has_its_own():
    assert of_page([], [[CPT, RPO], [RPO, ALONE]]).sentence == "3 models on 2 exams"


def test_of_runs_alone():
    config = load_run_config("configs/runs/cpt-tiny.yaml", [])
    run = RecordedRun("cpt", config, [{"step": 1, "loss": 3.0}, {"step": 1200, "loss": 0.5}])
    assert of_page([run], []).sentence == "cpt has taken 1,200 of 100 steps, loss 3.00 to 0.50"
    begun = dataclasses.replace(run, name="new", metrics=[])
    assert of_page([run, begun], []).sentence.endswith("0.50; new has taken no step yet")
    assert of_page([], []).sentence == "No exam has been answered yet"

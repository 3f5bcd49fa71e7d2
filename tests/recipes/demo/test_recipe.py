"""The demo's folder and its table; `.ci/run` runs the whole of it."""

import json

import pytest

from medllm_jax.errors import UserError
from medllm_jax.evaluation.evaluate import evaluate
from medllm_jax.evaluation.exam import load_exam
from medllm_jax.evaluation.extraction.extract import Extraction
from medllm_jax.evaluation.grading import grade, write_grades
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.evaluation.sampling import Completion, Sampler
from medllm_jax.recipes.demo import recipe, stages
from medllm_jax.recipes.demo.author import TEMPLATE
from tests.tiny import write_json_lines


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"seed": 1, "recipe": stages.recipe_digest()}, "a demo of another seed"),
        (stages.identity(0, stages.STUDY), "a demo of another version"),
        ({"seed": 0, "recipe": "of old"}, "a demo of another version"),
        ({"seed": 0}, "a demo of another version"),
        (None, "is not empty and holds no demo"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, kept, said):
    (tmp_path / "mine").touch()
    if kept is not None:
        (tmp_path / "demo.json").write_text(json.dumps(kept))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=said):
        recipe.run_demo(str(tmp_path), 0, None)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "writer.json") == before


def fixed(texts):
    """A model that says these things in turn, whatever it is asked."""
    left = iter(texts)

    def sample(prompts, seeds, params):
        return ((Completion(next(left), "stop"),) for _ in prompts)

    return Sampler("a model", "nowhere", sample)


def test_the_table_says_what_became_of_the_questions_that_explaining_costs(tmp_path):
    rows = [
        {"id": str(number), "question": "?", "choices": ["赤", "青"], "answer": "a", "explanation": "。"}
        for number in range(4)
    ]
    exam, template = load_exam(write_json_lines(tmp_path / "exam.jsonl", rows)), load_template(TEMPLATE)
    said = ["赤", "赤", "赤", "青", "。\n答え:青", "。\n答え:白", "。\n答え:赤", "。\n答え:赤"]
    for _, name in recipe.MODELS:
        folder = tmp_path / "evaluation" / name
        evaluate(exam, template, stages.CONDITIONS, fixed(said), folder)
        for condition, chosen in zip(stages.CONDITIONS, ("aaab", "abbb"), strict=True):
            letters = (Extraction(letters=frozenset(letter)) for letter in chosen)
            write_grades(folder / f"likeliest-{condition}.jsonl", list(map(grade, exam.questions, letters)))
    header, _, base, *_ = recipe._table(tmp_path).splitlines()
    assert header.split(" | ")[4:7] == ["lost", "of these unreadable", "gained"]
    assert base == "| base | 0.750 | 0.500 | -0.250 | 2 | 1 | 1 | 0.750 | 0.250 |"

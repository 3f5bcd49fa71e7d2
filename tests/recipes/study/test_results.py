"""Files of results, what explanations say, and the page that is made."""

import json
from pathlib import Path

import pytest

from medllm_jax.cli import main
from medllm_jax.errors import UserError
from medllm_jax.recipes.demo.stages import recipe_digest
from medllm_jax.recipes.demo.wordings import explained
from medllm_jax.recipes.demo.world import facts
from medllm_jax.recipes.study import page, statistics, tables
from medllm_jax.recipes.study.explanations import FALSE, NOTHING, OTHER, TRUE, contradicts, kind
from medllm_jax.recipes.study.results import file_of, read_study, write_seed
from medllm_jax.recipes.study.verdicts import accuracies
from tests.recipes.study.conftest import seed_results

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    for seed in (1, 0):
        write_seed(tmp_path / "study", seed_results(seed, {"base": (0.6, 0.3)}))
    return tmp_path / "study"


def test_what_is_written_is_read_in_the_order_of_seeds(folder):
    assert read_study(folder) == [seed_results(seed, {"base": (0.6, 0.3)}) for seed in (0, 1)]


def change(file, path, value):
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["format"], 0, "no result of a study in format 2"),
        (["recipe"], "another", "of different versions of the recipe"),
        (["seed"], 7, "seed-0.json holds seed 7"),
        (["seed"], "0", "damaged"),
        (["exams", "test", "right"], "ab", "damaged"),
        (["exams", "test", "cases"], [0], "damaged"),
        (["answers", "written", "cpt", "test", "explain"], "ab", "answers of cpt to test"),
        (["answers", "likeliest", "cpt", "test", "explain"], "~" * 80, "answers of cpt to test, likeliest"),
        (["answers", "written", "cpt"], {}, "damaged"),
        (["explained", "cpt", "test"], "?" * 80, "explanations of cpt"),
        (["contradicts", "cpt", "test"], "2" * 80, "contradictions of cpt"),
        (["curves", "rpo"], {"margins": [[1]], "chosen": []}, "damaged"),
        (["curves", "rpo", "entropy"], [[1, 0.5]], "curves of rpo"),
        (["curves", "rpo"], {}, "damaged"),
        (["curves"], {}, "damaged"),
        (["more"], 1, "damaged"),
    ],
)
def test_what_is_not_a_result_is_refused(folder, path, value, said):
    change(file_of(folder, 0), path, value)
    with pytest.raises(UserError, match=said):
        read_study(folder)


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main(["demo", "--results", str(tmp_path)]) == 2
    assert "seed-N.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--seeds", "1"], ["--study", "--seed", "1"], ["--results", "x", "--workdir", "y"]]
)
def test_options_that_do_not_belong_together_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options]) == 2
    assert not list(tmp_path.iterdir())


def test_a_page_is_made_and_made_again_within_what_is_written_by_hand(folder, capsys):
    assert main(["demo", "--results", str(folder)]) == 0
    made = folder.with_name("study.md")
    assert capsys.readouterr().out.strip() == str(made)
    first = made.read_text()
    names = ["losses.png", "margins.png", "stages-likeliest.png", "stages.png"]
    assert sorted(file.name for file in folder.glob("*.png")) == names
    assert all(f"study/{name}" in first for name in names)

    made.write_text(f"Before.\n{first}After.\n")
    write_seed(folder, seed_results(2))
    page.write_page(folder)
    second = made.read_text()
    assert second.startswith("Before.\n") and second.endswith("After.\n")
    assert "Seeds 0, 1, 2;" in second and "Seeds 0, 1;" not in second


def test_a_page_of_something_else_is_left_alone(folder):
    folder.with_name("study.md").write_text("mine")
    with pytest.raises(UserError, match="no lines"):
        page.write_page(folder)
    assert folder.with_name("study.md").read_text() == "mine"


def test_a_run_is_told_by_the_last_fifth_of_its_metrics_and_what_it_got_right():
    study = [seed_results(seed, {"rpo": (1.0, 0.0)}) for seed in (0, 1)]
    told = tables.training(study, accuracies(study)["test"])
    (row,) = [line for line in told.splitlines() if line.startswith("| CPT + RPO ")]
    assert row == "| CPT + RPO | 0.950 | 0.95 | +0.95 | +0.95 | 0.10 | 0.95 | 1.000 | 0.000 |"


def test_variants_are_told_against_one_of_them(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    study = [seed_results(seed, {"rpo": (1.0, 0.0), "dpo": (0.0, 1.0)}) for seed in (0, 1)]
    told = tables.against(accuracies(study)["test"], "rpo")
    assert not any(line.startswith("| CPT + RPO ") for line in told.splitlines())
    (row,) = [line for line in told.splitlines() if line.startswith("| CPT + DPO ")]
    lost, won, twice = (f"{value:+.3f} ({value:+.3f} to {value:+.3f})" for value in (-1, 1, -2))
    assert row == f"| CPT + DPO | {lost} | {won} | {twice} |"


def test_the_published_page_is_what_the_code_makes_of_the_published_results():
    results = DOCS / "study"
    study = read_study(results)
    text = DOCS.joinpath("study.md").read_text(encoding="utf-8")
    assert page.made(study, results.name) in text, "run: medllm demo --results docs/study"
    assert {file.stem for file in results.glob("*.png")} == set(page.PICTURES)


def test_the_published_results_are_of_this_recipe_and_of_enough_seeds():
    study = read_study(DOCS / "study")
    assert study[0].recipe == recipe_digest(), "the recipe has changed: run the study again"
    assert len(study) >= 5


# --- explanations ----------------------------------------------------------------------------------------------------

HEART, LUNG = "心筋梗塞", "肺結核"


def said(disease, *attributes, about=None):
    text = "".join(explained(facts()[disease][attribute]) for attribute in attributes)
    return text.replace(disease, about or disease)


@pytest.mark.parametrize(
    ("explanation", "expected"),
    [
        (said(HEART, "部位", "背景"), TRUE),
        (said(LUNG, "部位", "治療"), OTHER),
        (said(LUNG, "部位", "治療", about=HEART), OTHER),
        (said(HEART, "背景") + said(LUNG, "治療", about=HEART), FALSE),
        ("分からない。", NOTHING),
        ("", NOTHING),
    ],
)
def test_kinds_of_explanations(explanation, expected):
    assert kind(explanation, HEART) == expected


def test_an_answer_contradicts_what_no_disease_has_together_with_it():
    about = said(HEART, "部位", "背景")
    right, elsewhere = facts()[HEART]["治療"].value, facts()[LUNG]["治療"].value
    assert not contradicts(about, "治療", right)
    assert contradicts(about, "治療", elsewhere)
    assert not contradicts(said(LUNG, "部位", "検査"), "治療", elsewhere), "false of the disease, and yet consistent"
    assert not contradicts("分からない。", "治療", elsewhere)
    assert not contradicts(about, "診療科", HEART), "the other way round, the answer is a disease"
    assert contradicts(about, "診療科", LUNG)

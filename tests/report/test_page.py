"""The report says what the files say, shows no output that was not asked for, and names what it cannot read."""

import json
import re
import shutil

import pytest

from medllm_jax.cli import main
from medllm_jax.evaluation.grading import write_grades
from medllm_jax.report.collect import collect
from tests.evaluation.test_evaluate import EXAM
from tests.evaluation.test_grading import licensing_exam
from tests.report.elements import cells, ids, parsed, table, text
from tests.report.elements import place as place_of

OVERLAP = ("n", "threshold", "questions", "overlapping", "share")


def report(tmp_path, *arguments):
    code = main(["report", *map(str, arguments), "--output", str(tmp_path / "out")])
    return (tmp_path / "out/report.html").read_text("utf-8") if code == 0 else code


def test_the_page_holds_what_the_files_say(place, tmp_path):
    html = report(tmp_path, place / "cpt", place / "rpo", place / "exams/base")
    page = parsed(html)
    runs = cells(page, "Runs")
    assert [row[0] for row in runs[1:]] == ["cpt", "rpo"]
    assert (runs[1][4], runs[1][7]) == ("700 of 100", f"{700 * 2048:,}")
    points = {(row[0], row[1]): row[2:] for row in cells(page, "Points, and accuracy by points and by questions")[1:]}
    assert points["rpo", "answer only"] == ["2", "1", "3", "0.500", "0.500"]
    assert points["base", "with explanation"] == ["2", "0", "2", "0.333", "0.333"]
    (base,) = (row for row in cells(page, "The drop under explanation, in questions (points)") if row[0] == "base")
    assert base == ["base", "0 (0)", "0 (0)", "0 (0)", "0 (0)", "+0 (+0)"]
    assert "1 of 6 questions\n(16.7 %) share 50 % or more" in html
    assert cells(page, "Likeliest letters right")[1] == ["rpo", "small", "700", "6", "0.500", "0.500"]
    pictures = {path.stem for path in (tmp_path / "out/figures").iterdir()}
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == {
        f"{name}.{kind}" for name in pictures for kind in ("svg", "png")
    }
    assert {"loss", "grad_norm", "accuracy-small", "drop-small"} <= pictures
    assert {"rewards-margins", "rewards-chosen", "entropy"} <= pictures
    assert html.count("<img ") == html.count("data:image/svg+xml;base64,") == len(pictures)
    assert all(alt for alt in re.findall(r'alt="([^"]*)"', html)) and "dots: held out" in html


def test_models_are_compared_with_the_first_question_by_question(place, tmp_path):
    html = report(tmp_path, place / "exams/base", place / "rpo")
    header, *rows = cells(parsed(html), "Against base, by points, with 95 % intervals")
    assert header[3:] == ["only base right", "only this right", "McNemar's p"]
    # Right in base alone is q2; in rpo alone q0, which base left open, and q1, as long as it need not explain.
    assert [[row[0], row[1], row[2].partition(" ")[0], *row[3:]] for row in rows] == [
        ["rpo", "answer only", "+0.167", "1", "2", "1"],
        ["rpo", "with explanation", "+0.000", "1", "1", "1"],
    ]
    assert "Against" not in report(tmp_path, place / "rpo")


def test_models_of_other_questions_are_not_compared(place, tmp_path):
    few = shutil.copytree(place / "exams/base", tmp_path / "few")
    for condition in ("answer_only", "explain"):
        _cut(few / f"grades-{condition}.jsonl")
    (few / "scores.json").write_text((few / "scores.json").read_text("utf-8").replace('"n": 6', '"n": 5'), "utf-8")
    rows = cells(parsed(report(tmp_path, place / "rpo", few)), "Against rpo, by points, with 95 % intervals")
    assert [row[2:] for row in rows[1:]] == [["of other questions", "-", "-", "-"]] * 2


def test_outputs_are_shown_only_where_asked_for(place, tmp_path):
    assert "乙" not in report(tmp_path, place / "rpo")
    html = report(tmp_path, place / "rpo", place / "exams/base", "--example", "q1")
    assert '<pre lang="ja">b: 乙 &lt;b&gt; &amp; &#34;b&#34;</pre>' in html and "<b>" not in html
    assert "<strong>rpo</strong>, answer only: right; read: b" in html and "Question q1" in html
    assert "q2" not in html.partition("Examples")[2]


def test_every_number_leads_to_as_many_questions(place, tmp_path):
    page = parsed(report(tmp_path, place / "exams/base", place / "rpo"))
    counts = {"The drop under explanation, in questions (points)": slice(1, 5)}
    counts |= {"Against base, by points, with 95 % intervals": slice(3, 5)}
    counts |= {"No answer, or a wrong number of letters": slice(1, None)}
    counts |= {"Points, and accuracy by points and by questions": slice(-3, -2)}
    led = 0
    for caption, columns in counts.items():
        for row in table(page, caption)[1:]:
            for cell in row[columns]:
                number, link = int(text(cell).partition(" ")[0]), next(cell.iter("a"), None)
                assert (link is not None) == (number > 0), (caption, text(cell))
                if link is not None:
                    listed = place_of(page, link.get("href"))
                    assert len(ids(listed)) == len(set(ids(listed))) == number
                    assert text(next(listed.iter("h4"))).endswith(f": {number}")
                    led += 1
    assert led >= 8
    for link in page.iter("a"):
        place_of(page, link.get("href"))
    rows = table(page, "Points, and accuracy by points and by questions")
    (link,) = (row[-1].find("a") for row in rows if [text(cell) for cell in row[:2]] == ["rpo", "answer only"])
    right = place_of(page, link.get("href"))
    assert ids(right) == ["q0", "q1", "q4"]
    assert text(right).endswith("Show one: --example q0")


def test_lists_lead_to_what_is_shown(place, tmp_path):
    page = parsed(report(tmp_path, place / "rpo", place / "exams/base", "--example", "q1", "--example", "gained"))
    links = [a for a in page.iter("a") if text(a) == "q1"]
    assert links and {text(place_of(page, a.get("href")).find("h3")) for a in links} == {"Question q1"}
    assert not [a for a in page.iter("a") if text(a) == "q3"]


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (["q3", "q1", "q3"], ["q3", "q1"]),
        (["lost"], ["q1"]),
        (["lost", "wrong"], ["q1", "q2", "q3", "q5"]),
        (["unreadable"], ["q1"]),
        (["all"], ["q0", "q1", "q2", "q3", "q4", "q5"]),
    ],
)
def test_examples_by_what_came_of_them(place, tmp_path, asked, shown):
    page = parsed(report(tmp_path, place / "rpo", *(word for each in asked for word in ("--example", each))))
    assert [text(h3) for h3 in page.iter("h3") if text(h3).startswith("Question q")] == [f"Question {i}" for i in shown]


def test_a_kind_that_no_question_is_of_is_told(place, tmp_path, capsys):
    assert "Side by side" not in report(tmp_path, place / "exams/base", "--example", "lost")
    assert "--example lost: there is no question that a model answered rightly alone" in capsys.readouterr().err


def test_right_answers_stand_beside_each_models(place, tmp_path, capsys):
    exam = tmp_path / "exam.jsonl"
    rows = [
        {"id": q.id, "question": q.text, "choices": list(q.choices), "answer": "".join(*q.gold)} for q in EXAM.questions
    ]
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = place / "rpo", place / "exams/base"
    page = parsed(report(tmp_path, *folders, "--example", "q1", "--example", "q2", "--exam", exam))
    header, one, two = cells(page, "Answers side by side")
    assert header[:3] == ["question", "right answer", "rpo, answer only"]
    assert one == ["q1", "b", "b ✓", "unparseable (mentions b) ✗", "a ✗", "a ✗"]
    assert two[:3] == ["q2", "a", "wrong count (a,b) ✗"]
    (article,) = (each for each in page.iter("article") if text(each.find("h3")) == "Question q1")
    assert "問1はどれか。" in text(article) and "Right answer: b" in text(article)
    choices = next(article.iter("ol"))
    assert [(text(li), li.get("class")) for li in choices] == [("a. 甲", None), ("b. 乙 ✓", "right")]
    # Nothing of an exam is on a page because its path was given, but what was asked for.
    assert "問3" not in text(page)
    assert report(tmp_path, *folders, "--exam", exam) == 2
    assert "--exam shows questions beside the outputs to them: name some by --example ID" in capsys.readouterr().err
    _cut(exam)
    assert report(tmp_path, *folders, "--exam", exam, "--example", "q1") == 2
    assert "--exam exam: these results are of other questions than it holds" in capsys.readouterr().err


def test_japanese_is_marked_as_such(place, tmp_path):
    shutil.copytree(place / "exams/base", tmp_path / "基盤モデル v2")
    page = parsed(report(tmp_path, tmp_path / "基盤モデル v2", place / "rpo", "--example", "q1"))
    assert page.find("html").get("lang") == "en"
    spoken = _spoken(page.find("html"), "en")
    japanese = [(said, tongue) for said, tongue in spoken if re.search("[ぁ-ヿ一-鿿]", said)]
    assert len(japanese) > 10 and {tongue for _, tongue in japanese} == {"ja"}
    assert ("with explanation", "en") in spoken
    svg = (tmp_path / "out/figures/accuracy-small.svg").read_text("utf-8")
    assert ">基盤モデル v2</text>" in svg and "sans-serif" in svg


def _spoken(element, tongue):
    """Every piece of text and the language it is in."""
    tongue = element.get("lang", tongue)
    found = [(element.text.strip(), tongue)] if element.text and element.text.strip() else []
    for child in element:
        found += _spoken(child, tongue) if child.tag not in ("style", "code") else []
        found += [(child.tail.strip(), tongue)] if child.tail and child.tail.strip() else []
    return found


def test_the_licensing_exam_shows_its_parts(tmp_path):
    folder = tmp_path / "scored"
    folder.mkdir()
    write_grades(folder / "grades-answer_only.jsonl", licensing_exam(160, 208, 4))
    (folder / "scores.json").write_text(json.dumps({"exam": "igakuqa", "model": "gpt9"}))
    html = report(tmp_path, folder)
    row = ["scored", "answer only", "2018", "160/200", "208/299", "4", "no"]
    assert cells(parsed(html), "Parts of the licensing exam")[1] == row
    assert "The drop under explanation" not in html and "No run folder was given" in html


def test_a_run_that_has_just_begun(place, tmp_path):
    shutil.copytree(place / "cpt", tmp_path / "new")
    (tmp_path / "new/metrics.jsonl").unlink()
    html = report(tmp_path, tmp_path / "new")
    assert "new has no metrics yet." in html and "No exam results were given" in html and "<img" not in html


def test_damaged_metrics_are_left_out_with_a_word(place, tmp_path, capsys):
    shutil.copytree(place / "cpt", tmp_path / "new")
    with (tmp_path / "new/metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0}\n{"step": "x", "loss": 1}\n{"step": true}\n{"step": 1' + "0" * 99 + "}\n")
        file.write('{"step": 701, "loss": "NaN", "tokens": null, "mfu": [1], "grad_norm": 1' + "0" * 99 + "}\n")
        file.write('{"step": 702, "loss": NaN, "tokens_per_second": Infinity}\n')
    assert "702 of" in report(tmp_path, tmp_path / "new")
    assert "metrics.jsonl can't be read, the first is line 701" in capsys.readouterr().err


def test_exams_of_long_and_alike_names_have_pictures_of_their_own(place, tmp_path):
    folders = []
    for number, name in enumerate(["医" * 300, "師" * 300, "../" * 100]):
        folders.append(tmp_path / str(number))
        shutil.copytree(place / "exams/base", folders[-1])
        _change(folders[-1] / "scores.json", '"exam": "small"', json.dumps({"exam": name}, ensure_ascii=False)[1:-1])
    report(tmp_path, *folders)
    figures = sorted(file.name for file in (tmp_path / "out/figures").iterdir())
    assert len([name for name in figures if name.startswith("accuracy")]) == 2 * 3 and max(map(len, figures)) < 100


def test_names_tell_folders_apart(place, tmp_path):
    for name in ("one/cpt", "two/cpt"):
        shutil.copytree(place / "cpt", tmp_path / name)
    runs, results = collect([str(tmp_path / "one/cpt"), str(tmp_path / "two/cpt"), str(place / "rpo")])
    assert [run.name for run in runs][:2] == ["one/cpt", "two/cpt"] and not [r for r in results if r.name == "small"]
    shutil.copytree(place / "rpo", tmp_path / "rpo")
    shutil.copytree(tmp_path / "rpo/evaluation/small", tmp_path / "rpo/evaluation/again")
    _, results = collect([str(tmp_path / "rpo"), str(tmp_path / "rpo")])
    assert [r.name for r in results] == ["rpo/again", "rpo/small"]
    shutil.copytree(place / "exams/base", tmp_path / "exams/rpo")
    _, results = collect([str(place / "rpo"), str(tmp_path / "exams/rpo")])
    assert [r.name for r in results] == ["rpo", "exams/rpo"]


def _without(place, tmp_path, change):
    shutil.copytree(place / "exams/base", tmp_path / "base")
    change(tmp_path / "base")
    return [tmp_path / "base"]


@pytest.mark.parametrize(
    ("change", "more", "line"),
    [
        (lambda f: (f / "scores.json").unlink(), [], "neither a run folder (no config.yaml in it) nor exam results"),
        (lambda f: (f / "scores.json").write_text("{"), [], "scores.json is not JSON"),
        (lambda f: (f / "scores.json").write_text("[]"), [], "scores.json: a JSON object is expected, found a list"),
        (lambda f: (f / "scores.json").write_text("{}"), [], "is not what `medllm evaluate` or `medllm score` writes"),
        (lambda f: [(f / f"grades-{c}.jsonl").unlink() for c in ("answer_only", "explain")], [], "no grades-*.jsonl"),
        (lambda f: _cut(f / "grades-explain.jsonl"), [], "holds 5 grades, and scores.json tells of 6"),
        (lambda f: (f / "grades-explain.jsonl").write_text(""), [], "grades-explain.jsonl holds no grade"),
        (
            lambda f: _change(f / "grades-explain.jsonl", '"max_points": 1', '"max_points": 1' + "0" * 400),
            [],
            "'max_points'",
        ),
        (lambda f: _change(f / "grades-explain.jsonl", '"q0"', r'"q0\ud800"'), [], "surrogate"),
        (lambda f: (f / "likelihood.json").write_text("{}"), [], "likelihood.json: the field 'n' is missing"),
        (lambda f: (f / "likelihood.json").write_text('{"n": 1, "accuracy": "x"}'), [], "likelihood.json: the field"),
        (lambda f: (f / "likelihood.json").write_text("[" * 10**5), [], "likelihood.json is not JSON"),
        (lambda f: _set_conditions(f, "/dev/null"), [], "scores.json is not what `medllm evaluate`"),
        (lambda f: _set_conditions(f, {"answer_only": None}), [], "scores.json is not what `medllm evaluate`"),
        (lambda f: _set_conditions(f, {"answer_only": {"n": True}}), [], "scores.json is not what `medllm evaluate`"),
        (lambda f: (f / "contamination.json").write_text('{"overlapping": null}'), [], "contamination.json: the field"),
        (lambda f: (f / "likelihood.json").write_text('{"n": 1' + "0" * 400 + "}"), [], "'n' is no number"),
        (
            lambda f: (f / "likelihood.json").write_text(
                '{"n": 1, "accuracy": 1, "weighted_accuracy": 1, "step": {"a": 1}}'
            ),
            [],
            "the field 'step' is",
        ),
        (lambda f: (f / "contamination.json").write_text('{"n": 1e999}'), [], "contamination.json is not JSON"),
        (
            lambda f: (f / "contamination.json").write_text(
                json.dumps(dict.fromkeys(OVERLAP, 1) | {"corpora": [["a"]]})
            ),
            [],
            "the field 'corpora' is [['a']]; a list of strings was expected",
        ),
        (lambda f: None, ["--example", "q77"], "--example q77: no question of these results has this id"),
        (lambda f: None, ["nowhere"], "nowhere: neither a run folder"),
    ],
)
def test_what_cannot_be_read_is_named(place, tmp_path, capsys, change, more, line):
    assert report(tmp_path, *_without(place, tmp_path, change), *more) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def _change(file, before, after):
    text = file.read_text("utf-8")
    assert before in text
    file.write_text(text.replace(before, after, 1), "utf-8")


def _set_conditions(folder, conditions):
    file = folder / "scores.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"conditions": conditions}), "utf-8")


def _cut(file):
    file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")

"""Reading exams: both layouts, every irregularity of the real files, and the error lines."""

import dataclasses
import json
import time

import pytest

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import load_exam, read_boxes

FIVE = ["一", "二", "三", "四", "五"]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def igakuqa_row(problem_id, answer, text="正しいのはどれか。", choices=FIVE, points="1", text_only=True):
    return {
        "problem_id": problem_id,
        "problem_text": text,
        "choices": choices,
        "text_only": text_only,
        "answer": answer,
        "points": points,
    }


def plain_row(**changes):
    return {"id": "q1", "question": "どれか。", "choices": FIVE, "answer": "b"} | changes


@pytest.fixture
def repository(tmp_path):
    """IgakuQA's layout, with one of each irregularity of the real files."""
    case = "次の文を読み、2〜4の問いに答えよ。70歳の男性。咳を主訴に来院した。"
    first = [
        igakuqa_row("112B1", ["a or d"], points="3"),
        igakuqa_row("112B2", ["c"], text=f"{case}まず行うのはどれか。"),
        igakuqa_row("112B3", ["b", "e"], text="CTで腫瘤を認めた。必要な検査はどれか。2つ選べ。", text_only=False),
        igakuqa_row("112B4", ["a"], text="治療はどれか。", points="0"),
        igakuqa_row("112B5", ["d"], text="別の問題で正しいのはどれか。"),
    ]
    second = [
        igakuqa_row("114C1", ["100"], text="計算せよ。解答：①②.③/人口1,000対", choices=[]),
        igakuqa_row("114C2", ["130"], text="求めよ。解答：1, ①②③ kcal", choices=[]),
        igakuqa_row("114C3", ["21"], text="求めよ。", choices=[]),
        igakuqa_row("114C4", ["g"], choices=list("ａｂｃｄｅｆｇｈ")),
        igakuqa_row("114C5", ["a"], choices=["\u3000"] * 4 + ["ｅ"]),
        igakuqa_row("114C6", ["b"], text="次の文を読み、以下の問いに答えよ。5歳の女児。診断はどれか。"),
        igakuqa_row("114C7", ["b"], text="検査はどれか。"),
        igakuqa_row("114C8", ["b"], text="治療はどれか。"),
        igakuqa_row("114C9", ["b"], text="最後の問題はどれか。"),
    ]
    write(tmp_path / "data/2018/112-B.jsonl", first)
    write(
        tmp_path / "data/2018/112-B_metadata.jsonl",
        [
            {"problem_id": "112B1", "category": "産科", "kinki": ["de"]},
            {"problem_id": "112B2", "category": "呼吸器", "kinki": ["ｂ", "c"]},
        ],
    )
    write(tmp_path / "data/2020/114-C.jsonl", second)
    for exam in ("2018/112", "2020/114"):
        for name in (f"{section}{end}" for section in "ABCDEF" for end in ("", "_metadata")):
            if not (file := tmp_path / f"data/{exam}-{name}.jsonl").exists():
                write(file, [])
    write(tmp_path / "data/2020/114-C_translate.jsonl", [{"problem_id": "114C1", "text_en": "translated"}])
    write(tmp_path / "baseline_results/2018/112-B_gpt4.jsonl", [{"problem_id": "112B1", "prediction": "a"}])
    return tmp_path


def by_id(path, **options):
    return {q.id: q for q in load_exam(path, **options).questions}


def test_the_order_and_the_fields_of_igakuqa(repository):
    exam = load_exam(repository, name="IgakuQA")
    assert exam.name == "IgakuQA"
    assert [q.id for q in exam.questions] == [f"112B{i}" for i in range(1, 6)] + [f"114C{i}" for i in range(1, 10)]
    question = by_id(repository)["112B3"]
    assert (question.exam, question.section, question.year, question.kind) == ("112-B", "B", 2018, "choice")
    assert (question.k, question.points, question.text_only) == (2, 1, False)
    assert question.gold == {frozenset("be")}
    assert question.letters == tuple("abcde")
    assert by_id(repository)["112B4"].points == 0


@pytest.mark.parametrize("folder", ["", "data", "data/2018"])
def test_every_level_of_the_folders_reads_the_same(repository, folder):
    whole = by_id(repository, years=[2018])
    assert len(whole) == 5
    assert {k: v for k, v in by_id(repository / folder).items() if v.year == 2018} == whole


def test_one_file_reads_as_it_does_in_its_folder(repository):
    assert by_id(repository / "data/2018/112-B.jsonl") == by_id(repository, years=[2018])


def test_a_gold_with_alternatives_accepts_each_of_them(repository):
    question = by_id(repository)["112B1"]
    assert question.gold == {frozenset("a"), frozenset("d")}
    assert question.k == 1


def test_numbers_are_read_through_their_boxes(repository):
    questions = by_id(repository)
    assert (questions["114C1"].kind, questions["114C1"].choices) == ("number", ())
    assert (questions["114C1"].numbers, questions["114C1"].boxes) == (("100", "10.0"), "①②.③")
    assert questions["114C2"].numbers == ("130", "1130")
    assert (questions["114C3"].numbers, questions["114C3"].boxes) == (("21",), "")
    assert read_boxes("①.②", "04") == "0.4"
    assert read_boxes("①.②③", "7.20") == "7.20"
    assert read_boxes("①②", "123") is None


def test_more_than_five_choices_and_blank_ones(repository):
    questions = by_id(repository)
    assert questions["114C4"].gold == {frozenset("g")}
    assert questions["114C4"].letters == tuple("abcdefgh")
    assert questions["114C5"].choices[0] == "\u3000"


def test_metadata_gives_categories_and_contraindicated_choices(repository):
    questions = by_id(repository)
    assert (questions["112B1"].category, questions["112B1"].contraindicated) == ("産科", frozenset("de"))
    assert questions["112B2"].contraindicated == frozenset("bc")
    assert questions["112B3"].category == ""


def test_follow_ups_know_their_case(repository):
    questions = by_id(repository)
    case = "70歳の男性。咳を主訴に来院した。"
    assert {k for k, q in questions.items() if q.stem} == {"112B3", "112B4", "114C7", "114C8"}
    assert questions["112B3"].stem == case
    assert questions["112B4"].stem == f"{case}\nCTで腫瘤を認めた。"
    assert questions["114C8"].stem == "5歳の女児。"
    prepended = by_id(repository, prepend_stems=True)
    assert prepended["112B3"].text == f"{case}\n{questions['112B3'].text}"
    assert prepended["112B2"] == questions["112B2"]
    assert dataclasses.replace(prepended["112B3"], text=questions["112B3"].text) == questions["112B3"]


def test_choosing(repository):
    assert {q.year for q in load_exam(repository, years=[2020]).questions} == {2020}
    assert "112B3" not in by_id(repository, text_only=True)
    assert list(by_id(repository, limit=2)) == ["112B1", "112B2"]


# --- the generic form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letters", "k"), [("b", 5, 1), (["a", "C"], 5, 2), ("a,g", 7, 2), (["a or b"], 5, 1), ("e", 5, 1)]
)
def test_letters_without_choices_are_of_pictures(tmp_path, answer, letters, k):
    rows = [plain_row(choices=[], answer=answer), plain_row(id="q2", choices=[], answer="12")]
    pictured, number = load_exam(write(tmp_path / "x.jsonl", rows)).questions
    assert (pictured.kind, len(pictured.letters), pictured.k, pictured.text_only) == ("choice", letters, k, False)
    assert (number.kind, number.text_only) == ("number", True)


@pytest.mark.parametrize(
    "start", ["次の文を読み、1〜" + "9" * 5000 + "の問いに答えよ。", "次の文を読み、1〜9999の問いに答えよ。"]
)
def test_a_case_is_bounded_whatever_its_lead_says(tmp_path, start):
    rows = [
        igakuqa_row(f"112B{n}", ["a"], text=f"{start if n == 1 else ''}{n}。" + "長い" * 100) for n in range(1, 200)
    ]
    questions = load_exam(write(tmp_path / "112-B.jsonl", rows)).questions
    assert sum(len(q.stem) for q in questions) < 50_000


def test_long_fields_take_little_time(tmp_path):
    rows = [igakuqa_row(f"112B{n}" + "1" * 190 + "x", ["a"], text=text) for n, text in enumerate(["問", "\n" * 10**5])]
    start = time.thread_time()
    assert len(load_exam(write(tmp_path / "112-B.jsonl", rows)).questions) == 2
    assert time.thread_time() - start < 2


def test_generic_rows(tmp_path):
    rows = [
        plain_row(id="one", answer="B", explanation="二だから。", category="循環器", points=3, year=2021),
        plain_row(id="two", answer=["a", "C"], contraindicated=["d", "e"]),
        plain_row(id="three", answer="a, c"),
        plain_row(id="four", choices=[], answer="1,130"),
        plain_row(id="five", choices=[], answer=2.5),
    ]
    questions = by_id(write(tmp_path / "mine.jsonl", rows))
    assert questions["one"].gold == {frozenset("b")}
    assert (questions["one"].points, questions["one"].explanation, questions["one"].year) == (3, "二だから。", 2021)
    assert questions["two"].gold == questions["three"].gold == {frozenset("ac")}
    assert (questions["two"].points, questions["two"].k, questions["two"].year) == (1, 2, None)
    assert (questions["one"].contraindicated, questions["two"].contraindicated) == (frozenset(), frozenset("de"))
    assert (questions["four"].kind, questions["four"].numbers, questions["four"].boxes) == ("number", ("1,130",), None)
    assert questions["five"].numbers == ("2.5",)
    assert load_exam(tmp_path / "mine.jsonl").name == "mine"


def test_a_folder_of_generic_files_is_one_exam(tmp_path):
    write(tmp_path / "b.jsonl", [plain_row(id="later")])
    write(tmp_path / "a.jsonl", [plain_row(id="earlier")])
    (tmp_path / "notes.txt").write_text("not an exam")
    assert list(by_id(tmp_path)) == ["earlier", "later"]


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    file = write(tmp_path / "x.jsonl", [plain_row(question="前\u2028後\u0085どれか。")])
    file.write_text("\ufeff" + file.read_text("utf-8").replace("\n", "\r\n\r\n"), "utf-8", newline="")
    assert by_id(file)["q1"].text == "前\u2028後\u0085どれか。"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", r"x\.jsonl:2: not JSON"),
        ("[" * 100_000, r"x\.jsonl:2: not JSON"),
        ("[1, 2]", r"x\.jsonl:2: \[1, 2\] is not a JSON object"),
        (json.dumps({"id": "q2", "question": "?", "answer": "a"}), r"x\.jsonl:2: the field 'choices' is missing"),
        (json.dumps({"question": "?", "choices": FIVE, "answer": "a"}), r"x\.jsonl:2: the field 'id' is missing"),
        (json.dumps(plain_row(id=7)), r"x\.jsonl:2: the field 'id' is 7; a string was expected"),
        (json.dumps(plain_row(id="q2", choices="abc")), r"x\.jsonl:2: the field 'choices' is .*a list was expected"),
        (json.dumps(plain_row(id="q2", choices=[1, 2])), r"x\.jsonl:2: 'choices' must be a list of"),
        (json.dumps(plain_row(id="q2", answer="f")), r"x\.jsonl:2: the answer 'f' is not .* choices a-e"),
        (json.dumps(plain_row(id="q2", answer="2")), r"x\.jsonl:2: the answer '2' is not"),
        (json.dumps(plain_row(id="q2", answer=[])), r"x\.jsonl:2: the answer \[\] is not"),
        (json.dumps(plain_row(id="q2", answer=["a", "a"])), r"x\.jsonl:2: the answer .* distinct letters"),
        (json.dumps(plain_row(id="q2", answer=["a or b"] * 40)), r"x\.jsonl:2: the answer .{,60} is not"),
        (
            json.dumps(plain_row(id="q2", choices=list("ab" * 13), answer=[" or ".join("abcdefghij")] * 26)),
            r"x\.jsonl:2: the answer .{,60} is not .* 1000 alternatives at most",
        ),
        (json.dumps(plain_row(id="q2", answer="b" * 10**6)), r"x\.jsonl:2: the answer .{,60} is not"),
        (json.dumps(plain_row(id="q" * 10**5)), r"x\.jsonl:2: 'id' has 100000 characters; at most 200 were expected"),
        (json.dumps(plain_row(id="q2", section="B" * 201)), r"x\.jsonl:2: 'section' has 201 characters"),
        (json.dumps(plain_row(id="q2\ud800")), r"x\.jsonl:2: .*surrogate"),
        (json.dumps(plain_row(id="q2", answer=True)), r"x\.jsonl:2: the field 'answer' is true"),
        (json.dumps(plain_row(id="q2", choices=[], answer="+")), r"x\.jsonl:2: .* is not a number"),
        (json.dumps(plain_row(id="q2", choices=[], answer="many")), r"x\.jsonl:2: .* is not a number"),
        (json.dumps(plain_row(id="q2", points="three")), r"x\.jsonl:2: 'points' is 'three'"),
        (json.dumps(plain_row(id="q2", points=-1)), r"x\.jsonl:2: 'points' is -1"),
        (json.dumps(plain_row(id="q2", contraindicated=["f"])), r"x\.jsonl:2: 'contraindicated' is \['f'\]; letters"),
        (
            json.dumps(plain_row()),
            r"x\.jsonl:2: the id 'q1' was used at .*x\.jsonl:1",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    file = write(tmp_path / "x.jsonl", [plain_row()])
    assert list(by_id(file)) == ["q1"]
    with file.open("a", encoding="utf-8") as f:
        f.write(line + "\n")
    with pytest.raises(UserError, match=said) as error:
        load_exam(file)
    assert "\n" not in str(error.value)


def test_a_wrong_path_or_choice_is_named(tmp_path, repository):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        load_exam(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: there is no question"):
        load_exam(tmp_path / "empty")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:1: byte 8 is not UTF-8"):
        load_exam(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match=r"no questions of 2019; it holds 2018, 2020"):
        load_exam(repository, years=[2018, 2019])
    with pytest.raises(UserError, match=r"no question is left"):
        load_exam(repository, limit=0)
    for section in "DF":
        (repository / f"data/2018/112-{section}.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/2018: 112-D.jsonl, 112-F.jsonl missing; an exam has sections A to F"):
        load_exam(repository)
    assert {q.year for q in load_exam(repository, years=[2020]).questions} == {2020}
    (repository / "data/2020/114-E_metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/2020: 114-E_metadata.jsonl missing; .* each with its metadata"):
        load_exam(repository, years=[2020])


def test_everyone_is_credited_where_the_question_was_faulty(tmp_path):
    file = write(tmp_path / "116-A.jsonl", [igakuqa_row("116A71", ["e"]), igakuqa_row("116A72", ["e"])])
    faulty, sound = load_exam(file).questions
    assert (faulty.credited, faulty.gold, sound.credited) == (True, {frozenset("e")}, False)
    (any_answer,) = load_exam(write(tmp_path / "plain.jsonl", [plain_row(answer="any")])).questions
    assert any_answer.credited and any_answer.gold == {frozenset(letter) for letter in "abcde"}


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("year", "max_points", "text_only", "two", "three", "numbers", "required"),
    [(2018, 499, 286, 56, 8, 2, 200), (2019, 496, 296, 52, 6, 2, 200), (2020, 496, 287, 40, 16, 3, 197)],
)
def test_the_real_exams_count_as_published(igakuqa, year, max_points, text_only, two, three, numbers, required):
    questions = load_exam(igakuqa, years=[year]).questions
    assert len(questions) == 400
    assert sum(q.points for q in questions) == max_points
    assert sum(q.points for q in questions if q.section in "BE") == required
    assert sum(q.text_only for q in questions) == text_only
    assert [sum(q.k == k for q in questions) for k in (2, 3)] == [two, three]
    assert sum(q.kind == "number" for q in questions) == numbers
    assert sum(bool(q.stem) for q in questions) == 30
    assert all(q.category for q in questions)


def test_the_real_numbers_are_read_through_their_boxes(igakuqa):
    numbers = {q.id: q.numbers[-1] for q in load_exam(igakuqa).questions if q.kind == "number"}
    expected = {"112C66": "26", "112F84": "1.2", "113A75": "146", "113F84": "7.20"}
    assert numbers == expected | {"114C75": "10.0", "114D75": "97", "114F75": "1130"}

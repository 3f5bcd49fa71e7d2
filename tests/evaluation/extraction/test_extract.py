"""The extractor against hand-checked outputs, and against everything else a model can write."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.extract import PROBLEMS, extract
from medllm_jax.evaluation.extraction.normalize import HEAD, TAIL, clean
from medllm_jax.evaluation.prompts import CONDITIONS


def _lines(name):
    return [json.loads(line) for line in (Path(__file__).parent / name).read_text("utf-8").splitlines()]


CASES = _lines("extractor_cases.jsonl")
JUDGED = _lines("judged_outputs.jsonl")  # `person`: what somebody who reads the output would call its answer, or null


def _choice(k, *choices):
    letters = [chr(ord("a") + i) for i in range(k)]
    return Question(id="q", text="どれか。", choices=choices, gold=frozenset({frozenset(letters)}), k=k)


_HABITS = ("喫煙", "飲酒", "運動", "睡眠不足", "肥満")
QUESTIONS = {
    "disease": _choice(1, "糖尿病", "高血圧症", "胃", "胃癌", "能力（エネルギー）"),
    "habits2": _choice(2, *_HABITS),
    "habits3": _choice(3, *_HABITS),
    "sentences": _choice(1, "入院勧告の対象となる。", "届出は一週間以内に行う。", "届出先は市町村長である。"),
    "hepatitis": _choice(1, "A型肝炎", "B型肝炎", "C型肝炎", "D型肝炎", "E型肝炎"),
    "bacteria": _choice(1, "S. aureus", "C. difficile", "E. coli", "B. cereus", "K. oxytoca"),
    "circled": _choice(1, "①", "②", "③", "④", "⑤"),
    "scores": _choice(1, "13", "15", "17", "19", "21"),
    "eight": _choice(1, *"ａｂｃｄｅｆｇｈ"),
    "blank": _choice(1, "\u3000", "\u3000", "\u3000", "\u3000", "ｅ"),
    "gradient": Question(id="n", text="求めよ。解答：①②Torr", numbers=("26", "26"), boxes="①②"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['q']}-{c.get('c', 'answer_only')}-{c['text'][:30]!r}")
def test_hand_checked(case):
    question = QUESTIONS[case["q"]]
    found = extract(question, case["text"], case.get("finish", "stop"), case.get("c", "answer_only"))
    answer = found.number if question.kind == "number" else ",".join(sorted(found.letters or ())) or None
    assert (answer, found.problem) == (case.get("answer"), case.get("problem"))
    assert found.lenient == case.get("lenient", False)
    assert found.truncated == case.get("truncated", case.get("finish") == "length")
    if "rule" in case:
        assert found.rule == case["rule"]


def _read(case):
    """What the strict tier takes for the answer, or None."""
    question = QUESTIONS[case["q"]]
    found = extract(question, case["text"], case.get("finish", "stop"), case.get("c", "answer_only"))
    if found.problem is not None or found.lenient:
        return None
    return found.number if question.kind == "number" else ",".join(sorted(found.letters))


def test_nothing_is_taken_for_an_answer_that_is_none_and_hardly_an_answer_is_missed():
    """Of the first kind of case the expectation is also what a person would say, but where `person` says otherwise."""
    of_cases = [
        (c, c.get("person", c.get("answer") if not c.get("problem") and not c.get("lenient") else None)) for c in CASES
    ]
    judged = [*of_cases, *((case, case["person"]) for case in JUDGED)]
    assert len(judged) >= 250
    wrong = [(case["text"], _read(case)) for case, person in judged if _read(case) not in (None, person)]
    assert wrong == []
    clear = [(case, person) for case, person in judged if person is not None]
    missed = [case["text"] for case, person in clear if _read(case) is None]
    assert len(missed) <= 0.02 * len(clear), missed


def test_the_cases_cover_every_problem_and_rule():
    assert len(CASES) >= 80
    assert {case["problem"] for case in CASES if case.get("problem")} == set(PROBLEMS)
    rules = {case["rule"] for case in CASES if "rule" in case}
    assert {"letters", "digits", "words", "labelled", "mentioned"} <= rules
    assert {f"cue_{r}" for r in ("letters", "words", "labelled", "number")} <= rules
    assert {f"start_{r}" for r in ("letters", "words", "labelled", "number")} <= rules
    assert {"json_letters", "json_words", "json_number"} <= rules


def test_prose_before_the_cue_changes_nothing_when_explaining():
    question = QUESTIONS["disease"]
    prose = "a: 糖尿病は考えにくい。胃癌ではない。b、cを比べる。2つを除外する。\n"
    for answer in ("d", "胃癌", "d. 胃癌"):
        with_prose = extract(question, f"{prose}答え: {answer}", condition="explain")
        without = extract(question, f"答え: {answer}", condition="explain")
        assert with_prose.letters == without.letters == frozenset("d")


@pytest.mark.parametrize("run_on", ["\n\n問題: 次の問い", "<|im_end|>\n<|im_start|>user\n答え: e", "\n問題2\n答え: e"])
@pytest.mark.parametrize("condition", ["answer_only", "explain"])
@pytest.mark.parametrize("answer", ["b", "高血圧症", "b: 高血圧症"])
def test_a_further_turn_changes_nothing(answer, condition, run_on):
    question = QUESTIONS["disease"]
    text = answer if condition == "answer_only" else f"血圧が高い。\n答え: {answer}"
    alone = extract(question, text, "stop", condition)
    assert alone.letters == frozenset("b")
    assert extract(question, text + run_on, "length", condition) == alone


def test_only_what_is_far_from_both_ends_is_not_looked_at():
    question = QUESTIONS["disease"]
    filler = "所見を述べる。" * 200_000
    assert extract(question, f"{filler}\n答え: d", condition="explain").letters == frozenset("d")
    assert extract(question, f"d\n{filler}").letters == frozenset("d")
    assert extract(question, f"血圧が高い。\n答え: b\n\n問題: {filler}", condition="explain").letters == frozenset("b")


# --- cues, forms, what stands around them -----------------------------------------------------------------------------

_WORDS = ("甲状腺腫", "乙型脳炎", "丙午", "丁寧", "戊申")
_CUES = (
    *(
        "答え: {}",
        "答えは{}",
        "正解は{}",
        "正解：{}",
        "【回答】{}",
        "【答え】\n{}",
        "解答: {}",
        "最終的な答え: {}",
        "Answer: {}",
    ),
    *("The answer is {}", "正解は選択肢{}", "**答え**: {}", "### 解答\n{}", "正答は{}", "したがって、正解は「{}」"),
    *("最も適切なのは{}", "答えは次の通り：{}", "正解:\n\n{}"),
)
_CUES_BEHIND = (
    "よって{}が正解です。",
    "以上より、{}が正答となる。",
    "したがって「{}」が答えである。",
    "つまり{}が正解\n",
)
_SUFFIXES = (
    *(
        "",
        "。",
        "です。",
        "である。",
        "だ。",
        "だと考える。",
        "\n\n解説: 他は誤り。",
        "です。他の選択肢は適切でない。",
        " となります。",
    ),
    *("と考えられる。", "だが、他も除外できない。", "です。\n\n問題: 次の問い\n答え: b"),
)
_BEFORE = ("", "説明する。bは誤りである。eも考えにくい。\n", "考える。\n\n### 問題：対応は？\n甲が適切である。\n\n")


def _forms(letters):
    places = [ord(letter) - ord("a") for letter in letters]
    words, digits = [_WORDS[n] for n in places], [str(n + 1) for n in places]
    both = list(zip(letters, words, strict=True))
    for separator in (",", "、", ", ", "と", "・", " ", "及び", "/", " and "):
        yield separator.join(letters)
    yield from (
        letters.upper(),
        ",".join(chr(ord("ａ") + n) for n in places),
        "と".join(chr(ord("①") + n) for n in places),
    )
    for form in ("({})", "「{}」", "**{}**", "選択肢{}", "{}番"):
        yield "と".join(form.format(each) for each in (digits if "番" in form else letters))
    for form in ("{}. {}", "{}の{}", "{}（{}）", "{}の「{}」", "({}) {}"):
        yield "、".join(form.format(*each) for each in both)
    yield "\n".join(f"{letter}: {word}" for letter, word in both)
    yield "、".join(f"{word}（{letter}）" for letter, word in both)
    yield from ("と".join(words), "、".join(words), "、".join(digits))
    yield "、".join(f"{digit}. {word}" for digit, word in zip(digits, words, strict=True))
    if len(letters) > 1:
        yield from ("\n".join(letters), f"{'と'.join(letters)}の{len(letters)}つ")


@pytest.mark.parametrize("letters", ["c", "ac", "ade"])
def test_every_form_is_read_after_every_cue_whatever_stands_around(letters):
    question = _choice(len(letters), *_WORDS)
    texts = []
    for form in _forms(letters):
        texts += [before + cue.format(form) for cue in _CUES for before in _BEFORE]
        if "\n" not in form:
            texts += [f"{before}答え: {form}{suffix}" for suffix in _SUFFIXES for before in _BEFORE]
            texts += [before + cue.format(form) for cue in _CUES_BEHIND for before in _BEFORE]
    found = {text: extract(question, text, "stop", "explain") for text in texts}
    assert not [t for t, e in found.items() if e.letters != frozenset(letters) or e.problem is not None or e.lenient]


NO_ANSWERS = [
    "申し訳ありませんが、答えはわかりません。aかbのどちらかです。",
    "正解はaではありません。",
    "正解はaではない。bでもない。",
    "答えはaではありません。bは禁忌である。",
    "aではない。b: 禁忌である。",
    *(
        f"aが正解{end}"
        for end in ("とは言えない。", "であれば、bは誤りである。", "ですか？", "ではない。", "だとすると矛盾する。")
    ),
    *(f"aが正解{end}" for end in ("になることはない。", "だと思う人が多いが誤りです。", "かbが正解かは判断できない。")),
    "早期丙午が正解の条件です。",
    "ビタミンbが正解です。",
    "HLA-bが答えです。",
    "aは誤り。bは誤り。cは誤り。",
    "a: 誤り\nb: 正解\nc: 誤り",
    "a 甲状腺腫 ← 不正解\nb 乙型脳炎 ← 正解\nc 丙午",
    "答えは3日後に分かります。",
    "答え: 3mg",
    "正解は2つあります。",
    "正解は2つ選びます。aは誤りです。",
    "分かりません。\n\n問題: 次の問い\n答え: b",
    "申し訳ありません。画像が提示されていません。\n\n### 問題2\nどれか。\n答え: c",
    "答え: [選択肢の記号]",
    "答え: a,b,c,d,eの中から選ぶ",
    "正解は1から5の中にある。",
    "答えは10です。",
    "答え: 6",
    "aを選ぶと不正解です。",
    "どれが正解でしょうか。",
    "説明します。\nuser: 答え: b",
    "正解は3番染色体の異常です。",
    "正解は1番多い疾患です。",
    "aが答えの候補です。",
]


@pytest.mark.parametrize("text", NO_ANSWERS)
def test_refusals_and_talk_of_wrong_choices_are_no_answers(text):
    for k in (1, 2):
        for condition in CONDITIONS:
            found = extract(_choice(k, *_WORDS), text, "stop", condition)
            assert found.problem is not None or found.lenient


# --- anything at all -------------------------------------------------------------------------------------------------

# fmt: off
_PIECES = st.sampled_from([
    "答え: ", "正解は", "a", "b", "ｃ", "、", ",", "\n", "\n問題: ", "どれか。", "糖尿病", "胃", "胃癌", "高血圧症",
    "①", "②", "26", "<think>", "</think>", "<|im_end|>", '{"answer": "', '"}', "**", "`", "または", "です。",
    "ではない", "ではなく", "でも", "なく", "1,130", ".", "(", ")", " ",
])
REPEATED = [
    "答:", "答え: a\n", "a    ", 'a""', "最終答え", '"', "{", '{"answer":"a"}', "a: x\n", "糖尿病、", "(", "\n",
    "\u0301\u0323", "ﷺ", "①", "1,", "答え: 1,", "<think>", "</think>", "\n問題", "a,", "どれか。",
    "\na: x\nb: y", "\\boxed{a}", "aまたは", "…", "½", "㍿", "㌖a", "ﷺa",
    "aではなく", "aでも", "胃癌ではなく", "aでもなく", "最も考えられるのは",
    "aが正解です。", "aとbとcとdが正解です\n", "aが正解", "「a", "選択肢", "1と", "答え: 1と",
    "\n### 問題:", "aの胃癌と", "胃癌(d)、", "aではない。",
    "a\n", "\na 胃癌 ← 正解", "が正解", "choice ",
]
# fmt: on
_TEXTS = st.one_of(
    st.text(max_size=300),
    st.text(st.characters(exclude_categories=()), max_size=100),
    st.lists(_PIECES, max_size=30).map("".join),
    st.lists(st.one_of(_PIECES, st.text(max_size=3)), max_size=30).map("".join),
)


@settings(max_examples=400, deadline=None)
@given(
    text=_TEXTS,
    name=st.sampled_from(sorted(QUESTIONS)),
    finish=st.sampled_from(["stop", "length"]),
    condition=st.sampled_from(CONDITIONS),
)
def test_whatever_is_written(text, name, finish, condition):
    question = QUESTIONS[name]
    found = extract(question, text, finish, condition)
    assert found == extract(question, text, finish, condition)
    answered = found.letters is not None or found.number is not None
    assert answered == (found.problem in (None, "wrong_count"))
    assert found.problem is None or found.problem in PROBLEMS
    assert not (found.truncated and finish == "stop")
    if found.letters is not None:
        assert question.kind == "choice"
        assert found.letters <= set(question.letters)
        assert (len(found.letters) == question.k) == (found.problem is None)
    if found.number is not None:
        assert question.kind == "number"
        float(found.number)


def _seconds(name, text, condition):
    """Processor time of an extraction, the least of three."""
    taken = []
    for _ in range(3):
        start = time.thread_time()
        extract(QUESTIONS[name], text, "length", condition)
        taken.append(time.thread_time() - start)
    return min(taken)


# The goal is 10 ms, which benchmarks/extractor.py shows. Here only what grows with the square of a text is to be found,
# which takes far longer at such sizes: a machine that does much else may take several times as long as the goal.
_MOST_SECONDS = 0.3


@pytest.mark.parametrize("piece", REPEATED)
def test_what_is_looked_at_is_bounded(piece):
    for size in (10_000, 1_000_000):
        text = piece * (size // len(piece)) + "X"
        assert len(clean(text, keep_circled=False).text) <= HEAD + TAIL + 2
        for name in ("disease", "gradient"):
            for condition in ("answer_only", "explain"):
                assert _seconds(name, text, condition) < _MOST_SECONDS


@settings(max_examples=100, deadline=None)
@given(piece=_TEXTS.filter(bool), name=st.sampled_from(sorted(QUESTIONS)), condition=st.sampled_from(CONDITIONS))
def test_megabytes_of_anything_take_little_time(piece, name, condition):
    assert _seconds(name, piece * (2_000_000 // len(piece)), condition) < _MOST_SECONDS

"""Templates: what is rendered, and the error lines."""

import dataclasses

import pytest
import yaml

from medllm_jax.errors import UserError
from medllm_jax.evaluation.exam import Question
from medllm_jax.evaluation.extraction.extract import extract
from medllm_jax.evaluation.prompts import CONDITIONS, load_template

QUESTION = Question(
    id="q",
    text="正しいのはどれか。{k}",
    choices=("甲", "乙", "丙"),
    gold=frozenset({frozenset("ab")}),
    k=2,
)
NUMBER = Question(id="n", text="いくつか。", numbers=("26",))

MINIMAL = {
    "question": "Q: {question}\n{choices}\n{k} of {letters}",
    "number_question": "Q: {question}",
    "choice": "[{letter}] {text}",
    "conditions": {"answer_only": {"cue": "A:", "stop": ["\n"], "max_new_tokens": 5}},
}


def written(tmp_path, **changes):
    content = {k: v for k, v in (MINIMAL | changes).items() if v is not None}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    return file


def test_the_whole_prompt_of_a_small_template(tmp_path):
    shot = {"question": "X?", "choices": ["x", "y"], "answer": "b", "explanation": "so"}
    template = load_template(written(tmp_path, system="SYSTEM", shots=[shot]))
    assert template.name == "mine"
    assert template.render(QUESTION, "answer_only") == (
        "SYSTEM\n\nQ: X?\n[a] x\n[b] y\n1 of a,b\nA: b\n\n"
        "Q: 正しいのはどれか。{k}\n[a] 甲\n[b] 乙\n[c] 丙\n2 of a,b,c\nA:"
    )
    assert template.render(NUMBER, "answer_only").endswith("\n\nQ: いくつか。\nA:")
    assert template.render_messages(QUESTION, "answer_only") == [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "Q: X?\n[a] x\n[b] y\n1 of a,b\nA:"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Q: 正しいのはどれか。{k}\n[a] 甲\n[b] 乙\n[c] 丙\n2 of a,b,c\nA:"},
    ]


def test_the_official_form():
    prompt = load_template("igakuqa").render(QUESTION, "answer_only")
    assert prompt.startswith("医師国家試験を解きます。\n\n問題: ")
    assert prompt.endswith(
        "問題: 正しいのはどれか。{k}\na: 甲\nb: 乙\nc: 丙\n必ずa,b,cの中からちょうど2個選んでください。\n答え:"
    )
    assert prompt.count("\n答え: ") == 3
    assert "\n答え: a,e\n" in prompt
    assert "解説" not in prompt


def test_explaining_asks_for_the_explanation_before_the_answer():
    template = load_template("igakuqa")
    prompt = template.render(QUESTION, "explain")
    assert prompt.endswith("\n解説:")
    solved = prompt.split("\n\n")[1:4]
    assert all(s.index("\n解説: ") < s.index("\n答え: ") for s in solved)
    assert len(solved) == len(template.shots) == 3
    # The folded lines of the file must not leave spaces inside Japanese sentences.
    assert not any(" " in s.question + s.explanation for s in template.shots)


def test_plain_has_no_examples():
    template = load_template("plain")
    assert template.render(QUESTION, "answer_only") == "正しいのはどれか。{k}\na: 甲\nb: 乙\nc: 丙\n答え:"
    assert template.render(NUMBER, "answer_only") == "いくつか。\n答え:"


@pytest.mark.parametrize("name", ["igakuqa", "plain"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_answer_in_the_form_of_the_examples_is_read(name, condition):
    template = load_template(name)
    chosen = template.condition(condition)
    completion = chosen.solution.format(answer="a,b", explanation="cは誤りである。")
    assert extract(QUESTION, completion, "stop", condition).letters == frozenset("ab")
    assert chosen.max_new_tokens > 0
    assert not any(stop in completion for stop in chosen.stop)


@pytest.mark.parametrize("name", ["igakuqa", "plain"])
def test_an_answer_can_be_put_after_an_explanation(name):
    template = load_template(name)
    whole = template.solve(QUESTION, "ac", "explain", "甲である。\n乙でない。")
    for output in (
        template.solve(QUESTION, "b", "explain", "甲である。\n乙でない。"),
        " 甲である。\n乙でない。",
        whole,
    ):
        assert template.explained(output) + template.solve_explained(QUESTION, "ac") == whole


def test_a_template_that_does_not_tell_the_answer_from_the_explanation_is_refused(tmp_path):
    explain = MINIMAL["conditions"]["answer_only"] | {"solution": "{answer}, {explanation}"}
    template = load_template(written(tmp_path, conditions={"explain": explain}))
    with pytest.raises(UserError, match="its explain solution is"):
        template.explained("a, so it is")


def test_the_shown_examples_are_answered_by_their_own_letters():
    for shot in load_template("igakuqa").shots:
        question = dataclasses.replace(QUESTION, choices=shot.choices, k=len(shot.answer))
        assert extract(question, ",".join(shot.answer)).letters == frozenset(shot.answer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"questoin": "x"}, r"mine\.yaml: unknown key questoin: did you mean question\?"),
        ({"question": None}, r"mine\.yaml: question is not set: it has no default"),
        (
            {"question": "Q {query}"},
            r"mine\.yaml: 'question' has the unknown placeholder \{query\}; known are \{question\}",
        ),
        ({"question": "Q {question.id}"}, r"unknown placeholder \{question\.id\}"),
        ({"question": "Q {question!r}"}, r"unknown placeholder \{question\}"),
        ({"question": "Q {question"}, r"mine\.yaml: 'question': .*\{\{ and \}\} for plain braces"),
        ({"question": "Q {choices}"}, r"'question' lacks the placeholder \{question\}"),
        ({"question": 3}, r"question: expected text, got 3"),
        (
            {"choice": "{question}"},
            r"'choice' has the unknown placeholder \{question\}; known are \{letter\}, \{text\}",
        ),
        ({"conditions": {}}, r"conditions: found none; answer_only and explain"),
        ({"conditions": {"explian": {}}}, r"conditions: found explian; answer_only and explain"),
        ({"conditions": {"explain": {"cue": "A:"}}}, r"conditions: explain: max_new_tokens is not set"),
        (
            {"conditions": {"explain": {"cue": "A:", "max_new_tokens": 0}}},
            r"conditions: explain: max_new_tokens is 0: it must be at least 1",
        ),
        (
            {"conditions": {"explain": {"cue": "A:", "max_new_tokens": True}}},
            r"max_new_tokens: expected a whole number, got True",
        ),
        ({"conditions": {"explain": {"cue": "A{k}", "max_new_tokens": 1}}}, r"'cue' has the unknown placeholder \{k\}"),
        ({"conditions": {"explain": {"cue": "A", "max_new_tokens": 1, "stop": [""]}}}, r"'stop' must be a list"),
        ({"shots": [{"question": "X?", "choices": ["x"], "answer": "b"}]}, r"shots\[0\]: 'answer' must be letters"),
        ({"shots": ["x"]}, r"shots\[0\]: a mapping is expected, got 'x'"),
    ],
)
def test_a_wrong_template_is_named(tmp_path, changes, said):
    load_template(written(tmp_path))
    with pytest.raises(UserError, match=said) as error:
        load_template(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_missing_template_or_condition_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no prompt template 'igakuqq'; give demo, igakuqa, plain, or the path"):
        load_template("igakuqq")
    with pytest.raises(UserError, match=r"template 'mine' has no condition 'explain'; it has answer_only"):
        load_template(written(tmp_path)).render(QUESTION, "explain")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match=r"broken\.yaml:2: not YAML"):
        load_template(tmp_path / "broken.yaml")

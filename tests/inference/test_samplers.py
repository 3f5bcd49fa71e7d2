"""A run's model, its export under transformers, and a server give the same answers to the same questions."""

import json

import pytest

from medllm_jax.cli import main
from medllm_jax.evaluation.grading import read_grades
from tests.tiny import write_json_lines
from tests.tiny_hf import make_hf_folder

TEMPLATE = """
name: short
question: "{question}\\n{choices}\\n"
number_question: "{question}\\n"
conditions:
  answer_only: {cue: "答え:", stop: [" wit", "S", "0", "x"], max_new_tokens: 12}
  explain: {cue: "解説:", solution: " {explanation}\\n答え: {answer}", stop: ["7", "E", "q"], max_new_tokens: 24}
"""
CHOICES = ["肺炎", "喘息", "結核", "気胸", "肺癌"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An exported model, the same as a run, an exam and a template."""
    pytest.importorskip("torch")
    from medllm_jax.cli.convert import main as convert

    root = tmp_path_factory.mktemp("samplers")
    make_hf_folder(root / "hf", tied=False, hidden=64, seed=3)
    assert convert(["from-hf", str(root / "hf"), str(root / "run")]) == 0
    rows = [
        {
            "id": f"q{n}",
            "question": f"第{n}問。" + "発熱と咳" * (n % 5) + f" {n * 37}",
            "choices": CHOICES,
            "answer": "b",
        }
        for n in range(12)
    ]
    write_json_lines(root / "exam.jsonl", [*rows, {"id": "n", "question": "1+1", "choices": [], "answer": "2"}])
    (root / "short.yaml").write_text(TEMPLATE, encoding="utf-8")
    return root


def answers(place, name, *arguments):
    """All outputs by condition and question, and the grades."""
    exam = ("--exam", str(place / "exam.jsonl"), "--template", str(place / "short.yaml"))
    assert main(["evaluate", *arguments, *exam, "--output", str(place / name)]) == 0
    head, *rows = map(json.loads, (place / name / "samples.jsonl").read_text("utf-8").splitlines())
    grades = [read_grades(place / name / f"grades-{condition}.jsonl") for condition in ("answer_only", "explain")]
    return head["settings"], {(row["condition"], row["id"]): row["samples"] for row in rows}, grades


@pytest.mark.parametrize("chat", [(), ("--chat",)], ids=["text", "chat"])
def test_our_greedy_answers_are_those_of_transformers(place, chat):
    _, ours, our_grades = answers(place, f"run{chat}", "--run", str(place / "run"), *chat)
    _, theirs, their_grades = answers(place, f"hf{chat}", "--hf", str(place / "hf"), "--batch-size", "5", *chat)
    assert ours == theirs and our_grades == their_grades
    assert {sample["finish_reason"] for (sample,) in ours.values()} == {"stop", "length"}
    assert len({sample["text"] for (sample,) in ours.values()}) > 13, "outputs that are all alike would agree anyhow"


def test_samples_of_transformers_depend_on_question_and_seed_alone(place):
    def drawn(name, *more):
        several = ("--samples", "3", "--temperature", "1.0", "--conditions", "answer_only")
        output = place / name
        exam = ("--exam", str(place / "exam.jsonl"), "--template", str(place / "short.yaml"))
        assert main(["evaluate", "--hf", str(place / "hf"), *exam, "--output", str(output), *several, *more]) == 0
        rows = map(json.loads, (output / "samples.jsonl").read_text("utf-8").splitlines()[1:])
        return {row["id"]: row["samples"] for row in rows}

    whole = drawn("whole", "--seed", "1")
    few = drawn("few", "--seed", "1", "--limit", "4")
    assert few == {key: whole[key] for key in few} and len(few) == 4
    assert drawn("other", "--seed", "2", "--limit", "4") != few
    assert any(len({sample["text"] for sample in samples}) == 3 for samples in whole.values())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--hf", "x", "--run", "y"), "--run and --hf are given: one model"),
        (("--server", "http://127.0.0.1:1"), "--server URL and --model NAME, both"),
        (("--hf", "nowhere"), "nowhere: no config.json in it"),
        ((), "--output is missing"),
        (("--output", "EMPTY"), "holds no samples: name the model"),
        (("--run", "RUN", "--samples", "0"), "argument --samples: '0': a whole number is expected, at least 1"),
        (("--run", "RUN", "--chat"), "the tokenizer has no chat template"),
    ],
)
def test_a_model_that_cannot_be_asked_is_one_line(world, tmp_path, arguments, line, capsys):
    from medllm_jax.storage.run_folder import tokenizer_of
    from tests.tiny import make_tokenizer

    run = tmp_path / "run"
    run.mkdir()
    for part in world.model.iterdir():
        (run / part.name).symlink_to(part)
    (run / "tokenizer").unlink()
    make_tokenizer(run / "tokenizer", chat_template=None)
    assert tokenizer_of(run)
    exam = write_json_lines(
        tmp_path / "exam.jsonl", [{"id": "q", "question": "?", "choices": ["1", "2"], "answer": "a"}]
    )
    given = [{"RUN": str(run), "EMPTY": str(tmp_path / "empty")}.get(a, a) for a in arguments]
    if "--output" not in given and given:
        given += ["--output", str(tmp_path / "out")]
    template = tmp_path / "short.yaml"
    template.write_text(TEMPLATE, encoding="utf-8")
    assert main(["evaluate", *given, "--exam", str(exam), "--template", str(template)]) == 2
    assert line in capsys.readouterr().err

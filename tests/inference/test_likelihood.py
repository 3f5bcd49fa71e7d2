"""The likeliest answer: its log-probability is that of the whole text, on every mesh, and training can watch it."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from medllm_jax.cli import main
from medllm_jax.config.schema import HeldOutConfig, MeshConfig, PrecisionConfig
from medllm_jax.data.batch import batch_of
from medllm_jax.data.tokenizer import encode_plain, load_tokenizer
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import UserError
from medllm_jax.evaluation import prompts
from medllm_jax.evaluation.exam import Exam, Question, load_exam
from medllm_jax.evaluation.grading import read_grades
from medllm_jax.evaluation.prompts import load_template
from medllm_jax.inference.likelihood import Likelihood
from medllm_jax.model.abstract import abstract_model, random_params
from medllm_jax.training.head import hidden_before, score_targets
from medllm_jax.training.loop import train
from tests.tiny import write_json_lines
from tests.training.test_train import config_of
from tests.world import tiny_config

TEMPLATE = load_template("plain")
CONFIG = tiny_config(initializer_range=0.2, max_position_embeddings=256)


def question(number, k=1, choices=5, points=1):
    letters = "abcdefgh"[number % 2 :][:k]
    text = f"{number}. " + "発熱 " * number
    gold = frozenset({frozenset(letters)})
    return Question(
        id=f"q{number}", text=text, choices=tuple(f"選択{n}" for n in range(choices)), gold=gold, k=k, points=points
    )


EXAM = Exam("small", (*map(question, range(5)), question(5, k=2, points=3), question(6, k=2), question(7, 1, 7)))
ANSWERS = {1: list("abcdefgh"), 2: list(itertools.combinations("abcde", 2))}
NUMBER = Question(id="n", text="1+1", numbers=("2",))


def scorer(world, sizes=(1, 1, 1), batch_size=4, exam=EXAM, outputs=None):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    plan = abstract_model(CONFIG, PrecisionConfig(compute="float32"), mesh)
    tokenizer = load_tokenizer(world.tokenizer)
    found = Likelihood(exam, TEMPLATE, tokenizer, CONFIG, plan.structure, mesh, batch_size, outputs)
    return found, random_params(plan, seed=1), plan


@pytest.fixture(scope="module")
def alone(world):
    found, params, _ = scorer(world)
    return {asked.question.id: log_probs for asked, log_probs in found.log_probs(params)}


def whole_texts(world, prompt, answers):
    """Log-probabilities of the answers, read off a forward pass over the prompt with each of them."""
    from flax import nnx

    _, params, plan = scorer(world)
    network = nnx.merge(plan.structure, params)
    rows = np.zeros((len(answers), 3, 256), np.int32)
    for row, answer in zip(rows, answers, strict=True):
        row[0, : len(prompt + answer)] = prompt + answer
        row[1, : len(prompt + answer)] = 1

    @jax.jit
    def score(batch):
        hidden = network(batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids)
        before = hidden_before(hidden, batch, pairs=0)
        return score_targets(before, network.head_weight, batch.tokens, batch.loss_weights, vocab_chunks=1).log_probs

    log_probs = np.asarray(score(batch_of(rows, "cpt")))
    return [log_probs[row, len(prompt) : len(prompt) + len(answer)].sum() for row, answer in enumerate(answers)]


def test_an_answer_has_the_probability_of_the_whole_text(world, alone):
    tokenizer = load_tokenizer(world.tokenizer)
    for asked in (EXAM.questions[3], EXAM.questions[5]):
        prompt, *answers = encode_plain(
            tokenizer,
            [
                TEMPLATE.render(asked, "answer_only"),
                *(f" {','.join(letters)}" for letters in itertools.combinations("abcde", asked.k)),
            ],
        )
        expected = whole_texts(world, prompt, answers)
        np.testing.assert_allclose(alone[asked.id], expected, atol=1e-4)
        assert np.std(expected) > 0.1


def test_an_answer_after_an_explanation_is_that_of_the_whole_output(world, alone):
    """An output's own answer makes no difference, and neither does one that is not there."""
    said = "発熱がある。"
    outputs = [f" {said}\n答え: a", f"{said}\n答え: e", f" {said}"]
    found = []
    for output in outputs:
        scored, params, _ = scorer(world, outputs=dict.fromkeys((q.id for q in EXAM.questions), output))
        found.append({asked.question.id: log_probs for asked, log_probs in scored.log_probs(params)})
    asked = EXAM.questions[3]
    prompt, *answers = encode_plain(
        load_tokenizer(world.tokenizer),
        [f"{TEMPLATE.render(asked, 'explain')} {said}\n答え:", *(f" {letter}" for letter in "abcde")],
    )
    expected = whole_texts(world, prompt, answers)
    for each in found:
        np.testing.assert_allclose(each[asked.id], expected, atol=1e-4)
    assert not np.allclose(expected, alone[asked.id], atol=1e-2)


@pytest.mark.parametrize(("sizes", "batch_size"), [((1, 1, 1), 1), ((2, 2, 1), 8), ((1, 2, 2), 4)])
def test_batches_and_meshes_change_nothing(world, alone, sizes, batch_size):
    found, params, _ = scorer(world, sizes, batch_size)
    for asked, log_probs in found.log_probs(params):
        np.testing.assert_allclose(log_probs, alone[asked.question.id], atol=1e-4)


def test_what_is_counted(world, alone):
    long = dataclasses.replace(question(8), text="長い" * 200)
    found, params, _ = scorer(world, exam=Exam("more", (*EXAM.questions, NUMBER, long)))
    score = found.measure(params)
    right = [q for q in EXAM.questions if frozenset(ANSWERS[q.k][alone[q.id].argmax()]) in q.gold]
    assert 0 < len(right) < len(EXAM.questions)
    assert (score.n, score.correct, score.left_out) == (8, len(right), 2)
    assert (score.points, score.max_points) == (sum(q.points for q in right), 10)
    with pytest.raises(UserError, match="exam none: no question with choices fits"):
        scorer(world, exam=Exam("none", (NUMBER, long)))


def test_the_command_and_the_held_out_metric_agree(world, tmp_path, metrics_of):
    rows = [
        {"id": f"q{n}", "question": f"{n}?", "choices": ["甲", "乙", "丙"], "answer": "abc"[n % 3]} for n in range(9)
    ]
    exam = write_json_lines(tmp_path / "exam.jsonl", rows)
    held_out = HeldOutConfig(exam=str(exam), template="plain", every=2)
    config = config_of(world, tmp_path / "run", "cpt", steps=3, held_out=held_out)
    train(dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint=str(world.model))))
    found = metrics_of(tmp_path / "run")
    assert [step for step in found if "held_out/likelihood_accuracy" in found[step]] == [2, 3]

    arguments = ["--run", str(tmp_path / "run"), "--exam", str(exam), "--template", "plain"]
    assert main(["likelihood", *arguments, "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert (written["n"], written["step"], written["left_out"]) == (9, 3, 0)
    assert written["accuracy"] == pytest.approx(found[3]["held_out/likelihood_accuracy"])
    assert load_exam(exam).name == written["exam"]


def test_the_command_chooses_after_the_models_own_explanations(world, tmp_path, capsys):
    rows = [{"id": f"q{n}", "question": f"{n}?", "choices": ["甲", "乙", "丙"], "answer": "a"} for n in range(4)]
    rows.append({"id": "n", "question": "1+1", "choices": [], "answer": "2"})
    exam = write_json_lines(tmp_path / "exam.jsonl", rows)
    shipped = Path(prompts.__file__).parent / "templates" / "plain.yaml"
    short = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    for condition in short["conditions"].values():
        condition["max_new_tokens"] = 6
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(short))
    asked = ["--exam", str(exam), "--template", str(tmp_path / "short.yaml"), "--batch-size", "8"]
    results, model = str(tmp_path / "results"), str(world.model)
    assert main(["likelihood", "--run", model, *asked, "--after", results]) == 2
    assert "no samples.jsonl" in capsys.readouterr().err
    assert main(["evaluate", "--run", model, *asked, "--output", results]) == 0
    before = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert main(["likelihood", "--run", model, *asked, "--after", results]) == 0
    written = [f"likeliest-{condition}.jsonl" for condition in ("answer_only", "explain")]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == sorted([*before, *written])

    only, explained = (read_grades(tmp_path / "results" / name) for name in written)
    assert [grade.id for grade in only] == [grade.id for grade in explained] == ["q0", "q1", "q2", "q3"]
    assert all(grade.answer in "abc" and grade.correct == (grade.answer == "a") for grade in (*only, *explained))
    assert main(["likelihood", "--run", model, *asked, "--output", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "likelihood.json").read_text())
    assert alone["correct"] == sum(grade.correct for grade in only)

    samples = tmp_path / "results" / "samples.jsonl"
    head, _, rest = samples.read_text().partition("\n")
    for key, value, said in (("model", "another", "of another model"), ("chat", True, "chat prompts")):
        changed = json.loads(head)
        changed["settings"][key] = value
        samples.write_text(f"{json.dumps(changed)}\n{rest}")
        capsys.readouterr()
        assert main(["likelihood", "--run", model, *asked, "--after", results]) == 2
        assert said in capsys.readouterr().err
    samples.write_text(f"{head}\n")
    assert main(["likelihood", "--run", model, *asked, "--after", results]) == 2
    assert "no explanation of 'q0'" in capsys.readouterr().err


def test_a_held_out_section_that_holds_nothing_is_refused():
    with pytest.raises(UserError, match="neither store nor exam"):
        HeldOutConfig()

"""Rounds: each goes on from the one before, nothing is made twice, and they end when they no longer help."""

import json
from pathlib import Path

import pytest
from etils import epath

from medllm_jax.checkpoint.fingerprint import model_fingerprint
from medllm_jax.checkpoint.handle import open_checkpoint
from medllm_jax.checkpoint.load_model import load_model
from medllm_jax.cli import main
from medllm_jax.config.load import load_run_config
from medllm_jax.config.schema import MeshConfig, PrecisionConfig
from medllm_jax.distributed.sharding import make_mesh
from medllm_jax.errors import Preempted, RunError, UserError
from medllm_jax.recipes import rounds as rounds_module
from medllm_jax.recipes.commands import Runner, Score, read_scores
from medllm_jax.recipes.rounds import load_rounds_config, run_rounds
from tests.tiny import write_json_lines
from tests.world import SEQUENCE_LENGTH

ROOT = Path(__file__).parents[2]
# A random model says anything but answers, and ends at the first of many letters.
TEMPLATE = """
name: letters
question: "Q: {question}\\n{choices}\\n"
number_question: "Q: {question}\\n"
choice: "{letter}: {text}"
conditions:
  answer_only: {cue: "A:", stop: [a, e, i, o, u, r, s, t, n, " ", "1", "0"], max_new_tokens: 64}
"""


def questions(first, count):
    return [
        {"id": f"q{n}", "question": f"Is the number {n} even?", "choices": ["yes", "no"], "answer": "ab"[n % 2]}
        for n in range(first, first + count)
    ]


@pytest.fixture
def file(world, tmp_path):
    write_json_lines(tmp_path / "questions.jsonl", questions(0, 6))
    write_json_lines(tmp_path / "held_out.jsonl", questions(1000, 4))
    (tmp_path / "letters.yaml").write_text(TEMPLATE)
    (tmp_path / "rpo.yaml").write_text(
        f"run: unset\nsteps: 2\ndata: {{store: unset, batch_size: 8}}\ninit: {{checkpoint: {world.model}}}\n"
        "precision: {params: float32, compute: float32}\nobjective: {name: rpo}\noptimizer: {learning_rate: 1.0e-3}\n"
    )
    (tmp_path / "rounds.yaml").write_text(
        f"folder: {tmp_path / 'rounds'}\nstart: {world.model}\ntrain: rpo.yaml\nrounds: 3\n"
        f"questions: {tmp_path / 'questions.jsonl'}\nheld_out: {tmp_path / 'held_out.jsonl'}\n"
        "template: letters.yaml\nconditions: [answer_only]\nsamples: 3\ntemperature: [1.0, 1.0, 1.2]\nstrategy: gold\n"
        f"sequence_length: {4 * SEQUENCE_LENGTH}\n"
    )
    return tmp_path / "rounds.yaml"


class KilledError(Exception):
    pass


def test_rounds_follow_each_other_go_on_and_end(file, tmp_path, monkeypatch, world):
    """The held-out accuracies are made up, everything else is done: a random model has none that rise."""
    accuracies = {"round-0": 0.1, "round-1": 0.3, "round-2": 0.2}
    monkeypatch.setattr(
        rounds_module,
        "_examine",
        lambda run, config, place, model: {"answer_only": Score(accuracies[place.name], 10)},
    )
    commands, run = [], Runner(main)

    def killed_in_round_2(verb, *arguments):
        commands.append(verb)
        if verb == "train" and len(commands) > 4:
            # As if it had been the command before that was killed, between the files that it writes.
            (description,) = (tmp_path / "rounds" / "round-2" / "store" / "reference").glob("*/reference.json")
            description.unlink()
            raise KilledError
        run(verb, *arguments)

    config = load_rounds_config(str(file))
    with pytest.raises(KilledError):
        run_rounds(config, killed_in_round_2)
    assert commands == ["pairs", "data", "reference", "train"] * 2

    again = []
    table = run_rounds(config, lambda verb, *rest: (again.append(verb), run(verb, *rest)))
    assert again == ["train", "reference", "train"], "the first round's training has nothing left to do"
    assert table.read_text().splitlines()[3].split("|")[1:5] == [" 1 ", " 0.300 ", " 0.300 ", " best "]
    assert "| 2 | 0.200 |" in table.read_text() and "| 3 |" not in table.read_text()

    folder = tmp_path / "rounds"
    before = world.model
    for number in (1, 2):
        model = load_model(open_checkpoint(before), PrecisionConfig(compute="float32"), make_mesh(MeshConfig()))
        now = folder / f"round-{number}" / "run"
        assert open_checkpoint(now).meta["reference_model"] == model_fingerprint(model.params)
        before = now

    file.write_text(file.read_text().replace("samples: 3", "samples: 4"))
    with pytest.raises(UserError, match="holds rounds of another rounds samples"):
        run_rounds(load_rounds_config(str(file)), run)


def test_what_a_model_makes_up_like_a_telephone_number_ends_no_round(file, tmp_path, world, capsys):
    config = load_rounds_config(str(file))
    pair = {"prompt": "Q", "chosen": " call 090-1234-5678", "rejected": " no"}
    (tmp_path / "round-1").mkdir()
    write_json_lines(tmp_path / "round-1" / "pairs.jsonl", [pair, pair | {"chosen": " yes"}])
    assert rounds_module._make_pairs(Runner(main), config, epath.Path(tmp_path / "round-1"), str(world.model), 1)
    assert "personal data, masked: in 1 of 2 pairs" in capsys.readouterr().out


def test_a_stage_that_may_pass_when_it_is_started_again_says_so():
    for code, error in ((1, RunError), (2, UserError), (42, Preempted)):
        with pytest.raises(error, match="medllm train"):
            Runner(lambda words, code=code: code)("train")


@pytest.mark.parametrize(
    "entry", [None, [], {"n": 3}, {"accuracy": False, "n": 3}, {"accuracy": 2, "n": 3}, {"accuracy": 0.5, "n": True}]
)
def test_damaged_scores_are_one_line(tmp_path, entry):
    (tmp_path / "scores.json").write_text(json.dumps({"conditions": {"answer_only": entry}}))
    with pytest.raises(UserError, match="has no score under answer_only: it is damaged"):
        read_scores(tmp_path, ["answer_only"])


def test_without_pairs_it_ends_and_says_so(file, capsys):
    text = file.read_text().replace("strategy: gold", "strategy: onpolicy")
    file.write_text(text)
    assert main(["rounds", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "No pair" in printed and "| start | 0.000 |" in printed


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("rounds: 3", "rounds: 4", "temperature has 3 numbers and there are 4 rounds"),
        ("samples: 3", "sample: 3", "did you mean samples?"),
        ("samples: 3", "samples: 0", "samples is 0"),
        ("samples: 3", "samples: 3\nmost: 0", "max_pairs_per_prompt is 0"),
        ("samples: 3", "samples: 3\nmax_pairs_per_prompt: 0", "max_pairs_per_prompt is 0"),
        ("train: rpo.yaml", "train: nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(file, capsys, old, new, problem):
    file.write_text(file.read_text().replace(old, new))
    assert main(["rounds", "--config", str(file)]) == 2
    assert problem in (error := capsys.readouterr().err) and error.count("\n") == 1


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "rounds").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_rounds_load(file):
    config = load_rounds_config(str(file))
    assert load_run_config(config.train).objective.name == "rpo"

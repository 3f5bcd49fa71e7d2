"""The command line: exit codes, one line a mistake, and the verbs on tiny input from end to end."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import medllm_jax.cli
from medllm_jax.cli import main
from medllm_jax.errors import Preempted
from tests.tiny import write_json_lines
from tests.world import SEQUENCE_LENGTH


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def exam(tmp_path):
    rows = [
        {"id": f"q{n}", "question": f"{n}?", "choices": ["one", "two", "three"], "answer": "abc"[n % 3]}
        for n in range(5)
    ]
    return write_json_lines(tmp_path / "exam.jsonl", rows)


def config_file(tmp_path, world, **changes):
    lines = {
        "run": tmp_path / "run",
        "steps": 2,
        "data": f"{{store: {world.token_store}, batch_size: 8}}",
        "init": f"{{checkpoint: {world.model}}}",
        "precision": "{params: float32, compute: float32}",
    }
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in (lines | changes).items()))
    return file


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: --config"),
        (["train", "--config", "none.yaml"], "config file none.yaml does not exist"),
        (["evaluate", "--run", "x", "--exam", "y", "--exm", "z"], "unknown argument --exm: did you mean --exam?"),
        (["data", "cpt", "--input", "x"], "required: --tokenizer, --output"),
        (["data", "cpt", "--input", "x", "--tokenizer", "y", "--output", "z"], "error"),
        (["evaluate", "--run", "nowhere", "--exam", "nofile"], "nofile"),
    ],
)
def test_mistakes_exit_2_with_one_line(arguments, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    errors = capsys.readouterr().err
    assert line in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (Preempted("before its first step"), 42)])
def test_what_is_stopped_ends_at_once(monkeypatch, capsys, error, code):
    """Without taking the interpreter apart under threads that compile, which ends in a segmentation fault."""
    ended = []

    def stop(*_):
        raise error

    monkeypatch.setattr(medllm_jax.cli, "parse", stop)
    monkeypatch.setattr(medllm_jax.cli.os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["medllm", "train"])
    assert main(["train"]) == code and not ended, "a caller's process is not ended"
    main()
    assert ended == [code] and len(capsys.readouterr().err.splitlines()) == 2


def test_a_misspelt_setting_names_the_likely_one(world, tmp_path, capsys):
    file = config_file(tmp_path, world)
    assert run("train", "--config", file, "--optimizer.learnign_rate", 1) == 2
    assert "optimizer.learnign_rate: did you mean optimizer.learning_rate?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_cpt(world, tmp_path, capsys):
    arguments = ["data", "cpt", "--input", world.corpus, "--tokenizer", world.tokenizer]
    arguments += ["--output", tmp_path / "store", "--sequence-length", SEQUENCE_LENGTH]
    assert run(*arguments) == 0
    assert "60 documents in" in capsys.readouterr().out
    assert run(*arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--packing", "split", "--no-eos") == 0
    metadata = json.loads((tmp_path / "store" / "store.json").read_text())
    assert metadata["packing"] == "split"


def test_the_guide_goes_from_a_folder_of_text_to_a_running_cpt(world, tmp_path, monkeypatch, capsys):
    """The two commands as docs/corpora.md has them, but for fewer steps and a smaller vocabulary."""
    shutil.copytree(world.tokenizer, tmp_path / "Qwen2.5-7B")
    (tmp_path / "texts").mkdir()
    for number, line in enumerate(world.corpus.read_text().splitlines()):
        (tmp_path / "texts" / f"{number}.txt").write_text(json.loads(line)["text"])
    root = Path(__file__).parents[2]
    (tmp_path / "configs").symlink_to(root / "configs")
    monkeypatch.chdir(tmp_path)
    section = (root / "docs" / "corpora.md").read_text().split("## On the laptop")[1].split("\n## ")[0]
    commands = [line.strip() for line in section.splitlines() if line.startswith("    medllm ")]
    assert [command.split()[1] for command in commands] == ["data", "train"]
    for command in commands:
        assert run(*shlex.split(command.replace("152064", "512").replace("steps 20", "steps 2"))[1:]) == 0
    assert "60 documents in" in (printed := capsys.readouterr().out) and "trained: runs/first" in printed


def test_data_reports_what_it_left_out(world, tmp_path, capsys):
    bad = write_json_lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"txt": "no text"}, {"text": ""}])
    arguments = ["data", "cpt", "--input", bad, "--tokenizer", world.tokenizer, "--output", tmp_path / "store"]
    assert run(*arguments) == 2
    told = capsys.readouterr().err
    assert "bad.jsonl:2: no field `text`; 2 of 3 rows are bad" in told and "--on-bad skip" in told
    assert "it has txt: name the one that holds the text with --text-field" in told
    assert not (tmp_path / "store").exists()
    assert run(*arguments, "--on-bad", "skip") == 0
    printed = capsys.readouterr().out
    assert "bad.jsonl:2" in printed and "bad.jsonl:3" in printed


def test_fields_may_have_other_names(world, tmp_path, capsys):
    documents = write_json_lines(tmp_path / "documents.jsonl", [{"body": "fever"}])
    pairs = write_json_lines(
        tmp_path / "pairs.jsonl", [{"q": "why?", "good": " because", "rejected": " no", "id": 1, "from": "x"}]
    )
    common = ["--tokenizer", world.tokenizer, "--output", tmp_path / "store", "--overwrite"]
    assert run("data", "cpt", "--input", documents, "--text-field", "body", *common, "--workers", 1) == 0
    assert run("data", "pairs", "--input", pairs, "--columns", "prompt=q", "chosen=good", *common) == 0
    assert "left aside, since nothing reads them: the fields from" in capsys.readouterr().out
    wrong = {"answer=q": "no form of rows has the field answer", "x": "FIELD=NAME", "prompt=": "FIELD=NAME"}
    for column, message in wrong.items():
        assert run("data", "pairs", "--input", pairs, "--columns", column, *common) == 2
        assert message in capsys.readouterr().err
    assert run("data", "sft", "--input", pairs, "--columns", "prompt=q", "prompt=good", *common) == 2
    assert "names a field twice" in capsys.readouterr().err


def test_a_config_file_lists_corpora_and_settings(world, tmp_path, capsys):
    file = tmp_path / "corpora.yaml"
    corpus = {"name": "guidelines", "input": [str(world.corpus)], "licence": "CC-BY-4.0", "contact": "team"}
    config = {"corpora": [corpus], "tokenizer": str(world.tokenizer), "output": str(tmp_path / "store")}
    file.write_text(yaml.safe_dump(config | {"sequence_length": 64, "duplicates": "near", "pii_rate": 0.5}))
    assert run("data", "cpt", "--config", file, "--duplicates", "keep", "--workers", 1) == 0
    metadata = json.loads((tmp_path / "store" / "store.json").read_text())
    assert (metadata["recipe"]["duplicates"], metadata["recipe"]["pii_rate"]) == ("keep", 0.5)
    capsys.readouterr()
    assert run("data", "show", tmp_path / "store") == 0
    printed = capsys.readouterr().out
    assert "## guidelines" in printed and "licence: CC-BY-4.0" in printed and "characters per token" in printed
    for wrong, line in (
        ({"corpora": [corpus | {"license": "x"}]}, "corpora[0]: unknown key license: did you mean licence?"),
        ({"packings": "split"}, "unknown key packings: did you mean packing?"),
        ({"corpora": 3}, "corpora: expected a list of"),
    ):
        file.write_text(yaml.safe_dump(config | wrong))
        assert run("data", "cpt", "--config", file, "--overwrite") == 2
        assert line in capsys.readouterr().err


def test_verify_names_the_damage(world, tmp_path, capsys):
    shutil.copytree(world.token_store, tmp_path / "store")
    assert run("data", "verify", tmp_path / "store") == 0
    assert "rows are as they were written" in capsys.readouterr().out
    shard = tmp_path / "store" / "rows" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert run("data", "verify", tmp_path / "store") == 2
    assert "row 0 of store" in (error := capsys.readouterr().err) and "shard rows/c/0/0" in error


def test_nothing_is_trained_on_a_damaged_store(world, tmp_path, capsys):
    shutil.copytree(world.token_store, tmp_path / "store")
    shard = tmp_path / "store" / "rows" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert run("train", "--config", config_file(tmp_path, world), "--data.store", tmp_path / "store") == 2
    error = capsys.readouterr().err
    assert f"of store {tmp_path}/store is damaged or missing (shard rows/c/0/0)" in error and error.count("\n") == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_train_then_evaluate_then_pairs(world, tmp_path, exam, capsys):
    assert run("train", "--config", config_file(tmp_path, world), "--logging.every", "1") == 0
    assert "step 2/2" in capsys.readouterr().out

    evaluate = ["evaluate", "--run", tmp_path / "run", "--exam", exam, "--template", "plain"]
    assert run(*evaluate) == 0
    printed = capsys.readouterr().out
    assert "answer_only" in printed and "explain" in printed
    scores = json.loads(next((tmp_path / "run" / "evaluation").rglob("scores.json")).read_text())
    assert {name: s["n"] for name, s in scores["conditions"].items()} == {"answer_only": 5, "explain": 5}

    output = tmp_path / "pairs.jsonl"
    explained = [{**json.loads(line), "explanation": "Because."} for line in exam.read_text().splitlines()]
    with_gold = write_json_lines(tmp_path / "gold.jsonl", explained)
    arguments = ["pairs", "--run", tmp_path / "run", "--exam", with_gold, "--template", "plain", "--output", output]
    arguments += ["--samples", 2, "--most", 1, "--temperature", 1.5, "--conditions", "answer_only"]
    code = run(*arguments, "--strategy", "onpolicy")
    assert code == 2, "random weights answer nothing right, so nothing can be preferred"
    assert "no pair came out" in capsys.readouterr().err and not output.exists()


def test_a_bad_mesh_is_one_line(world, exam, capsys):
    for mesh, line in (
        ("data=3,fsdp=1", "does not divide 8 devices"),
        ("fsdp=x", "mesh"),
        ("rows=2", "sizes of axes are expected"),
    ):
        assert run("evaluate", "--run", world.model, "--exam", exam, "--template", "plain", "--mesh", mesh) == 2
        assert line in capsys.readouterr().err


def test_reference_of_a_cpt_config_is_refused(world, tmp_path, capsys):
    assert run("reference", "--config", config_file(tmp_path, world)) == 2
    assert "belong to an RPO run" in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_line_and_a_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medllm_jax.data.store.RowStore.open", lambda path: {}["a secret: token=hf_0123456789abcdefgh"])
    with pytest.raises(KeyError):
        run("data", "verify", tmp_path)
    monkeypatch.delenv("MEDLLM_TRACEBACK")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("data", "verify", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (report,) = tmp_path.glob("*/crashes/*.json")
    assert line.startswith("error: this was not foreseen (KeyError: ") and str(report) in line
    told = json.loads(report.read_text())
    assert told["error"] == "KeyError" and any("test_cli.py" in frame for frame in told["traceback"])
    assert "0123456789" not in line + report.read_text()


def test_a_reader_that_leaves_is_no_error(world):
    """As `medllm data show ... | head` does."""
    program = [sys.executable, "-m", "medllm_jax.cli", "data", "show", str(world.token_store)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1

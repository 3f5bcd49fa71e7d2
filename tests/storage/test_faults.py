"""What storage does not do is told in one line, with exit code 2 only where the user must change something."""

import contextlib
import errno
import io
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from medllm_jax.cli import main
from medllm_jax.config.load import to_yaml
from medllm_jax.errors import RunError, UserError
from medllm_jax.storage.faults import as_told, fault_of, passes
from tests.gcs import Gcs, be_impatient, environment
from tests.tiny import write_json_lines
from tests.tiny_hf import make_hf_folder
from tests.training.test_train import config_of
from tests.warm import WarmPython

# --- errors ----------------------------------------------------------------------------------------------------------


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "absent"),
        (FileNotFoundError("bucket/name"), "absent"),  # gcsfs
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "absent"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "forbidden"),
        (OSError(errno.EROFS, "Read-only file system"), "forbidden"),
        (OSError("Forbidden: b/b/o/x\nno rights"), "forbidden"),  # gcsfs
        (OSError(errno.ENOSPC, "No space left on device"), "full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "full"),
        (OSError(errno.EIO, "Input/output error"), "damaged"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "unreachable"),
        (TimeoutError("timed out"), "unreachable"),
        (ValueError("NOT_FOUND: Metadata at gs://b/x does not exist [tensorstore_spec='{}']"), "absent"),
        (ValueError("PERMISSION_DENIED: no [http_response_code='403']"), "forbidden"),
        (ValueError("UNAVAILABLE: all retry attempts failed"), "unreachable"),
        (ValueError("DATA_LOSS: checksum"), "damaged"),
        (ValueError("OUT_OF_RANGE: Failed writing: File too large [os_error_code='27']"), "full"),
        (ValueError("NOT_FOUND: Failed to open: x: Not a directory [os_error_code='20']"), "absent"),
        (raised_from(RuntimeError("a save failed"), OSError(errno.ENOSPC, "No space left on device")), "full"),
    ],
)
def test_kinds(error, kind):
    fault = fault_of(error)
    assert fault.kind == kind and "\n" not in fault.words and "tensorstore_spec" not in fault.words
    told = as_told(error)
    assert isinstance(told, UserError if kind == "absent" else RunError) and "\n" not in str(told)
    assert passes(error) == (kind in ("forbidden", "unreachable", "full"))


@pytest.mark.parametrize(
    "error",
    [
        *(None, ValueError("no space left"), ValueError("a: b"), KeyError("NOT_FOUND: x"), OSError("something")),
        raised_from(RuntimeError("RESOURCE_EXHAUSTED: out of memory of the device"), None),
    ],
)
def test_other_errors_are_none_of_storage(error):
    assert fault_of(error) is None and not passes(error)


def test_circles_of_causes_end():
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert fault_of(one) is None


# --- every verb, at every way in which a bucket can fail -------------------------------------------------------------

BROKEN = {f"status-{status}": status for status in (401, 403, 404, 429, 500, 503)} | {"resets": "reset", "cuts": "cut"}


def verbs(folder, away):
    """Name -> arguments of a verb, one of whose paths is in the place ``away``; all others are local and right."""
    world, out = folder / "world", folder / "out" / Path(away).name
    train = ["--config", folder / "cpt.yaml"]
    data = {
        kind: ["data", kind, "--input", folder / f"{rows}.jsonl", "--tokenizer", world / "tok", "--sequence-length", 64]
        for kind, rows in (("cpt", "corpus"), ("pairs", "pairs"), ("sft", "sft"))
    }
    asked = ["--exam", folder / "exam.jsonl", "--template", "plain", "--conditions", "answer_only"]
    model = ["--run", world / "model"]
    scored = ["--exam", "questions", "--data", folder / "exam.jsonl", "--predictions", folder / "predictions.jsonl"]

    def of(arguments, option, value):
        place = arguments.index(option) + 1
        return [*arguments[:place], value, *arguments[place + 1 :]]

    return {
        "data show": ["data", "show", f"{away}/cpt"],
        "data verify": ["data", "verify", f"{away}/cpt"],
        **{f"{k} input": [*of(a, "--input", f"{away}/in.jsonl"), "--output", out / "1"] for k, a in data.items()},
        **{f"{k} folder": [*of(a, "--input", f"{away}/in"), "--output", out / "2"] for k, a in data.items()},
        **{f"{k} tokenizer": [*of(a, "--tokenizer", f"{away}/tok"), "--output", out / "3"] for k, a in data.items()},
        **{f"{k} output": [*a, "--output", f"{away}/new"] for k, a in data.items()},
        "train store": ["train", *train, "--run", out / "run", "--data.store", f"{away}/cpt"],
        "train init": ["train", *train, "--run", out / "run", "--init.checkpoint", f"{away}/model"],
        "train run": ["train", *train, "--run", f"{away}/run"],
        "reference store": ["reference", "--config", folder / "rpo.yaml", "--data.store", f"{away}/rpo"],
        "evaluate run": ["evaluate", "--run", f"{away}/model", *asked, "--output", out / "4"],
        "evaluate exam": ["evaluate", *model, *of(asked, "--exam", f"{away}/exam.jsonl"), "--output", out / "5"],
        "evaluate output": ["evaluate", *model, *asked, "--output", f"{away}/results"],
        "samples run": ["pairs", "--run", f"{away}/model", *asked, "--output", out / "6.jsonl"],
        "samples output": ["pairs", *model, *asked, "--output", f"{away}/pairs.jsonl"],
        "score data": ["score", *of(scored, "--data", f"{away}/exam.jsonl")],
        "score predictions": ["score", *of(scored, "--predictions", f"{away}/predictions.jsonl")],
        "score output": ["score", *scored, "--output", f"{away}/scores"],
        "report run": ["report", f"{away}/run", "--output", out / "7"],
        "report output": ["report", folder / "results" / "predictions", "--output", f"{away}/report"],
        "from-hf source": ["convert", "from-hf", f"{away}/hf", out / "8"],
        "from-hf target": ["convert", "from-hf", folder / "hf", f"{away}/converted"],
        "to-hf source": ["convert", "to-hf", f"{away}/model", out / "9"],
        "to-hf target": ["convert", "to-hf", world / "model", f"{away}/export"],
        "verify": ["convert", "verify", f"{away}/model", world / "model"],
    }


WRITING = [f"{verb} output" for verb in ("cpt", "pairs", "sft", "evaluate", "samples", "score", "report")]
WRITING += ["train run", "from-hf target", "to-hf target"]


def run_all(folder, places, only, disk_bytes):
    """Runs the verbs one after the other, and prints what became of each as a line of JSON."""
    be_impatient()
    os.environ.pop("MEDLLM_TRACEBACK")
    if disk_bytes != "all":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(disk_bytes), resource.RLIM_INFINITY))
    for place in places.split(","):
        for name, arguments in verbs(Path(folder), place).items():
            if only and name not in only.split(","):
                continue
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main([str(each) for each in arguments])
            print(json.dumps({"verb": name, "place": place, "code": code, "said": said.getvalue()}), flush=True)


def outcomes(variables, folder, places, only=(), disk_bytes="all"):
    code = "import sys; from tests.storage.test_faults import run_all; run_all(*sys.argv[1:])"
    arguments = ("-c", code, folder, ",".join(places), ",".join(only), disk_bytes)
    process = WarmPython(*arguments, stdout=-1, environment=variables)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(rows) == len(places) * len(only or verbs(folder, ""))
    return rows


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Right inputs for every verb."""
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "world").symlink_to(world.root)
    for name in ("corpus.jsonl", "pairs.jsonl"):
        (folder / name).write_bytes((world.root / name).read_bytes())
    write_json_lines(folder / "sft.jsonl", [{"prompt": "fever?", "response": "no"}])
    row = {"id": "q1", "question": "1?", "choices": ["one", "two"], "answer": "a"}
    write_json_lines(folder / "exam.jsonl", [row])
    write_json_lines(folder / "predictions.jsonl", [{"id": "q1", "text": "a"}])
    make_hf_folder(folder / "hf")
    for kind in ("cpt", "rpo"):
        (folder / f"{kind}.yaml").write_text(to_yaml(config_of(world, folder / "run", kind, steps=2)))
    assert main([str(each) for each in [*verbs(folder, "")["score output"][:-1], folder / "results"]]) == 0
    return folder


def assert_told(row):
    """One line, and exit code 2 only for what is absent."""
    lines = row["said"].splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    assert row["code"] == (2 if row["place"] == "gs://status-404" else 1), row
    assert len(told) == 1 and told == lines[-1:] and len(told[0]) < 600, row
    assert not any(word in row["said"] for word in ("Traceback", "not foreseen")), row


def test_every_verb_tells_that_it_may_not(folder):
    with Gcs(broken=BROKEN) as gcs:
        rows = outcomes(environment(gcs.url), folder, ["gs://status-403"])
    for row in rows:
        assert_told(row)


def test_every_fault_is_told(folder):
    with Gcs(broken=BROKEN) as gcs:
        some = ["data show", "cpt output", "train init", "to-hf target"]
        rows = outcomes(environment(gcs.url), folder, [f"gs://{bucket}" for bucket in BROKEN], some)
    for row in rows:
        assert_told(row)


@pytest.mark.slow
def test_every_verb_tells_every_fault(folder):
    with Gcs(broken=BROKEN) as gcs:
        rows = outcomes(environment(gcs.url), folder, [f"gs://{bucket}" for bucket in BROKEN])
    for row in rows:
        assert_told(row)


def test_no_network(folder):
    nowhere = environment("http://127.0.0.1:1")
    for row in outcomes(nowhere, folder, ["gs://bucket"], ["cpt input", "data show", "from-hf target"]):
        assert_told(row)


@pytest.mark.parametrize("disk_bytes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_verb_that_writes_tells_of_a_full_disk(folder, tmp_path, disk_bytes):
    for row in outcomes({}, folder, [str(tmp_path / "full")], WRITING, disk_bytes):
        if (row["verb"], row["code"]) != ("evaluate output", 0):  # its few results fit
            assert_told(row)
            assert "no space is left" in row["said"] or "the disk is full" in row["said"]

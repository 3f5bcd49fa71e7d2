"""`--check` looks by commands that change nothing, and tells what is right, wrong or unknown."""

import json

import pytest

from medllm_jax.cli import launch
from medllm_jax.cli.launch import main
from tests.gcs import Gcs
from tests.gcs_programs import Python
from tests.launching.fakes import OWN, PLACES

CHANGING = {"apply", "submit", "delete", "scp", "ssh", "add-iam-policy-binding", "cancel", "push", "pull"}
GKE_MEMBER = "principal://iam.googleapis.com/projects/1/x.svc.id.goog/subject/ns/default/sa/medllm"
QUOTA = [{"quotaId": "TPUV5PPerProject", "dimensionsInfos": [{"details": {"value": "128"}, "applicableLocations": []}]}]


def policy(role="roles/storage.objectUser", member=GKE_MEMBER):
    return json.dumps({"bindings": [{"role": role, "members": [member]}]})


@pytest.fixture
def all_right(fakes):
    """Programs that find everything as it should be."""
    gcloud = {
        "buckets_describe": (0, "US-EAST5"),
        "get-iam-policy": (0, policy()),
        "quotas": (0, json.dumps(QUOTA)),
        "clusters_describe": (0, "RUNNING"),
        "queued-resources_describe": (1, ""),
        "accelerator-types": (0, "v5p-128"),
    }
    kubectl = {
        "can-i": (0, "yes"),
        "get_nodes": (0, "\n".join(f"node/{n}" for n in range(16))),
        "get_jobset": (0, ""),
        "get_": (0, "there"),
    }
    rules = {"gcloud": gcloud, "kubectl": kubectl, "docker": {"manifest": (0, "{}")}, "xpk": {"list": (0, "other")}}

    def set_(program="gcloud", **changed):
        rules[program] = changed | {words: said for words, said in rules[program].items() if words not in changed}
        for name, said in rules.items():
            fakes.rule(name, **said)
        return fakes

    set_()
    return set_


@pytest.fixture
def only_commands(monkeypatch):
    """Nothing is read from buckets."""
    monkeypatch.setattr(launch, "_of_what_is_read", lambda *_: ())


def found(capsys):
    *lines, count = capsys.readouterr().out.splitlines()
    return [line.split(maxsplit=1) for line in lines], count


@pytest.mark.parametrize("way", OWN)
def test_it_looks_and_changes_nothing(all_right, only_commands, arguments, way, capsys):
    fakes = all_right()
    assert main(arguments(way, "--check")) == 0
    findings, count = found(capsys)
    assert len(findings) >= 4 and "0 wrong" in count and not any(state == "wrong" for state, _ in findings)
    calls = fakes.calls()
    assert len(calls) == len(findings), "every finding is a look, and every look is told"
    for call in calls:
        words = call["arguments"]
        assert not CHANGING & set(words) and ("create" not in words or "can-i" in words)


def test_all_that_a_cluster_needs_is_found(all_right, only_commands, arguments, capsys):
    all_right()
    named = ["--service-account", "medllm", "--queue", "q", "--priority", "p", "--secret", "keys"]
    assert main(arguments("gke", "--check", *named)) == 0
    findings, count = found(capsys)
    assert all(state == "ok" for state, _ in findings), findings
    assert count == f"{len(findings)} are right, 0 can't be told from here, 0 wrong"
    assert {text.split(":")[0] for _, text in findings} >= {
        "role on gs",
        "image registry.example/p/medllm",
        "nodes of v5p",
        "serviceaccount medllm",
        "localqueues.kueue.x-k8s.io q",
    }


@pytest.mark.parametrize(
    ("way", "program", "changed", "state", "text"),
    [
        ("gke", "gcloud", {"buckets_describe": (1, "")}, "wrong", "bucket gs://bucket: it can't be seen"),
        (
            "tpu-vm",
            "gcloud",
            {"buckets_describe": (0, "ASIA")},
            "wrong",
            "it is in ASIA, and the chips are in us-east5",
        ),
        ("gke", "gcloud", {"get-iam-policy": (0, "{}")}, "unknown", "has none here; unless the project gives one"),
        ("gke", "gcloud", {"get-iam-policy": (0, "not")}, "unknown", "no policy that is understood"),
        (
            "gke",
            "gcloud",
            {"get-iam-policy": (0, policy("roles/storage.objectViewer"))},
            "wrong",
            "has only roles/storage.objectViewer: roles/storage.objectUser is needed",
        ),
        ("gke", "docker", {"manifest": (1, "")}, "wrong", "image registry.example/p/medllm:1: it is not there"),
        ("gke", "kubectl", {"can-i": (1, "no")}, "wrong", "your right to create a JobSet: no"),
        ("gke", "kubectl", {"get_nodes": (0, "node/1")}, "unknown", "1 of 16 are there"),
        ("gke", "kubectl", {"get_jobset": (0, "jobset/cpt-72b")}, "wrong", "a JobSet of that name is there"),
        ("gke", "kubectl", {"get_": (1, "")}, "wrong", "JobSet: it is not there"),
        ("xpk", "xpk", {"list": (0, "cpt-72b  RUNNING")}, "wrong", "a workload cpt-72b is there"),
        ("gcluster", "gcloud", {"clusters_describe": (0, "ERROR")}, "wrong", "cluster tpus: it is ERROR"),
        ("tpu-vm", "gcloud", {"queued-resources_describe": (0, "ACTIVE")}, "wrong", "a queued resource of that name"),
        ("tpu-vm", "gcloud", {"accelerator-types": (1, "")}, "wrong", "v5p-128 in us-east5-a: it is not there"),
        ("tpu-vm", "gcloud", {"quotas": (1, "")}, "unknown", "gcloud can't list quotas"),
        ("tpu-vm", "gcloud", {"quotas": (0, "[]")}, "unknown", "gcloud lists none by that name"),
        (
            "tpu-vm",
            "gcloud",
            {"quotas": (0, json.dumps(QUOTA).replace("128", "32"))},
            "wrong",
            "64 chips are asked for, and there are TPUV5PPerProject 32",
        ),
    ],
)
def test_what_is_missing_is_told(all_right, only_commands, arguments, capsys, way, program, changed, state, text):
    all_right(program, **{"get_crd" if words == "get_" else words: answer for words, answer in changed.items()})
    own = ["--service-account", "medllm"] if way == "gke" else []
    assert main(arguments(way, "--check", *own)) == (1 if state == "wrong" else 0)
    findings, _ = found(capsys)
    (told,) = [line for line in findings if text in line[1]]
    assert told[0] == state


def test_a_program_that_is_missing_is_no_fault_of_the_launch(
    fakes, only_commands, arguments, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments("gke", "--check")) == 0
    findings, _ = found(capsys)
    assert {state for state, _ in findings} == {"unknown"} and "gcloud is not installed here" in findings[0][1]


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("gcloud", "buckets_describe", "ERROR: (gcloud.storage) You do not currently have an active account selected."),
        (
            "kubectl",
            "can-i",
            "The connection to the server localhost:8080 was refused - did you specify the right host?",
        ),
    ],
)
def test_who_is_not_logged_in_is_told_that_nothing_was_asked(
    all_right, only_commands, arguments, capsys, program, words, said
):
    all_right(program, **{words: (1, said)})
    assert main(arguments("gke", "--check")) == 0
    findings, _ = found(capsys)
    (told,) = [line for line in findings if said[:30] in line[1]]
    assert told[0] == "unknown" and f"{program} can't ask from here" in told[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run": "gs://my-bucket/runs/cpt"}, "--run gs://my-bucket/runs/cpt"),
        ({"overrides": ["--data.store", "gs://your-bucket/s", *PLACES[2:]]}, "data.store gs://your-bucket/s"),
        ({"options": ["--service-account", "<account>"]}, "--service-account <account>"),
        ({"options": ["--queue", "QUEUE"]}, "--queue QUEUE"),
    ],
)
def test_what_stands_for_the_readers_own_is_not_launched(fakes, arguments, capsys, given, told):
    options = given.pop("options", [])
    for looks in ([], ["--check"]):
        assert main(arguments("gke", *options, *looks, **given)) == 2
        assert f"error: {told} stands for something of yours" in capsys.readouterr().err
    assert fakes.calls() == []
    assert main(arguments("gke", *options, "--dry-run", **given)) == 0
    assert f"# before it is launched, put yours in place of {told}" in capsys.readouterr().out


def test_a_dry_run_ends_with_the_cost_and_how_to_watch(fakes, arguments, capsys):
    assert main(arguments("gke", "--dry-run", "--price", "4.2", "--mfu", "0.4", "--namespace", "research")) == 0
    beside = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert beside[0] == "# the run: 10,000 steps of 1,048,576 tokens: 10,485,760,000 tokens"
    assert "(an MFU of 40% is assumed; medllm plan estimates it)" in beside[1] and "; price " in beside[1]
    assert beside[2].startswith("# checkpoints: 872.5 GB each; the newest 3, 2.6 TB, are kept")
    assert any("kubectl --namespace=research logs --follow" in line for line in beside)
    assert beside[-1] == "# to end it, after saving: kubectl --namespace=research delete jobset cpt-72b"


@pytest.mark.parametrize("way", OWN)
def test_what_was_launched_is_told_how_to_watch(fakes, arguments, capsys, way):
    assert main(arguments(way)) == 0
    told = capsys.readouterr().out
    assert "curves: tensorboard --logdir=gs://bucket/runs/cpt-72b" in told and "to end it, after saving" in told


def test_stores_and_models_are_read_as_the_run_will_read_them(world, fakes, arguments, tmp_path):
    """In a bucket, by the very code that a run has."""
    with Gcs("bucket") as gcs:
        gcs.upload(world.token_store, "gs://bucket/corpus")
        gcs.upload(world.model, "gs://bucket/model")
        config = tmp_path / "run.yaml"
        config.write_text(
            "run: gs://bucket/run\nsteps: 4\ndata: {store: gs://bucket/corpus, batch_size: 8}\n"
            "init: {checkpoint: gs://bucket/model}\nmesh: {data: 1, fsdp: 4, tensor: 1}\n"
        )
        shared = {"config": str(config), "topology": "v5p:2x2x1", "run": "gs://bucket/run"}

        def check(*overrides):
            given = arguments("gke", "--check", overrides=overrides, **shared)
            return Python(gcs, "-m", "medllm_jax.cli", "launch", *given).output()

        said = check()
        assert "ok      store gs://bucket/corpus: 65 rows of 64 tokens" in said, said
        assert "ok      run gs://bucket/run: a new run" in said
        assert "the run: 4 steps of 512 tokens: 2,048 tokens, 0.49 epochs of the store" in said
        said = check("--data.store", "gs://bucket/none")
        (line,) = [line for line in said.splitlines() if "store gs://bucket/none" in line]
        assert line.startswith("wrong") and "the run:" not in said

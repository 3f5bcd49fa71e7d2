"""Manifests without a cluster: by Kubernetes' own schemas, beside xpk's, and what they make of exit codes."""

import copy
import os
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from medllm_jax.config.load import build, load_run_config
from medllm_jax.config.schema import RunConfig
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.launching.slices import slices_of
from tests.launching.fakes import PLACES, ROOT, commands_of

SHIPPED = sorted(path.name for path in (ROOT / "configs" / "runs").glob("*-v5p-*.yaml"))


def objects(given):
    (command,) = commands_of(given)
    return list(yaml.safe_load_all(command.stdin))


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def check(kind, api_version, content, version):
    described = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "a"}, **content}
    kubernetes_validate.validate(described, version, strict=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_kubernetes_takes_what_every_shipped_config_becomes(arguments, name):
    config = str(ROOT / "configs" / "runs" / name)
    shape, _, slices = re.fullmatch(r".*-v5p-([0-9x]+?)(-x(\d+))?\.yaml", name).groups()
    options = ["--queue", "q", "--priority", "p", "--service-account", "s", "--secret", "k", "--spot"]
    given = arguments("gke", *options, "--slices", slices or "1", config=config, topology=f"v5p:{shape}")
    config_map, jobset = objects(given)
    for version in ("1.29", "1.31", "1.33"):
        check("ConfigMap", "v1", config_map, version)
        check("Job", "batch/v1", {"spec": job_of(jobset)}, version)
        check("Pod", "v1", {"spec": job_of(jobset)["template"]["spec"]}, version)
    launched = build(RunConfig, yaml.safe_load(config_map["data"]["run.yaml"]), name)
    overrides = [*PLACES, "--run", "gs://bucket/runs/cpt-72b"]
    assert launched == load_run_config(config, overrides) and launched.distributed


# Bare, kubectl's YAML reads them as true, numbers, nothing and a date.
BARE = [
    "y",
    "N",
    "on",
    "1e3",
    "1e-5",
    "5e-1",
    ".5e1",
    "0o17",
    "0x1f",
    "1_000",
    "null",
    "~",
    "",
    "2026-11-26",
    ".inf",
    "=",
    "<<",
]


def test_no_text_is_bare_in_a_manifest(arguments):
    names = [
        name for number, _ in enumerate(BARE) for name in ("--env", f"{'yNnofe'[number % 6]}{number}={BARE[number]}")
    ]
    (command,) = commands_of(arguments("gke", *names, "--env", "N=1", "--env", "y=a\nb", run="gs://bucket/y"))
    texts = [event for event in yaml.parse(command.stdin) if isinstance(event, yaml.ScalarEvent)]
    bare = {event.value for event in texts if not event.style}
    assert all(re.fullmatch(r"\d+|true|false", value) for value in bare), bare
    _, jobset = yaml.safe_load_all(command.stdin)
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert [given[f"{'yNnofe'[number % 6]}{number}"] for number, _ in enumerate(BARE)] == BARE
    assert jobset["metadata"]["name"] == "y" and given["y"] == "a\nb"


@pytest.mark.parametrize(
    ("kind", "where", "wrong"),
    [
        ("Job", ("completions",), "sixteen"),
        ("Job", ("podFailurePolicies",), {}),
        ("Pod", ("nodeselector",), {}),
        ("Pod", ("tolerations", 0, "operator"), 1),
    ],
)
def test_kubernetes_schemas_see_mistakes(arguments, kind, where, wrong):
    job = copy.deepcopy(job_of(objects(arguments())[1]))
    spec = job if kind == "Job" else job["template"]["spec"]
    *path, last = where
    inside = spec
    for key in path:
        inside = inside[key]
    inside[last] = wrong
    with pytest.raises(kubernetes_validate.ValidationError):
        check(kind, "batch/v1" if kind == "Job" else "v1", {"spec": spec}, "1.33")


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "label", "machine", "tpu_type", "accelerator_type"),
    [
        ("v5p:2x2x1", 1, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-2x2x1", "v5p-8"),
        ("v5p:2x2x2", 2, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-2x2x2", "v5p-16"),
        ("v5p:2x4x4", 8, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-2x4x4", "v5p-64"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-4x4x4", "v5p-128"),
        ("v5p:4x4x12", 48, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-4x4x12", "v5p-384"),
        ("v5p:8x8x8", 128, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-8x8x8", "v5p-1024"),
        ("v5p:8x8x12", 192, 4, "tpu-v5p-slice", "ct5p-hightpu-4t", "v5p-8x8x12", "v5p-1536"),
        ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-1t", "v5litepod-1x1", "v5litepod-1"),
        ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod-4x4", "v5litepod-16"),
        ("v6e:2x2", 1, 4, "tpu-v6e-slice", "ct6e-standard-4t", "v6e-2x2", "v6e-4"),
        ("v6e:16x16", 64, 4, "tpu-v6e-slice", "ct6e-standard-4t", "v6e-16x16", "v6e-256"),
    ],
)
def test_slices_have_their_hosts_and_names(topology, hosts, chips, label, machine, tpu_type, accelerator_type):
    slices = slices_of(parse_topology(topology))
    assert (slices.hosts, slices.chips_per_host) == (hosts, chips)
    assert (slices.generation.accelerator, slices.machine) == (label, machine)
    assert (slices.tpu_type, slices.accelerator_type) == (tpu_type, accelerator_type)


def test_a_slice_is_a_job_and_a_host_a_pod(arguments):
    overrides = [*PLACES, "--mesh.data", "2", "--data.batch_size", "512"]
    _, jobset = objects(arguments("gke", "--slices", "2", overrides=overrides))
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    job = job_of(jobset)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (16, 16, "Indexed")
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    run = ["--run", "gs://bucket/runs/cpt-72b", "--distributed", "true"]
    assert container["command"] == ["medllm", "train", "--config", "/etc/medllm/run.yaml", *run]


def test_another_config_never_changes_what_a_restart_reads(arguments):
    first, jobset = objects(arguments())
    second, _ = objects(arguments(overrides=[*PLACES, "--seed", "1"]))
    assert first["immutable"] and first["metadata"]["name"] != second["metadata"]["name"]
    (volume,) = job_of(jobset)["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == first["metadata"]["name"]


def test_options_reach_the_manifest(arguments):
    options = ["--queue", "q", "--priority", "high", "--service-account", "sa", "--secret", "wandb", "--spot"]
    more = ["--reservation", "ours", "--env", "A=b=c", "--grace-seconds", "60", "--max-restarts", "3"]
    _, jobset = objects(arguments("gke", *options, *more))
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    pod = job_of(jobset)["template"]["spec"]
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("high", "sa")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    assert pod["terminationGracePeriodSeconds"] == 60
    (container,) = pod["containers"]
    assert {"name": "A", "value": "b=c"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]


def what_happens(jobset, code=None, *, disrupted=False):
    """What the controllers of Jobs and JobSets do about a Pod: their rules, and the messages that one writes and the
    other reads."""
    rules = job_of(jobset)["podFailurePolicy"]["rules"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(rules):
        assert rule["action"] == "FailJob"
        if code in rule.get("onExitCodes", {}).get("values", ()):
            says = f"Container medllm for pod default/cpt-72b-slice-0-0-x7k2p failed with exit code {code}"
        elif disrupted and "onPodConditions" in rule:
            says = "Pod default/cpt-72b-slice-0-0-x7k2p has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{says} matching FailJob rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_get_what_they_ask_for(arguments):
    _, jobset = objects(arguments())
    assert what_happens(jobset, 2) == "FailJobSet"
    assert what_happens(jobset, 42) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_happens(jobset, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_happens(jobset, 42, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_happens(jobset, 2, disrupted=True) == "FailJobSet"
    for code in {*range(1, 256)} - {2, 42}:
        assert what_happens(jobset, code) == "RestartJobSet"
    names = [rule["name"] for rule in jobset["spec"]["failurePolicy"]["rules"]]
    assert all(re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name) for name in names)
    assert job_of(jobset)["backoffLimit"] == 0
    assert job_of(jobset)["template"]["spec"]["restartPolicy"] == "Never"  # or there may be no podFailurePolicy


# Where our JobSet differs from xpk's, and why.
SPEC, JOB = "spec.replicatedJobs.0", "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"
ON_PURPOSE = {
    "metadata.namespace": "said in the manifest instead of by kubectl's settings",
    "metadata.labels": "Kueue's queue is an option, others are each tool's own",
    "spec.ttlSecondsAfterFinished": "how a run ended can be seen until it is deleted",
    "spec.network": "the default, written down",
    "spec.failurePolicy.rules": "preemptions don't count, and restart even after the last counted restart",
    f"{SPEC}.name": "each tool's own",
    f"{JOB}.completionMode": "the JobSet controller's default, written down",
    f"{JOB}.podFailurePolicy": "the codes that are not restarted instead of those that are",
    f"{JOB}.template.metadata": "xpk's own labels",
    f"{POD}.schedulerName": "the default",
    f"{POD}.imagePullSecrets": "none: the node's service account reads the registry",
    f"{POD}.volumes": "xpk's is shared memory, which nothing here uses; ours is the config",
    f"{POD}.containers.0.name": "each tool's own",
    f"{POD}.containers.0.command": "no shell between Kubernetes and medllm",
    f"{POD}.containers.0.env": "a setting that xpk gets in its command",
    f"{POD}.containers.0.ports": "written down, as Google's guides do",
    f"{POD}.containers.0.securityContext.runAsUser": "our image's user is not root, and the devices are root's",
    f"{POD}.containers.0.volumeMounts": "see volumes",
}


def flat(value, path=""):
    """Path -> value of every leaf; empty ones are left out, as Kubernetes does."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: leaf for key, inner in items for p, leaf in flat(inner, f"{path}.{key}".lstrip(".")).items()}
    return {} if value is None else {path: value}


@pytest.fixture
def by_xpk(arguments, tmp_path):
    """by_xpk(options, **launch): the JobSet that xpk makes of our command for it, and the command."""
    xpk = shutil.which("xpk", path=f"{ROOT / '.venv-xpk' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if not xpk:
        pytest.skip("xpk is not installed: make xpk")

    def make(options, **launch):
        (command,) = commands_of(arguments("xpk", *options, "--project", "p", "--zone", "us-east5-a", **launch))
        file = tmp_path / "jobset.yaml"
        dry = ["--dry-run", "--skip-validation", f"--output-manifest-file={file}"]
        at_home = dict(os.environ, HOME=str(tmp_path))
        ran = subprocess.run([xpk, *command.words[1:], *dry], capture_output=True, text=True, env=at_home, cwd=tmp_path)
        assert file.exists(), ran.stdout + ran.stderr
        return yaml.safe_load(file.read_text()), command

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "slices"),
    [("v5p:4x4x4", 1), ("v5p:4x4x4", 2), ("v5p:2x2x2", 1), ("v5p:4x8x8", 1), ("v5e:4x4", 1), ("v6e:4x8", 2)],
)
def test_the_jobset_is_xpks_but_for_what_differs_on_purpose(arguments, by_xpk, topology, slices):
    chips = slices_of(parse_topology(topology, slices)).devices
    overrides = [*PLACES, "--mesh.data", str(slices), "--data.accumulate", "1", "--data.batch_size", str(chips)]
    options = ["--slices", str(slices), "--grace-seconds", "120", "--max-restarts", "7", "--priority", "high"]
    _, jobset = objects(arguments("gke", *options, topology=topology, overrides=overrides))
    theirs, _ = by_xpk(options, topology=topology, overrides=overrides)
    a, b = flat(jobset), flat(theirs)
    differing = {path for path in {*a, *b} if a.get(path) != b.get(path)}
    excuses = {path: [known for known in ON_PURPOSE if f"{path}.".startswith(f"{known}.")] for path in differing}
    assert not {path: (a.get(path), b.get(path)) for path, known in excuses.items() if not known}
    assert {known for several in excuses.values() for known in several} == set(ON_PURPOSE)  # none is out of date
    assert len(set(a) - differing) >= 15
    # What xpk never restarts: all codes but those that it was told, and its own.
    (rule,) = job_of(theirs)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert set(rule["onExitCodes"]["values"]) == {1, 42, *range(127, 256)}


@pytest.mark.slow
def test_what_xpk_wraps_around_the_command_keeps_its_exit_code(by_xpk, fakes):
    theirs, command = by_xpk([])
    (container,) = job_of(theirs)["template"]["spec"]["containers"]
    assert command.words[-1].removeprefix("--command=") in container["command"][-1]
    fakes.answer("medllm", "42 ")
    assert subprocess.run(container["command"], capture_output=True).returncode == 42
    (call,) = fakes.calls()
    assert call["program"] == "medllm" and call["arguments"][0] == "train"

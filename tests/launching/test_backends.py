"""What every way would run, exactly; that what is printed does the same when pasted; and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medllm_jax.cli.launch import main
from medllm_jax.config.load import build, load_run_config, to_plain
from medllm_jax.config.schema import RunConfig
from medllm_jax.launching.commands import Command, run
from tests.launching.fakes import CONFIG, OWN, PLACES, ROOT, commands_of

IMAGE = "registry.example/p/medllm:1"
EXPECTED_CONFIG = [*PLACES, "--run", "gs://bucket/runs/cpt-72b", "--distributed", "true"]


def shell_line(arguments):
    """The --command of a recorded call."""
    return next(word.removeprefix("--command=") for word in arguments if word.startswith("--command="))


def options_of(arguments):
    return dict(word.partition("=")[::2] for word in arguments if word.startswith("--") and "--command" not in word)


def brings(line, fakes):
    """The config and arguments that a line of shell starts medllm with."""
    subprocess.run(["bash", "-c", line], check=True, env=dict(os.environ))
    (call,) = fakes.calls()
    assert call["program"] == "medllm"
    file = call["arguments"][call["arguments"].index("--config") + 1]
    return load_run_config(Path(file)), call["arguments"]


def test_gke_applies_a_manifest(fakes, arguments):
    assert main(arguments("gke", "--context", "there", "--namespace", "research")) == 0
    (call,) = fakes.calls()
    assert (call["program"], call["arguments"]) == ("kubectl", ["--context=there", "apply", "-f", "-"])
    config_map, jobset = yaml.safe_load_all(call["stdin"])
    assert (config_map["kind"], jobset["kind"], jobset["metadata"]["name"]) == ("ConfigMap", "JobSet", "cpt-72b")
    assert {config_map["metadata"]["namespace"], jobset["metadata"]["namespace"]} == {"research"}


def test_xpk_is_told_what_to_restart(fakes, arguments):
    assert main(arguments("xpk", "--max-restarts", "4", "--zone", "us-east5-a", "--priority", "high")) == 0
    (call,) = fakes.calls()
    assert (call["program"], call["arguments"][:2]) == ("xpk", ["workload", "create"])
    assert options_of(call["arguments"]) == {
        "--workload": "cpt-72b",
        "--cluster": "tpus",
        "--zone": "us-east5-a",
        "--tpu-type": "v5p-4x4x4",
        "--num-slices": "1",
        "--docker-image": IMAGE,
        "--priority": "high",
        "--max-restarts": "4",
        "--restart-on-exit-codes": "1",  # beside 42 and 127 to 255
        "--termination-grace-period-seconds": "300",
    }


def test_gcluster_is_told_what_to_restart(fakes, arguments):
    assert main(arguments("gcluster", "--max-restarts", "0", "--spot", "--queue", "q")) == 0
    (call,) = fakes.calls()
    assert (call["program"], call["arguments"][:2]) == ("gcluster", ["job", "submit"])
    options = options_of(call["arguments"])
    codes = {int(code) for code in options.pop("--restart-on-exit-codes").split(",")}
    assert codes == {1, 42, *range(128, 256)}
    assert options == {
        "--name": "cpt-72b",
        "--cluster": "tpus",
        "--project": "p",
        "--location": "us-east5",
        "--compute-type": "ct5p-hightpu-4t",
        "--topology": "4x4x4",
        "--num-slices": "1",
        "--image": IMAGE,
        "--queue": "q",
        "--restarts": "0",  # without it, it is 1
        "--grace-period": "300s",
        "--gke-nap-provisioning": "spot",
    }


@pytest.mark.parametrize(
    ("slices", "nodes"), [(1, ["--node-id=cpt-72b"]), (2, ["--node-count=2", "--node-prefix=cpt-72b"])]
)
def test_tpu_vms_are_asked_for_awaited_and_started(fakes, arguments, slices, nodes):
    overrides = [*PLACES, "--mesh.data", str(slices), "--data.batch_size", str(256 * slices)]
    assert main(arguments("tpu-vm", "--slices", str(slices), "--spot", overrides=overrides)) == 0
    create, describe, scp, ssh = (call["arguments"][3:] for call in fakes.calls())
    place = ["--project=p", "--zone=us-east5-a"]
    everywhere = ["--worker=all", "--node=all", "--batch-size=all"]
    kind = ["--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"]
    assert create == ["create", "cpt-72b", *place, *kind, *nodes, "--scopes=cloud-platform", "--spot"]
    assert describe == ["describe", "cpt-72b", *place, "--format=value(state.state)"]
    assert scp == ["scp", str(ROOT / "medllm_jax" / "launching" / "run_on_host.sh"), "cpt-72b:", *place, *everywhere]
    assert ssh[:-1] == ["ssh", "cpt-72b", *place, *everywhere]
    assert shell_line(ssh).startswith(f"sudo nohup bash run_on_host.sh {IMAGE} 10 300 bash -c ")
    assert shell_line(ssh).endswith(" >medllm.log 2>&1 </dev/null &")


@pytest.mark.parametrize("way", ["xpk", "gcluster"])
def test_a_launcher_without_files_gets_the_config_in_the_command(fakes, arguments, way):
    assert main(arguments(way, overrides=[*PLACES, "--held_out.exam", "gs://bucket/it's an exam"])) == 0
    (call,) = fakes.calls()
    config, started = brings(shell_line(call["arguments"]), fakes)
    assert config == load_run_config(CONFIG, [*EXPECTED_CONFIG, "--held_out.exam", "gs://bucket/it's an exam"])
    assert started == [
        "train",
        "--config",
        "/tmp/run.yaml",
        "--run",
        "gs://bucket/runs/cpt-72b",
        "--distributed",
        "true",
    ]


def test_the_command_on_tpu_vms_survives_every_shell_between(fakes, arguments, tmp_path):
    """From gcloud to the host's shell, to the loop, to docker, to the container's shell."""
    assert main(arguments("tpu-vm", overrides=[*PLACES, "--held_out.exam", 'gs://bucket/it\'s "$HOME"'])) == 0
    on_host = shell_line(fakes.calls()[-1]["arguments"]).partition(">medllm.log")[0].removeprefix("sudo nohup ")
    fakes.answer("docker", "0 ")
    subprocess.run(["bash", "-c", on_host], check=True, cwd=ROOT / "medllm_jax" / "launching")
    gcloud, docker = fakes.calls()
    assert gcloud["arguments"] == ["auth", "configure-docker", "registry.example", "--quiet"]
    options, container = docker["arguments"][:6], docker["arguments"][6:]
    assert options == ["run", "--rm", "--name", "medllm", "--privileged", "--network"]
    assert container[:4] == ["host", IMAGE, "bash", "-c"]
    config, _ = brings(container[4], fakes)
    assert config.held_out.exam == 'gs://bucket/it\'s "$HOME"'


@pytest.mark.parametrize("way", OWN)
def test_what_a_dry_run_prints_does_the_same_when_pasted(fakes, arguments, way, capsys):
    given = arguments(way, "--env", "GREETING=it's $HOME", overrides=[*PLACES, "--data.mix", "null"])
    assert main(given) == 0
    did = fakes.calls()
    capsys.readouterr()
    assert main([given[0], "--dry-run", *given[1:]]) == 0
    assert fakes.calls() == []  # nothing ran
    subprocess.run(["bash", "-c", capsys.readouterr().out], check=True)
    assert fakes.calls() == did


def test_reference_log_probabilities_are_launched_too(arguments):
    rpo = str(ROOT / "configs" / "runs" / "rpo-72b-v5p-4x4x4.yaml")
    (command,) = commands_of(arguments("xpk", "--program", "reference", config=rpo))
    assert "medllm reference --config" in command.words[-1]


def test_a_queued_resource_that_fails_is_not_waited_for(fakes, capsys):
    fakes.answer("gcloud", "0 WAITING_FOR_RESOURCES", "0 SUSPENDED")
    waiting = Command(("gcloud", "describe"), until="ACTIVE", never=("SUSPENDED",))
    assert run([waiting, Command(("gcloud", "ssh"))], pause=0) == 1
    out, err = capsys.readouterr()
    assert out == "WAITING_FOR_RESOURCES: waiting for ACTIVE\n"
    assert err == "error: gcloud describe ...: SUSPENDED, and so never ACTIVE\n"
    assert len(fakes.calls()) == 2


def test_a_command_that_fails_ends_the_launch(fakes, arguments, capsys):
    fakes.answer("gcloud", "3 ")
    assert main(arguments("tpu-vm")) == 1
    assert "exit code 3" in capsys.readouterr().err
    assert len(fakes.calls()) == 1


WRONG = {
    "local run": ({"run": "runs/cpt"}, "run is runs/cpt: .* gs://"),
    "local store": ({"overrides": [*PLACES, "--data.store", "stores/a"]}, "data.store is stores/a: .* gs://"),
    "one of two stores": ({"overrides": [*PLACES, "--data.store", "[gs://bucket/a, b]"]}, "data.store is b: "),
    "local model": ({"overrides": [*PLACES, "--init.checkpoint", "m"]}, "init.checkpoint is m: "),
    "local exam": ({"overrides": [*PLACES, "--held_out.exam", "e.jsonl"]}, "held_out.exam is e.jsonl: "),
    "local template": (
        {"overrides": [*PLACES, "--held_out.exam", "gs://bucket/e", "--held_out.template", "t.yaml"]},
        "held_out.template is t.yaml: ",
    ),
    "no bucket yet": ({"overrides": []}, "gs://BUCKET/.*: that names no bucket"),
    "mesh": ({"overrides": [*PLACES, "--mesh.tensor", "3"]}, "tensor=3 does not divide 64 devices"),
    "slices": ({"options": ["--slices", "2"]}, "mesh.data 1 is not a multiple of the 2 slices.*--mesh.data 2"),
    "batch": ({"overrides": [*PLACES, "--data.batch_size", "64"]}, "16 rows does not divide by data x fsdp = 64"),
    "topology": ({"topology": "v5p-128"}, "topology 'v5p-128': a name like"),
    "generation": ({"topology": "v4:4x4x4"}, "launched are v5e, v5p, v6e"),
    "shape": ({"topology": "v5p:4x4x6"}, "there are no such slices; v5p has 2x2x1, "),
    "order": ({"topology": "v5p:8x4x4"}, "ascending order"),
    "flat shape": ({"topology": "v5e:4x2"}, "v5e has 1x1, "),
    "small slices": ({"topology": "v5p:2x2x1", "options": ["--slices", "2"]}, "one host can't be joined"),
    "TPU VMs of that shape": (
        {"way": "tpu-vm", "topology": "v5p:4x4x16", "overrides": [*PLACES, "--data.accumulate", "1"]},
        "256 are v5p:4x8x8",
    ),
    "name": ({"options": ["--name", "Run_1"]}, "--name 'Run_1'"),
    "long name": ({"way": "gcluster", "options": ["--name", "a" * 29]}, "at most 28"),
    "restarts": ({"options": ["--max-restarts", "-1"]}, "--max-restarts"),
    "environment": ({"options": ["--env", "A"]}, "--env A: NAME=VALUE"),
    "secret": ({"options": ["--env", "WANDB_API_KEY=x"]}, "--env WANDB_API_KEY: .*Secret"),
    "secret by value": ({"options": ["--env", "A=ghp_0123456789abcdefghijABCDEFGHIJ012345"]}, "--env A: .*Secret"),
    "secret in a URL": ({"options": ["--env", "PROXY=http://u:wxyz@proxy:80"]}, "--env PROXY: .*Secret"),
    "line in the run": ({"run": "gs://bucket/a\nb"}, r"--run holds the character '\\n'"),
    "line in a name": ({"options": ["--service-account", "a\nb"]}, r"--service-account holds the character '\\n'"),
    "control character": ({"options": ["--env", "A=\x1b[0m"]}, r"--env A holds the character '\\x1b'"),
    "half a character": ({"options": ["--env", "A=\udc80"]}, r"--env A holds the character '\\udc80'"),
    "option": ({"options": ["--dryrun"]}, "unknown argument --dryrun: did you mean --dry-run"),
    "setting": ({"overrides": ["--data.stor", "gs://bucket/a"]}, "data.stor"),
    "config": ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
}


@pytest.mark.parametrize("value", ["false", "3f2a0c1d", "--xla_tpu_enable_data_parallel_all_reduce_opt=true"])
def test_an_environment_without_secrets_is_taken(arguments, value):
    assert (
        f"TOKENIZERS_PARALLELISM={value}"
        in commands_of(arguments("xpk", "--env", f"TOKENIZERS_PARALLELISM={value}"))[0].words[-1]
    )


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(fakes, arguments, case, capsys):
    given, message = WRONG[case]
    given = {"way": "gke", **given}
    assert main(arguments(given.pop("way"), *given.pop("options", []), **given)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert fakes.calls() == []


def test_a_missing_image_is_named(arguments, capsys):
    given = arguments("gke")
    at = given.index("--image")
    assert main(given[:at] + given[at + 2 :]) == 2
    assert "--image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("way", "program"), [("gke", "kubectl"), ("xpk", "xpk"), ("gcluster", "gcluster"), ("tpu-vm", "gcloud")]
)
def test_a_launcher_that_is_not_installed_is_named(arguments, way, program, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments(way)) == 2
    assert capsys.readouterr().err.startswith(f"error: {program} is not installed here")
    assert main(arguments(way, "--dry-run")) == 0


@pytest.mark.parametrize("arguments_", [["--help"], *([way, "--help"] for way in OWN)])
def test_help_imports_nothing_heavy(arguments_):
    code = (
        "import sys, contextlib, io\nfrom medllm_jax.cli.launch import main\nout = io.StringIO()\n"
        "with contextlib.redirect_stdout(out):\n"
        f"    try: main({arguments_!r})\n    except SystemExit: pass\n"
        "assert 'usage: medllm launch' in out.getvalue()\n"
        "print(sorted({'jax', 'numpy', 'transformers', 'etils', 'gcsfs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_config_comes_back_from_json(arguments):
    config = load_run_config(CONFIG, EXPECTED_CONFIG)
    assert build(RunConfig, json.loads(json.dumps(to_plain(config))), "") == config

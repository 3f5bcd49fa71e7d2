"""How to look at a run that was launched, and how to end it, by each backend's own programs."""

from collections.abc import Mapping
from typing import Any

from medllm_jax.launching.commands import Command
from medllm_jax.launching.workload import Workload


def how_to_watch(backend: str, work: Workload, where: Mapping[str, Any]) -> list[tuple[str, Command]]:
    """What each command is for, and the command; where: the backend's own options."""
    told = {"gke": _gke, "xpk": _xpk, "gcluster": _gcluster, "tpu-vm": _tpu_vm}[backend](work, where)
    found = {title: Command(tuple(words)) for title, words in told.items()}
    run = work.config.run
    return [
        *list(found.items())[:-1],
        ("curves", Command(("tensorboard", f"--logdir={run}"))),
        ("curves and scores on a page", Command(("medllm", "report", run))),
        *list(found.items())[-1:],
    ]


def _gke(work: Workload, where: Mapping[str, Any]) -> dict[str, list[str]]:
    context = [f"--context={where['context']}"] if where.get("context") else []
    kubectl = ["kubectl", *context, f"--namespace={where.get('namespace') or 'default'}"]
    return {"restarts, and how it ended": [*kubectl, "get", "jobset", work.name]} | {
        "progress, which process 0 prints": [*kubectl, *_logs(work)],
        "to end it, after saving": [*kubectl, "delete", "jobset", work.name],
    }


def _xpk(work: Workload, where: Mapping[str, Any]) -> dict[str, list[str]]:
    place = [f"--{name}={where[name]}" for name in ("cluster", "project", "zone") if where.get(name)]
    return {
        "state": ["xpk", "workload", "list", *place],
        "progress, which process 0 prints": ["kubectl", *_logs(work)],
        "to end it, after saving": ["xpk", "workload", "delete", f"--workload={work.name}", *place],
    }


def _gcluster(work: Workload, where: Mapping[str, Any]) -> dict[str, list[str]]:
    place = [f"--{name}={where[name]}" for name in ("cluster", "project", "location")]
    return {
        "progress": ["gcluster", "job", "logs", work.name, *place],
        "to end it, after saving": ["gcluster", "job", "cancel", work.name, *place],
    }


def _tpu_vm(work: Workload, where: Mapping[str, Any]) -> dict[str, list[str]]:
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    place = [f"--project={where['project']}", f"--zone={where['zone']}"]
    return {
        "state": [*queued, "describe", work.name, *place, "--format=value(state.state)"],
        "progress": [*queued, "ssh", work.name, *place, "--command=tail -f medllm.log"],
        "to end it, after saving, and give the chips back": [*queued, "delete", work.name, *place, "--force"],
    }


def _logs(work: Workload) -> list[str]:
    first = f"jobset.sigs.k8s.io/jobset-name={work.name},batch.kubernetes.io/job-completion-index=0"
    return ["logs", "--follow", "--prefix", f"--selector={first}"]

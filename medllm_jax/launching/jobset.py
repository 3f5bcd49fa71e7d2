"""A run as a JobSet of Kubernetes, with the ConfigMap that holds its config.

A slice is a Job, a host a Pod of it. GKE tells every Pod its place in its slice (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES)
and its slice's among others (MEGASCALE_*), which is where `jax.distributed.initialize()` finds it.
"""

import hashlib
from typing import Any

import yaml

from medllm_jax.config.load import to_yaml
from medllm_jax.errors import PREEMPTED
from medllm_jax.launching.workload import WRONG_INPUT, Workload

CONTAINER = "medllm"
_FOLDER = "/etc/medllm"
# libtpu in a slice, and between slices; the coordinator of jax.distributed.
_PORTS = (8471, 8080, 8482)


def manifest(
    work: Workload,
    *,
    namespace: str = "default",
    queue: str | None = None,
    priority: str | None = None,
    service_account: str | None = None,
    secret: str | None = None,
    spot: bool = False,
    reservation: str | None = None,
) -> list[dict[str, Any]]:
    """ConfigMap and JobSet.

    queue: Kueue's LocalQueue; service_account: of Kubernetes, with access to the bucket; secret: a Secret whose entries
    become environment variables.
    """
    config = to_yaml(work.config)
    # Named after what is in it: a later launch changes nothing that a restart of this one reads.
    config_name = f"{work.name}-{hashlib.sha256(config.encode()).hexdigest()[:8]}"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_name, "namespace": namespace, "labels": {"app.kubernetes.io/name": "medllm"}},
        "immutable": True,
        "data": {"run.yaml": config},
    }
    slices = work.slices
    node = {
        "cloud.google.com/gke-tpu-accelerator": slices.generation.accelerator,
        "cloud.google.com/gke-tpu-topology": slices.shape,
    }
    node |= {"cloud.google.com/gke-spot": "true"} if spot else {}
    node |= {"cloud.google.com/reservation-name": reservation} if reservation else {}
    container = {
        "name": CONTAINER,
        "image": work.image,
        "command": work.command(f"{_FOLDER}/run.yaml"),
        "env": [{"name": name, "value": value} for name, value in work.environment],
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        "ports": [{"containerPort": port} for port in _PORTS],
        # The devices are the node's root's.
        "securityContext": {"privileged": True, "runAsUser": 0},
        "resources": {"limits": {"google.com/tpu": slices.chips_per_host}},
        "volumeMounts": [{"name": "config", "mountPath": _FOLDER, "readOnly": True}],
    }
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": node,
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        **({"priorityClassName": priority} if priority else {}),
        **({"serviceAccountName": service_account} if service_account else {}),
        # Slices talk to each other over the node's own network cards.
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": work.grace,
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": config_name}}],
    }
    job = {
        "parallelism": slices.hosts,
        "completions": slices.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a host alone can't be started again: the others wait for nobody
        "podFailurePolicy": {"rules": _POD_RULES},
        "template": {"spec": pod},
    }
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": work.name,
            "namespace": namespace,
            "labels": {
                "app.kubernetes.io/name": "medllm",
                **({"kueue.x-k8s.io/queue-name": queue} if queue else {}),
            },
            # A node pool is a slice: all Pods of a Job go to one, and those of another Job elsewhere.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True},  # a headless service
            "failurePolicy": {"maxRestarts": work.restarts, "rules": _JOBSET_RULES},
            "replicatedJobs": [{"name": "slice", "replicas": slices.number, "template": {"spec": job}}],
        },
    }
    return [config_map, jobset]


# A Pod that ends in one of these ways fails its Job with the reason PodFailurePolicy and a message that says which way;
# any other failure has the reason BackoffLimitExceeded.
_POD_RULES = [
    {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]}}
    for code in (WRONG_INPUT, PREEMPTED)
] + [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
# The first that fits; where none does, the JobSet is restarted, and that counts.
_JOBSET_RULES = [
    {
        "name": "wrong_input",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [rf"exit code {WRONG_INPUT}\b"],
    },
    {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [rf"exit code {PREEMPTED}\b", "condition DisruptionTarget"],
    },
]


class _Dumper(yaml.SafeDumper):
    """Every text in quotes, or as it is where it has several lines; nothing by reference.

    kubectl reads YAML otherwise than Python: a bare y, 1e3 or 0o17 is no text there.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else '"')


_Dumper.add_representer(str, _text)


def to_manifest_file(objects: list[dict[str, Any]]) -> str:
    """YAML as `kubectl apply` reads it."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)

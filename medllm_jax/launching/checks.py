"""What a launch needs and can be looked at beforehand, by commands that change nothing: `medllm launch ... --check`.

A finding is "ok", "wrong" (it would fail), or "unknown" (nobody here can tell, and why).
"""

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from medllm_jax.launching.commands import Command
from medllm_jax.launching.workload import Workload

_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]{2,}|.*<[^<>]*>.*|gs://(my|your|the|some)-bucket(/.*)?|.*\byour-.*")
_WRITERS = ("roles/storage.objectUser", "roles/storage.objectAdmin", "roles/storage.admin")
# Of gcloud without a login, and of kubectl without a cluster: such an answer says nothing of what was asked for.
_NOT_ASKED = re.compile("active account|credentials|reauth|connection .*refused|connect to the server", re.IGNORECASE)
_SECONDS = 120


class Finding(NamedTuple):
    state: str
    text: str


class Check(NamedTuple):
    """A command, and what its exit code and output say of something."""

    what: str
    command: Command
    judge: Callable[[int, str], Finding]


def placeholders(options: Mapping[str, Any], work: Workload) -> list[str]:
    """Options and settings that still hold what a document puts there for the reader's own: ``--image IMAGE``."""
    config = work.config
    settings = [("--run", config.run), ("init.checkpoint", config.init.checkpoint)]
    settings += [("data.store", store) for store in config.data.stores]
    settings += [("--image", work.image), *((f"--{name.replace('_', '-')}", value) for name, value in options.items())]
    return [f"{name} {v}" for name, v in settings if isinstance(v, str) and _PLACEHOLDER.fullmatch(v)]


def checks(backend: str, work: Workload, where: Mapping[str, Any]) -> list[Check]:
    """What a launch by a backend needs; where: its own options."""
    found = [*_of_buckets(backend, work, where), _of_image(work.image)]
    return found + {"gke": _of_gke, "xpk": _of_xpk, "gcluster": _of_gcluster, "tpu-vm": _of_tpu_vm}[backend](
        work, where
    )


def look(check: Check) -> Finding:
    """Runs the command of a check."""
    program = check.command.words[0]
    if not shutil.which(program):
        return Finding("unknown", f"{check.what}: {program} is not installed here")
    try:
        done = subprocess.run(check.command.words, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("unknown", f"{check.what}: {program} did not answer in {_SECONDS} s")
    said = done.stderr.strip().splitlines()
    errors = [line for line in said if line.lower().startswith("error")] or said[-1:]
    because = f" ({errors[0][:200]})" if done.returncode and errors else ""
    if because and _NOT_ASKED.search(because):
        return Finding("unknown", f"{check.what}: {program} can't ask from here{because}")
    state, text = check.judge(done.returncode, done.stdout.strip())
    return Finding(state, f"{check.what}: {text}{'' if state == 'ok' else because}")


def _of_buckets(backend: str, work: Workload, where: Mapping[str, Any]) -> Iterator[Check]:
    config = work.config
    paths = [config.run, config.init.checkpoint, *config.data.stores]
    region, member = _region(where), _member(backend, where)
    for bucket in dict.fromkeys("/".join(path.split("/")[:3]) for path in paths if path):
        describe = Command(("gcloud", "storage", "buckets", "describe", bucket, "--format=value(location)"))
        yield Check(f"bucket {bucket}", describe, lambda code, out: _place(code, out, region))
        policy = Command(("gcloud", "storage", "buckets", "get-iam-policy", bucket, "--format=json"))
        yield Check(f"role on {bucket}", policy, functools.partial(_role, member=member, bucket=bucket))


def _place(code: int, out: str, region: str | None) -> Finding:
    if code:
        return Finding("wrong", "it can't be seen: its name, or your own access to it")
    near = region is None or out.lower() in (region, region.split("-")[0])  # a region, or a multi-region such as US
    if not near:
        return Finding("wrong", f"it is in {out}, and the chips are in {region}: reading is slow there, and costs")
    return Finding("ok", f"it is in {out}")


def _member(backend: str, where: Mapping[str, Any]) -> str | None:
    """How the identity of the hosts ends in a bucket's policy; None where it can't be known."""
    account = where.get("service_account")
    if backend == "tpu-vm":
        return f"serviceAccount:{account}" if account else None
    if backend == "xpk":
        return None
    return f"/subject/ns/{where.get('namespace') or 'default'}/sa/{account or 'default'}"


def _role(code: int, out: str, member: str | None, bucket: str) -> Finding:
    if code:
        return Finding("unknown", "its policy can't be read by you")
    if member is None:
        return Finding("unknown", "which identity the hosts have is not said: they must be able to write there")
    try:
        bindings = json.loads(out or "{}").get("bindings", [])
        held = [entry["role"] for entry in bindings if any(m.endswith(member) for m in entry["members"])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return Finding("unknown", "gcloud printed no policy that is understood")
    if set(held) & set(_WRITERS):
        return Finding("ok", f"{member} has {', '.join(held)}")
    if held:
        return Finding("wrong", f"{member} has only {', '.join(held)}: {_WRITERS[0]} is needed")
    given = f"gcloud storage buckets add-iam-policy-binding {bucket} --role={_WRITERS[0]} --member=..."
    return Finding("unknown", f"{member} has none here; unless the project gives one: {given} (docs/launch.md)")


def _of_image(image: str) -> Check:
    if "-docker.pkg.dev/" in image:
        words = ("gcloud", "artifacts", "docker", "images", "describe", image, "--format=value(image_summary.digest)")
    else:
        words = ("docker", "manifest", "inspect", image)
    missing = Finding("wrong", "it is not there, or you may not read it: build and push it (docs/launch.md)")
    return Check(f"image {image}", Command(words), lambda code, _: missing if code else Finding("ok", "it is there"))


def _of_gke(work: Workload, where: Mapping[str, Any]) -> list[Check]:
    namespace = where.get("namespace") or "default"
    kubectl = ("kubectl", *([f"--context={where['context']}"] if where.get("context") else []))
    inside = (*kubectl, f"--namespace={namespace}")
    may = Command((*inside, "auth", "can-i", "create", "jobsets.jobset.x-k8s.io"))
    labels = f"cloud.google.com/gke-tpu-accelerator={work.slices.generation.accelerator}"
    labels += f",cloud.google.com/gke-tpu-topology={work.slices.shape}"
    nodes = Command((*kubectl, "get", "nodes", f"--selector={labels}", "--output=name"))
    needed = work.slices.hosts * work.slices.number
    taken = Command((*inside, "get", "jobset", work.name, "--ignore-not-found", "--output=name"))
    found = [
        Check("JobSet", Command((*kubectl, "get", "crd", "jobsets.jobset.x-k8s.io", "--output=name")), _there),
        Check("your right to create a JobSet", may, lambda code, out: _yes(out == "yes" and not code)),
        Check(f"nodes of {work.slices.topology.name}", nodes, lambda code, out: _nodes(code, out, needed)),
        Check(f"the name {work.name}", taken, _free),
    ]
    named = {"serviceaccount": where.get("service_account"), "secret": where.get("secret")}
    named |= {"localqueues.kueue.x-k8s.io": where.get("queue")}
    for kind, name in named.items():
        if name:
            found.append(Check(f"{kind} {name}", Command((*inside, "get", kind, name, "--output=name")), _there))
    if where.get("priority"):
        kind, name = "priorityclasses.scheduling.k8s.io", where["priority"]
        found.append(Check(f"{kind} {name}", Command((*kubectl, "get", kind, name, "--output=name")), _there))
    return found


def _of_xpk(work: Workload, where: Mapping[str, Any]) -> list[Check]:
    place = [f"--{name}={where[name]}" for name in ("cluster", "project", "zone") if where.get(name)]
    listed = Command(("xpk", "workload", "list", *place))

    def judge(code: int, out: str) -> Finding:
        if code:
            return Finding("wrong", "xpk can't list its workloads")
        if re.search(rf"(^|\s){re.escape(work.name)}(\s|$)", out):
            return Finding("wrong", f"a workload {work.name} is there: delete it, or give another --name")
        return Finding("ok", f"xpk reaches it, and {work.name} is free")

    found = [Check(f"cluster {where['cluster']}", listed, judge)]
    return found + ([_quota(work, where["project"], _region(where), "compute")] if where.get("project") else [])


def _of_gcluster(work: Workload, where: Mapping[str, Any]) -> list[Check]:
    place = (f"--project={where['project']}", f"--location={where['location']}")
    status = Command(
        ("gcloud", "container", "clusters", "describe", where["cluster"], *place, "--format=value(status)")
    )
    running = lambda code, out: _there(code, out) if code or out == "RUNNING" else Finding("wrong", f"it is {out}")  # noqa: E731
    quota = _quota(work, where["project"], _region(where), "compute")
    return [Check(f"cluster {where['cluster']}", status, running), quota]


def _of_tpu_vm(work: Workload, where: Mapping[str, Any]) -> list[Check]:
    place = (f"--project={where['project']}", f"--zone={where['zone']}")
    kind = work.slices.accelerator_type
    tpus = ("gcloud", "compute", "tpus")
    has = Command((*tpus, "accelerator-types", "describe", kind, *place, "--format=value(type)"))
    taken = Command((*tpus, "queued-resources", "describe", work.name, *place, "--format=value(state.state)"))
    in_use = "a queued resource of that name is there: delete it, or give another --name"
    found = [
        Check(f"{kind} in {where['zone']}", has, _there),
        Check(
            f"the name {work.name}", taken, lambda code, _: Finding("ok", "free") if code else Finding("wrong", in_use)
        ),
        _quota(work, where["project"], _region(where), "tpu"),
    ]
    if account := where.get("service_account"):
        words = ("gcloud", "iam", "service-accounts", "describe", account, place[0], "--format=value(email)")
        found.append(Check(f"service account {account}", Command(words), _there))
    return found


def _quota(work: Workload, project: str, region: str | None, service: str) -> Check:
    """Quotas whose name holds the generation's; which of them counts depends on how the chips are bought."""
    words = ("gcloud", "beta", "quotas", "info", "list", f"--service={service}.googleapis.com", f"--project={project}")
    generation = work.slices.topology.generation
    chips = work.slices.chips * work.slices.number

    def judge(code: int, out: str) -> Finding:
        try:
            quotas = json.loads(out or "[]") if not code else None
        except ValueError:
            quotas = None
        if quotas is None:
            return Finding("unknown", "gcloud can't list quotas: look at the console's page of quotas")
        values = dict(_values(quotas, generation, region))
        said = ", ".join(f"{name} {value:,}" for name, value in sorted(values.items(), key=lambda item: -item[1])[:4])
        if not values:
            return Finding("unknown", "gcloud lists none by that name: look at the console's page of quotas")
        if max(values.values()) < chips:
            return Finding("wrong", f"{chips} chips are asked for, and there are {said}")
        return Finding("ok", f"{chips} chips are asked for; {said} (on demand, Spot and reserved count apart)")

    return Check(f"quota of {generation}", Command((*words, "--format=json")), judge)


def _values(quotas: Any, generation: str, region: str | None) -> Iterator[tuple[str, int]]:
    """Name and value of each quota of a generation in a region."""
    for quota in quotas if isinstance(quotas, list) else []:
        name = str(quota.get("quotaId", ""))
        for place in quota.get("dimensionsInfos", []):
            where = place.get("applicableLocations", [])
            family = " ".join(map(str, (name, *place.get("dimensions", {}).values()))).lower()
            value = str(place.get("details", {}).get("value", ""))
            inside = region is None or not where or any(str(location).startswith(region) for location in where)
            if generation in family and inside and re.fullmatch(r"-?\d+", value):
                yield name, int(value) if int(value) >= 0 else 10**9  # -1 is no limit


def _region(where: Mapping[str, Any]) -> str | None:
    """us-east5 of us-east5-a; None where the launcher is told no place."""
    place = where.get("zone") or where.get("location")
    match = re.fullmatch(r"([a-z]+-[a-z]+\d+)(-[a-z])?", place) if place else None
    return match[1] if match else None


def _there(code: int, _: str) -> Finding:
    return Finding("wrong", "it is not there, or you may not see it") if code else Finding("ok", "it is there")


def _yes(right: bool) -> Finding:
    return Finding("ok", "yes") if right else Finding("wrong", "no")


def _free(code: int, out: str) -> Finding:
    if code:
        return Finding("unknown", "kubectl can't tell")
    return (
        Finding("wrong", "a JobSet of that name is there: delete it, or give another --name")
        if out
        else Finding("ok", "free")
    )


def _nodes(code: int, out: str, needed: int) -> Finding:
    if code:
        return Finding("unknown", "kubectl can't list them")
    there = len(out.splitlines())
    if there < needed:
        return Finding("unknown", f"{there} of {needed} are there: right only where node pools grow by themselves")
    return Finding("ok", f"{there} are there, {needed} are needed; whether others use them, it does not tell")

"""The ways to launch a workload, each as the commands that do it."""

from pathlib import Path

from medllm_jax.errors import PREEMPTED
from medllm_jax.launching.commands import Command
from medllm_jax.launching.jobset import manifest, to_manifest_file
from medllm_jax.launching.workload import FAILED, KILLED, Workload

_LOOP = Path(__file__).parent / "run_on_host.sh"


def gke(work: Workload, *, context: str | None = None, **where) -> list[Command]:
    """By kubectl, as a JobSet of ours; where: see `launch.jobset.manifest`."""
    words = ("kubectl", *_options(context=context), "apply", "-f", "-")
    return [Command(words, stdin=to_manifest_file(manifest(work, **where)))]


def xpk(
    work: Workload,
    *,
    cluster: str,
    project: str | None,
    zone: str | None,
    priority: str,
    spot: bool = False,
    reservation: str | None = None,
) -> list[Command]:
    """By xpk, as a JobSet of its making. By itself it restarts nothing; if told to, after 42 and 127 to 255."""
    options = _options(
        workload=work.name,
        cluster=cluster,
        project=project,
        zone=zone,
        tpu_type=work.slices.tpu_type,
        num_slices=work.slices.number,
        docker_image=work.image,
        priority=priority,
        max_restarts=work.restarts,
        restart_on_exit_codes=FAILED,
        termination_grace_period_seconds=work.grace,
        spot=spot,
        reservation=reservation,
        command=work.shell_line(),
    )
    return [Command(("xpk", "workload", "create", *options))]


def gcluster(
    work: Workload,
    *,
    cluster: str,
    project: str,
    location: str,
    queue: str | None = None,
    priority: str | None = None,
    service_account: str | None = None,
    spot: bool = False,
    reservation: str | None = None,
) -> list[Command]:
    """By the Cluster Toolkit, as a JobSet of its making. It restarts after all codes, or those that it is given."""
    options = _options(
        name=work.name,
        cluster=cluster,
        project=project,
        location=location,
        compute_type=work.slices.machine,
        topology=work.slices.shape,
        num_slices=work.slices.number,
        image=work.image,
        queue=queue,
        priority=priority,
        service_account=service_account,
        restarts=work.restarts,
        restart_on_exit_codes=",".join(map(str, (FAILED, PREEMPTED, *KILLED))),
        grace_period=f"{work.grace}s",
        gke_nap_provisioning="spot" if spot else "reservation" if reservation else None,
        gke_nap_reservation=reservation,
        command=work.shell_line(),
    )
    return [Command(("gcluster", "job", "submit", *options))]


def tpu_vm(
    work: Workload,
    *,
    project: str,
    zone: str,
    runtime_version: str | None = None,
    service_account: str | None = None,
    spot: bool = False,
    reserved: bool = False,
) -> list[Command]:
    """By gcloud, on TPU VMs of a queued resource; a loop on each restarts the run (run_on_host.sh)."""
    several = work.slices.number > 1
    place = _options(project=project, zone=zone)
    everywhere = _options(worker="all", node="all", batch_size="all")
    queued = ("gcloud", "compute", "tpus", "queued-resources")
    request = _options(
        accelerator_type=work.slices.accelerator_type,
        runtime_version=runtime_version or work.slices.generation.runtime,
        node_count=work.slices.number if several else None,
        node_prefix=work.name if several else None,
        node_id=None if several else work.name,
        # What a service account may do is decided by its roles alone.
        scopes="cloud-platform",
        service_account=service_account,
        spot=spot,
        reserved=reserved,
    )
    loop = Command(
        (
            *("sudo", "nohup", "bash", _LOOP.name, work.image, str(work.restarts), str(work.grace)),
            *("bash", "-c", work.shell_line()),
        )
    )
    return [
        Command((*queued, "create", work.name, *place, *request)),
        Command(
            (*queued, "describe", work.name, *place, "--format=value(state.state)"),
            until="ACTIVE",
            never=("FAILED", "SUSPENDING", "SUSPENDED", "DELETING"),
        ),
        Command((*queued, "scp", str(_LOOP), f"{work.name}:", *place, *everywhere)),
        # It goes on when the connection ends.
        Command(
            (*queued, "ssh", work.name, *place, *everywhere, f"--command={loop} >medllm.log 2>&1 </dev/null &"),
        ),
    ]


def _options(**values) -> tuple[str, ...]:
    """`--a-b=value`; of True `--a-b`, of False and None nothing."""
    options = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return tuple(
        option if value is True else f"{option}={value}"
        for option, value in options
        if value is not None and value is not False
    )

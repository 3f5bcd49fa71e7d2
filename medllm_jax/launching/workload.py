"""What is launched, whichever way: a run's config and its command, checked before anything is asked for."""

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medllm_jax.config.load import load_run_config, to_plain
from medllm_jax.config.schema import RunConfig
from medllm_jax.distributed.chips import parse_topology
from medllm_jax.distributed.mesh_sizes import mesh_sizes
from medllm_jax.errors import UserError
from medllm_jax.launching.slices import TpuSlices, slices_of
from medllm_jax.ranges import GraceSeconds, Ranged, Restarts
from medllm_jax.terminal.secrets import holds_secret, is_secret_name

# What medllm's exit codes ask for (the table is in docs/launch.md).
FAILED, WRONG_INPUT = 1, 2
KILLED = range(128, 256)  # by signal n: 128 + n

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode: control, format, half characters, separators
# Without a TPU, JAX would train on the host's CPU; so it ends with an error.
ENVIRONMENT = {"JAX_PLATFORMS": "tpu,cpu"}


@dataclass(frozen=True)
class Workload(Ranged):
    """A run to launch.

    program: verb of `medllm`, train or reference; restarts: at most so many after failures, preemptions not counted
    where the way can tell them; grace: seconds between the notice to end and the kill.
    """

    name: str
    config: RunConfig
    slices: TpuSlices
    image: str
    program: str = "train"
    restarts: Restarts = 10
    grace: GraceSeconds = 300
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, config_file: str) -> list[str]:
        """Of every host, which has the config in a file."""
        run = ["--run", self.config.run, "--distributed", "true"]
        return ["medllm", self.program, "--config", config_file, *run]

    def shell_line(self) -> str:
        """The same in one line of shell that brings the config along (JSON is YAML), for launchers that take no file.

        `exec`: signals reach medllm and no shell.
        """
        config = shlex.quote(json.dumps(to_plain(self.config), ensure_ascii=False))
        settings = shlex.join(f"{name}={value}" for name, value in self.environment)
        return f"printf %s {config} >/tmp/run.yaml && exec env {settings} {shlex.join(self.command('/tmp/run.yaml'))}"


def make_workload(
    config_file: str,
    overrides: Sequence[str],
    *,
    run: str,
    topology: str,
    slices: int = 1,
    name: str | None = None,
    name_limit: int = 40,
    environment: Sequence[str] = (),
    **more,
) -> Workload:
    """A workload of a config file and overrides.

    UserError for what would only fail once it has its TPUs: local paths, a mesh or batch that does not divide, names
    that a cluster refuses.
    """
    taken = slices_of(parse_topology(topology, slices))
    config = replace(load_run_config(config_file, [*overrides, f"--run={run}"]), distributed=True)
    name = name or re.sub("[^a-z0-9]+", "-", run.rstrip("/").rpartition("/")[2].lower()).strip("-")
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > name_limit:
        raise UserError(
            f"--name {name!r}: at most {name_limit} lower-case letters, digits and dashes, beginning with a letter"
        )
    _check_paths(config)
    _check_mesh(config, taken)
    return Workload(name, config, taken, environment=_environment(environment), **more)


def check_text(option: str, value: str, allowed: str = "") -> None:
    """UserError where an option's text has characters that stand for nothing to see: line ends, control characters."""
    hidden = next((c for c in value if unicodedata.category(c) in _HIDDEN and c not in allowed), None)
    if hidden is not None:
        raise UserError(f"{option} holds the character {hidden!a}, which has no place in it: leave it out")


def _environment(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    settings = dict(ENVIRONMENT)
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name[:60]}: NAME=VALUE is expected")
        check_text(f"--env {name}", value, allowed="\n\t")
        if is_secret_name(name) or holds_secret(value):
            raise UserError(
                f"--env {name}: this looks like a secret, and a manifest is there for all to read; use a Secret "
                "(docs/launch.md)"
            )
        settings[name] = value
    return tuple(settings.items())


def _check_paths(config: RunConfig) -> None:
    held_out = config.held_out
    places = {"run": [config.run], "init.checkpoint": [config.init.checkpoint], "data.store": config.data.stores}
    if held_out:
        template = held_out.template if re.search(r"/|\.ya?ml$", held_out.template) else None
        places |= {"held_out.store": held_out.stores, "held_out.exam": [held_out.exam], "held_out.template": [template]}
    for setting, paths in places.items():
        for path in filter(None, paths):
            if not path.startswith("gs://"):
                raise UserError(f"{setting} is {path}: the hosts have no disk of this machine, give a gs:// path")
            if not re.match("gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/|$)", path):
                raise UserError(f"{setting} is {path}: that names no bucket; put the name of yours there")


def _check_mesh(config: RunConfig, slices: TpuSlices) -> None:
    """Checks the mesh as the run will, without its devices (see distributed/sharding.py)."""
    resolved = mesh_sizes(config.mesh, slices.devices)
    if resolved["data"] % slices.number:
        raise UserError(
            f"mesh.data {resolved['data']} is not a multiple of the {slices.number} slices: they lie along it, so add "
            f"--mesh.data {slices.number} after --"
        )
    rows, parts = config.data.batch_size // config.data.accumulate, resolved["data"] * resolved["fsdp"]
    if rows % parts:
        raise UserError(
            f"a micro-batch of {rows} rows does not divide by data x fsdp = {parts}: data.batch_size / data.accumulate "
            "must be a multiple of it"
        )

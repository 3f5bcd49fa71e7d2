"""`medllm doctor`: what this machine has for which verb, and what is missing, with the line that installs it.

Nothing is changed, and nothing secret is printed: of credentials only where they were found.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medllm_jax.distributed.compilation_cache import default_folder
from medllm_jax.terminal.parser import verb
from medllm_jax.terminal.version import install_line


def add(verbs: Any) -> None:
    """The verb."""
    text = "say what this machine has and what is missing: packages, devices, memory, credentials, tools"
    doctor = verb(verbs, "doctor", _doctor, text)
    doctor.add_argument("path", nargs="*", help="folders, local or gs://, that should be readable")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")


class Finding(NamedTuple):
    """One thing that was looked at.

    state: `missing` is needed by every verb, and the exit code is 1; `absent` is needed by some verbs only.
    """

    state: Literal["ok", "absent", "note", "missing"]
    what: str
    text: str
    remedy: str = ""


_SIGNS = {"ok": "ok", "absent": "--", "note": "note", "missing": "MISSING"}
# Extra of the package -> what needs it.
_EXTRAS = {
    "hf": "medllm evaluate --hf, and the comparison with transformers in medllm convert verify",
    "plan": "medllm plan",
    "tpu": "training on TPUs",
    "beam": "medllm data cpt --engine beam",
    "datasets": "datasets on the hub (hf://datasets/...) in medllm data",
    "wandb": "logging.wandb",
}
# Program -> what needs it.
_PROGRAMS = {
    "gcloud": "credentials for gs://, and medllm launch tpu-vm",
    "kubectl": "medllm launch gke",
    "xpk": "medllm launch xpk",
    "gcluster": "medllm launch gcluster",
    "docker": "building the image that medllm launch starts",
}
# Environment variables that change what medllm does, -> what one should know of it.
_VARIABLES = {
    "STORAGE_EMULATOR_HOST": "gs:// goes to an emulator and not to Google; unset it for real buckets",
    "TENSORSTORE_GCS_HTTP_URL": "TensorStore's gs:// goes to another server; unset it for real buckets",
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": "Orbax' gs:// goes to another server; unset it for real buckets",
    "JAX_PLATFORMS": "JAX looks for these devices only",
    "JAX_NUM_CPU_DEVICES": "the CPU passes for so many devices",
    "JAX_ENABLE_X64": "JAX computes in 64 bits, which is slower and not what is tested",
    "JAX_COMPILATION_CACHE_DIR": "compiled programs are kept there",
    "XLA_FLAGS": "settings of the compiler",
    "LIBTPU_INIT_ARGS": "settings of the TPU compiler; medllm adds its own",
    "HF_HUB_OFFLINE": "nothing is downloaded from the hub",
    "HF_ENDPOINT": "the hub is another server",
    "HTTPS_PROXY": "requests go through a proxy",
    "MEDLLM_TRACEBACK": "unforeseen errors end with a traceback",
}
_SECONDS = 120  # that JAX may take to find its devices; a TPU that another process holds never comes
_DEVICES = (
    "import jax, json; print(json.dumps([[d.device_kind, (d.memory_stats() or {}).get('bytes_limit')]"
    " for d in jax.devices()]))"
)


def _doctor(options: argparse.Namespace) -> int:
    from medllm_jax.terminal.version import code_version

    findings = list(_examine(options.path))
    if options.json:
        print(json.dumps({"medllm": code_version(), "findings": [found._asdict() for found in findings]}, indent=1))
    else:
        print(f"medllm {code_version()}")
        for found in findings:
            print(f"{_SIGNS[found.state]:>7}  {found.what}: {found.text}")
            if found.remedy:
                print(f"{'':>7}  -> {found.remedy}")
    return int(any(found.state == "missing" for found in findings))


def _examine(paths: list[str]) -> Iterator[Finding]:
    yield Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    yield from _packages()
    yield from _machine()
    yield _devices()
    yield from _credentials()
    for name, needed_by in _PROGRAMS.items():
        place = shutil.which(name)
        yield Finding("ok", name, place) if place else Finding("absent", name, f"not on PATH; needed by {needed_by}")
    kept = str(default_folder())
    for name, meaning in _VARIABLES.items():
        if os.environ.get(name) == kept:  # it was set by us
            yield Finding("ok", "compiled programs", f"kept in {kept}")
        elif os.environ.get(name):
            yield Finding("note", name, f"is set: {meaning}")
    for path in paths:
        yield _path(path)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    requirements = [Requirement(text) for text in metadata.requires("medllm_jax") or ()]
    for each in requirements:  # what `jax[tpu]` brings beside jax itself
        if each.name == "jax" and each.extras == {"tpu"}:
            each.name, each.extras, each.specifier = "libtpu", set(), SpecifierSet()
    needed = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    lacking = [each for each in needed if not _is_installed(each)]
    for each in lacking:
        yield Finding("missing", each.name, _installed(each), f"pip install '{_without_marker(each)}'")
    if not lacking:
        shown = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in shown)
        yield Finding("ok", "packages", f"all {len(needed)} that are needed: {versions}")
    for extra, needed_by in _EXTRAS.items():
        own = [each for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
        own = [each for each in own if each not in needed]
        lacking = [each for each in own if not _is_installed(each)]
        if lacking:
            names = ", ".join(f"{each.name} ({_installed(each)})" for each in lacking)
            yield Finding("absent", extra, f"{names}; needed by {needed_by}", install_line(extra))
        else:
            yield Finding("ok", extra, ", ".join(f"{each.name} {metadata.version(each.name)}" for each in own))


def _is_installed(requirement: Any) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def _installed(requirement: Any) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "not installed"
    return f"{version} is installed, {requirement.specifier or 'with extras'} is needed"


def _without_marker(requirement: Any) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _machine() -> Iterator[Finding]:
    from medllm_jax.terminal.progress import size_in_words

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit()
    text = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, "
    text += f"{size_in_words(min(memory, limit or memory))} of memory"
    if limit and limit < memory:
        text += f" (a limit; the machine has {size_in_words(memory)})"
    yield Finding("ok", "machine", f"{platform.system()} {platform.machine()}, {text}")
    free = shutil.disk_usage(".").free
    yield Finding("ok", "disk", f"{size_in_words(free)} free here")


def _memory_limit() -> int | None:
    """Bytes that a container may use, as its control group has it; None where it has none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None


def _devices() -> Finding:
    """In a process of its own: JAX holds the devices that it finds, and may wait for ever for one that is taken."""
    from medllm_jax.terminal.progress import size_in_words

    remedy = "another process may hold the TPU; with libtpu and no TPU, set JAX_PLATFORMS=cpu"
    try:
        done = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("missing", "devices", f"JAX found none in {_SECONDS} seconds", remedy)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1][:200]
        return Finding("missing", "devices", f"JAX fails: {said}", remedy)
    found = json.loads(done.stdout.splitlines()[-1])
    kind, memory = found[0]
    text = f"{len(found)} x {kind}" + (f", {size_in_words(memory)} each" if memory else "")
    if kind == "cpu" and Path("/dev/nvidia0").exists():
        return Finding("note", "devices", f"{text}, though there is a GPU", "pip install 'jax[cuda13]'")
    if kind == "cpu" and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()):
        return Finding("note", "devices", f"{text}, though there seems to be a TPU", install_line("tpu"))
    return Finding("ok", "devices", text)


def _credentials() -> Iterator[Finding]:
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return  # an emulator asks for none
    file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if file and not Path(file).is_file():
        yield Finding("note", "Google credentials", "GOOGLE_APPLICATION_CREDENTIALS names no file", "unset it")
        return
    # What google-auth asks of the machine's metadata server is answered at once, or by nobody.
    os.environ.setdefault("GCE_METADATA_TIMEOUT", "1")
    os.environ.setdefault("GCE_METADATA_DETECT_RETRIES", "1")
    import warnings

    import google.auth
    import google.auth.exceptions

    try:
        with warnings.catch_warnings(action="ignore"):
            found, _ = google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        text = "none found; needed by gs:// paths, but for public buckets"
        yield Finding("absent", "Google credentials", text, "gcloud auth application-default login")
        return
    except Exception as error:
        yield Finding("note", "Google credentials", f"they can't be read ({type(error).__name__})")
        return
    kind = type(found).__module__.rpartition("google.")[2]
    yield Finding("ok", "Google credentials", f"found ({kind})")


def _path(path: str) -> Finding:
    from etils import epath

    from medllm_jax.storage.faults import fault_of

    folder = epath.Path(path)
    try:
        entries = sum(1 for _ in folder.iterdir())
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        return Finding("missing", path, f"{fault.kind}: {fault.words}")
    return Finding("ok", path, f"can be read; {entries:,} entries")

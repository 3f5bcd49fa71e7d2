"""Compiled programs are kept between processes, by JAX's own persistent cache, unless its settings say otherwise.

A program that was compiled before is read back in a fraction of the time. Each kind of machine and version has a folder
of its own in the user's cache folder, and what was used least lately is removed there. JAX_COMPILATION_CACHE_DIR names
another folder (for several processes, one that they share), JAX_ENABLE_COMPILATION_CACHE=false stops it.

Imports no JAX, which reads its environment once: what is set must be set before.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import MutableMapping
from pathlib import Path

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 2**30),  # bytes
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",  # smaller ones are compiled as fast as they are read
}
# Of all programs on one CPU none has collectives. XLA for CPUs forgets their order when it reads a program back, and
# devices that wait for each other at different ones wait for ever.
_SEVERAL_CPUS = r"--?xla_force_host_platform_device_count=(?!1\b)\d"


def keep_programs(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Turns the cache on where nothing is said of it; returns its folder, or None where it is left as it is.

    It stays off where the CPU passes for several devices, without the `filelock` that JAX needs to remove what is old,
    and where the folder can't be written.
    """
    if _FOLDER in environment or "JAX_ENABLE_COMPILATION_CACHE" in environment:
        return None
    several = environment.get("JAX_NUM_CPU_DEVICES", "1") not in ("", "-1", "0", "1")
    if several or re.search(_SEVERAL_CPUS, environment.get("XLA_FLAGS", "")):
        return None
    folder = default_folder(environment)
    if importlib.util.find_spec("filelock") is None or not _can_be_written(folder):
        return None
    for name, value in ({_FOLDER: str(folder)} | _SETTINGS).items():
        environment.setdefault(name, value)
    return folder


def default_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/medllm_jax/programs/<key>``; the key is of the processor and of what compiles for it."""
    caches = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or Path.home()) / ".cache"
    return Path(caches) / "medllm_jax" / "programs" / _key()


def words_of(folder: Path) -> str:
    """What is said of the folder when it comes to be."""
    return (
        f"compiled programs are kept in {folder}, 2 GiB at most, and the next start is faster: "
        f"{_FOLDER} moves it, JAX_ENABLE_COMPILATION_CACHE=false stops it"
    )


def _key() -> str:
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:  # not Linux
        processor += platform.processor()
    versions = []
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append("none")
    return f"jax-{versions[0]}-{hashlib.sha256(repr((processor, versions)).encode()).hexdigest()[:12]}"


def _can_be_written(folder: Path) -> bool:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK)

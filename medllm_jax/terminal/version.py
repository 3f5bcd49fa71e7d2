"""Which code runs."""

import os
from pathlib import Path

__version__ = "0.1.0"


def code_version() -> str:
    """The version of this package, and the commit where that is known, such as ``0.1.0+4f1c2ab90d3e-dirty``.

    It is known in a checkout, where `-dirty` tells of changes since the commit, and in an image that was built with
    MEDLLM_COMMIT. A wheel in somebody's repository is not of that repository's commit.
    """
    folder = Path(__file__).parent
    commit = os.environ.get("MEDLLM_COMMIT") or ""
    if _git(folder, "ls-files", "__init__.py"):
        commit = _git(folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return f"{__version__}+{commit}" if commit else __version__


def install_line(extra: str) -> str:
    """The command that installs an extra of this package: by its folder, where it was installed from a checkout."""
    import json
    import urllib.parse
    import urllib.request
    from importlib import metadata

    try:
        origin = json.loads(metadata.distribution("medllm_jax").read_text("direct_url.json") or "{}")
    except (ValueError, metadata.PackageNotFoundError):
        origin = {}
    if origin.get("dir_info", {}).get("editable"):
        folder = urllib.request.url2pathname(urllib.parse.urlsplit(origin["url"]).path)
        return f"pip install -e '{folder}[{extra}]'"
    return f"pip install 'medllm_jax[{extra}]'"


def _git(folder: Path, *arguments: str) -> str:
    """What a command of git prints; nothing where it fails, or there is no git."""
    import subprocess  # here, for the start of every verb is quicker without it

    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

"""Models on the Hugging Face hub by their names, OWNER/NAME or OWNER/NAME@REVISION, wherever a folder is taken.

`huggingface_hub` does the work, with its cache and its settings: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and
HF_ENDPOINT. Of a repository only what is read here is downloaded: never pickles, never code.
"""

import fnmatch
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from medllm_jax.errors import RunError, UserError, quoted
from medllm_jax.storage.faults import fault_of
from medllm_jax.terminal.progress import Console, size_in_words
from medllm_jax.terminal.secrets import redact

_log = logging.getLogger(__name__)

# As the hub has them; "--" and ".." are in none.
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w.+-][\w./+-]{0,199}", re.ASCII)
_ANSWER_SECONDS = 10
_SHORT = 12  # characters of a commit that people are shown


class Files(NamedTuple):
    """Which files of a repository are wanted: patterns of names, and those of which one must be there."""

    what: str
    patterns: tuple[str, ...]
    needed: tuple[str, ...]

    def among(self, names: list[str]) -> list[str]:
        """Those that are wanted; what is in a folder of the repository never is."""
        return [n for n in names if "/" not in n and any(fnmatch.fnmatchcase(n, p) for p in self.patterns)]


_BESIDE = ("merges.txt", "tokenizer.model", "*.jinja")
MODEL = Files(
    "weights in safetensors (pickles, .bin and .pt, are never read)",
    ("*.safetensors", "*.json", *_BESIDE, "LICENSE*", "NOTICE*", "README.md", "SHA256SUMS"),
    ("*.safetensors",),
)
TOKENIZER = Files(
    "tokenizer",
    (
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"),
        *("config.json", *_BESIDE),
    ),
    ("tokenizer.json", "vocab.json", "tokenizer.model"),
)


class Found(NamedTuple):
    """A folder; and where it came from the hub, the repository's name and the commit."""

    folder: str
    name: str | None = None
    commit: str | None = None

    @property
    def label(self) -> str:
        """What it is called: the folder as it was named, or name and commit."""
        return self.folder if self.name is None else f"{self.name}@{(self.commit or '')[:_SHORT]}"


def is_name(text: str) -> bool:
    """Whether the hub could call a repository so."""
    return _NAME.fullmatch(text) is not None and not text.endswith(".git")


def is_revision(text: str) -> bool:
    """Whether a branch, a tag or a commit could be called so."""
    return _REVISION.fullmatch(text) is not None


def hub_name(text: str) -> tuple[str, str | None] | None:
    """Name and revision where a text has the form of a hub's name and nothing here is called so; else None."""
    name, at, revision = text.partition("@")
    if not is_name(name) or os.path.lexists(text):
        return None
    if at and not is_revision(revision):
        raise UserError(f"{quoted(text, str)}: after @, a branch, a tag or a commit of {name} is expected")
    return name, revision or None


def find_folder(source: str, files: Files, *, option: str = "") -> Found:
    """The folder that is named, or where nothing is there by a hub's name, that of its files in the hub's cache.

    option: that gave the source, for errors. Raises UserError for a name that the hub does not know, does not show, or
    that holds no such files, and where neither folder nor hub can be reached; RunError where a download broke off.
    """
    named = hub_name(source)
    if named is None:
        return Found(source)
    name, revision = named
    given = f"{option} {source}" if option else source
    try:
        folder = _download(name, revision, files, given)
    except (UserError, RunError):
        raise
    except Exception as error:
        refused = _refusal(error, name, revision, given)  # files of a gated model, of which all may see the names
        if refused is not None:
            raise refused from error
        # The network, or the disk, in the middle: clients raise many types.
        fault = fault_of(error)
        reason = fault.words if fault and fault.kind in ("full", "forbidden") else words_of(error)
        raise RunError(
            f"{given}: the download from the hub broke off ({reason}): run the same command again, which goes on with "
            "what is there"
        ) from error
    return Found(folder, name, Path(folder).name)


def _download(name: str, revision: str | None, files: Files, given: str) -> str:
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    how: dict[str, Any] = {"revision": revision, "allow_patterns": list(files.patterns), "ignore_patterns": "*/*"}
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_ANSWER_SECONDS)
    except Exception as error:
        refused = _refusal(error, name, revision, given)
        if refused is not None:
            raise refused from error
        return _cached(error, name, how, given)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    wanted = files.among(list(sizes))
    if not any(fnmatch.fnmatchcase(n, pattern) for n in wanted for pattern in files.needed):
        raise UserError(f"{given}: {name} on the hub has no {files.what}: choose another repository or revision")
    at = f"{name}@{(info.sha or '')[:_SHORT]}"
    missing = [n for n in wanted if not isinstance(try_to_load_from_cache(name, n, revision=info.sha), str)]
    size = sum(sizes[n] for n in missing)
    if missing:
        _check_room(constants.HF_HUB_CACHE, size, given)
        _log.info(f"downloading {at} from the hub: {size_in_words(size)} in {len(missing)} files")
    else:
        _log.info(f"{at} is in the hub's cache, whole")
    with Console(f"downloading {name}", size, unit="bytes") as console:
        return snapshot_download(name, **how, tqdm_class=_shown_by(console))


def _shown_by(console: Console) -> Any:
    """A class of bars for `snapshot_download`, which shows none itself: the bytes that reach the disk are ours."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **more: Any):
            self._counts, self._bytes = more.get("name") == "huggingface_hub.snapshot_download", 0
            super().__init__(*arguments, **more | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                self._bytes += int(n or 0)
                console.update(self._bytes, every_seconds=10)

    return Bar


def _cached(error: Exception, name: str, how: dict[str, Any], given: str) -> str:
    """The folder of what was downloaded before, where the hub is not asked or does not answer."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = isinstance(error, OfflineModeIsEnabled)
    try:
        folder = snapshot_download(name, **how, local_files_only=True)
    except LocalEntryNotFoundError:
        if offline:
            raise UserError(
                f"{_nothing_here(given)}, HF_HUB_OFFLINE is set, and the hub's cache ({constants.HF_HUB_CACHE}) has no "
                f"whole copy of {name}: give a folder, or unset HF_HUB_OFFLINE"
            ) from error
        message = (
            f"{_nothing_here(given)}, and the hub ({constants.ENDPOINT}) can't be asked for {name} "
            f"({words_of(error)}): give a folder that is there, or check the network"
        )
        # A server that answered with a fault may answer otherwise in a while.
        raise (RunError if isinstance(error, HfHubHTTPError) else UserError)(message) from error
    if not offline:
        _log.warning(f"warning: the hub can't be asked for {name} ({words_of(error)}): what is in its cache is taken")
    return folder


def _refusal(error: Exception, name: str, revision: str | None, given: str) -> UserError | None:
    """The error to show where the hub answered that it does not have, or does not show, what was asked for."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    hub = constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{given}: {name} on the hub is gated: accept its licence at {hub}/{name}, and set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        token = "that the token in use may read" if get_token() else "that can be read without HF_TOKEN"
        return UserError(
            f"{_nothing_here(given)}, and the hub ({hub}) has no model {name} {token}: give a folder that is there, "
            "check the name, or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{given}: {name} on the hub has no revision {revision}: a branch, a tag or a whole commit is expected; "
            f"{hub}/{name}/commits lists them"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return UserError(f"{given}: the hub ({hub}) refuses the token in use: set HF_TOKEN to a valid one, or unset it")
    return None


def _nothing_here(given: str) -> str:
    return f"{given}: no folder of that name is here"


def _check_room(cache: str, size: int, given: str) -> None:
    folder = Path(cache).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{given}: {size_in_words(size)} are to be downloaded, and the disk of the hub's cache ({cache}) has "
            f"{size_in_words(free)} left: make room, or set HF_HUB_CACHE to a folder on another disk"
        )


def words_of(error: BaseException) -> str:
    """One short line of an error, without what may be secret."""
    return redact(quoted(f"{type(error).__name__}: {error}", str, most=160))

"""Datasets on the Hugging Face hub, as ``hf://datasets/OWNER/NAME@REVISION?name=CONFIG&split=SPLIT``.

The rows of one commit are downloaded once into a .parquet file of a cache, and read from there as any other file. The
file's path has the commit, and a file beside it says where the rows came from, which stores keep. `datasets` does the
work (an extra), with its settings: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE. It runs no code of a repository.
"""

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from etils import epath

from medllm_jax.data.prepare.files import Inputs
from medllm_jax.errors import RunError, UserError, quoted
from medllm_jax.storage.hub import is_name, is_revision, words_of
from medllm_jax.storage.remote import is_remote, write_whole
from medllm_jax.terminal.version import install_line

_log = logging.getLogger(__name__)

SCHEME = "hf://"
_FORM = "hf://datasets/OWNER/NAME, with @REVISION, and ?name=CONFIG&split=SPLIT where there are several"
_PART = re.compile(r"[\w.+ -]{1,200}", re.ASCII)  # of a config's or a split's name
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubDataset(NamedTuple):
    """A dataset's repository, its revision, config and split; None: what the hub has as its default."""

    name: str
    revision: str | None
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, address: str) -> "HubDataset":
        """What an address names; UserError for what is none."""
        path, _, query = address.partition("?")
        name, at, revision = path.removeprefix(f"{SCHEME}datasets/").partition("@")
        chosen = dict(pairs := parse_qsl(query, keep_blank_values=True))
        if (
            not path.startswith(f"{SCHEME}datasets/")
            or not is_name(name)
            or (at and not is_revision(revision))
            or not chosen.keys() <= {"name", "split"}
            or len(chosen) < len(pairs)
            or not all(_PART.fullmatch(value) and value.strip(".") for value in chosen.values())
        ):
            raise UserError(f"{quoted(address, str, most=120)} is not {_FORM}")
        return cls(name, revision or None, chosen.get("name"), chosen.get("split"))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        chosen = {"name": self.config, "split": self.split}
        query = "&".join(f"{key}={value}" for key, value in chosen.items() if value)
        return f"{SCHEME}datasets/{self.name}{revision}" + (f"?{query}" if query else "")


def local_inputs(inputs: Inputs) -> list[str]:
    """The inputs, with files of this machine in place of datasets on the hub; others are as they were.

    Raises UserError for a dataset that is not there or not shown, and where `datasets` is not installed; RunError where
    the hub can't be reached.
    """
    listed = [inputs] if isinstance(inputs, str) or not isinstance(inputs, Sequence) else inputs
    return [
        str(_fetched(HubDataset.parse(each))) if str(each).startswith(SCHEME) else each for each in map(str, listed)
    ]


def origin_of(file: str) -> str | None:
    """The address, with its commit, of the dataset that a file holds the rows of; None for any other file."""
    if is_remote(file):
        return None
    try:
        return json.loads(_origin_file(Path(file)).read_bytes())["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_folder() -> Path:
    """Where rows of the hub's datasets are kept: medllm_jax/datasets in XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medllm_jax" / "datasets"


def _origin_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.origin.json")


def _file_of(dataset: HubDataset) -> Path:
    """Of a dataset of which all is known."""
    parts = (dataset.name, dataset.revision, dataset.config, dataset.split)
    return cache_folder().joinpath(*map(str, parts[:-1]), f"{parts[-1]}.parquet")


def _fetched(dataset: HubDataset) -> Path:
    known = dataset.config and dataset.split and _COMMIT.fullmatch(dataset.revision or "")
    if known and (file := _file_of(dataset)).exists():
        return file  # a commit never changes: nothing is asked
    if os.path.lexists(dataset.name):
        raise UserError(f"{dataset}: {dataset.name} is here too, and `datasets` would read that: start from elsewhere")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{dataset} needs `datasets`: {install_line('datasets')}") from None
    cache_folder().mkdir(parents=True, exist_ok=True)
    # Where something fails, `datasets` takes what its cache has by the same name, whatever commit that is of, and says
    # nothing: it gets a cache of its own, which goes when the rows are kept.
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".") as own:
        try:
            whole = _resolved(datasets, dataset, own)
            file = _file_of(whole)
            if not file.exists():
                _download(datasets, whole, file, own)
        except (UserError, RunError):
            raise
        except Exception as error:
            raise _refusal(error, dataset) from error
    _log.info(f"reading {whole}, which is kept in {file}")
    return file


def _resolved(datasets: Any, dataset: HubDataset, cache: str) -> HubDataset:
    """The dataset with its commit, and its one config and split where none is named."""
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub.repocard").setLevel(
        logging.ERROR
    )  # it warns, each time, of a README without tags
    commit = HfApi().dataset_info(dataset.name, revision=dataset.revision, timeout=10).sha
    dataset = dataset._replace(revision=commit)
    configs = datasets.get_dataset_config_names(dataset.name, revision=commit, cache_dir=cache)
    dataset = dataset._replace(config=_chosen(dataset, "name", dataset.config, configs, "default"))
    splits = datasets.get_dataset_split_names(dataset.name, dataset.config, revision=commit, cache_dir=cache)
    return dataset._replace(split=_chosen(dataset, "split", dataset.split, splits, "train"))


def _chosen(dataset: HubDataset, key: str, named: str | None, there: Sequence[str], usual: str) -> str:
    """The config or the split that is named, else the only one, else the usual one; UserError where none of these."""
    if named is None and len(there) == 1:
        named = there[0]
    elif named is None and usual in there:
        named = usual
        _log.info(f"{dataset}: {key}={usual} is read, of {', '.join(there)}")
    if named is None or named not in there or not _PART.fullmatch(named):
        what = {"name": "config", "split": "split"}[key]
        wrong = f"no {what} {named}" if named else f"several {what}s"
        raise UserError(f"{dataset} has {wrong}: choose with {key}= after ?, of {', '.join(there)}")
    return named


def _download(datasets: Any, dataset: HubDataset, file: Path, cache: str) -> None:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    _log.info(f"downloading {dataset}")
    chosen = {"split": dataset.split, "revision": dataset.revision}
    rows = datasets.load_dataset(dataset.name, dataset.config, cache_dir=cache, **chosen)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        rows.to_parquet(str(unfinished))
        origin = {"dataset": str(dataset), "rows": len(rows), "datasets": datasets.__version__}
        write_whole(epath.Path(_origin_file(file)), json.dumps(origin))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _refusal(error: Exception, dataset: HubDataset) -> UserError | RunError:
    """What clients raise, in one line: UserError where starting again won't help, RunError where it may."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{dataset} is shown to those alone who were given access: ask for it on the hub, set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{dataset}: the dataset has no revision {dataset.revision}")
    if isinstance(error, errors.RepositoryNotFoundError | DatasetNotFoundError):
        return UserError(f"{dataset} is not on the hub, or needs a token that may read it (HF_TOKEN)")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(
            f"{dataset}: HF_HUB_OFFLINE is set, and the rows are not kept here: name commit, config and split of what "
            f"is kept in {cache_folder()}, or allow the network"
        )
    said = words_of(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "scripts are no longer supported" in str(error):
        return UserError(f"{dataset} is made by a program of its repository, and such programs are never run")
    if isinstance(error, ValueError | DatasetsError):
        return UserError(f"{dataset} can't be read as rows ({said})")
    if isinstance(error, OSError | errors.HfHubHTTPError) or status or type(error).__module__.startswith("http"):
        return RunError(f"{dataset}: the hub can't be reached, or broke off ({said}): start the same command again")
    return RunError(f"{dataset}: the download failed ({said})")

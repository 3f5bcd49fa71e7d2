"""Input files: which kinds there are, and finding them in files, folders and globs, local or under gs://.

Kinds: ``.jsonl`` (one object a line) and ``.txt`` (one document a file), each also with ``.gz`` or ``.zst`` appended,
and ``.parquet``.
"""

import itertools
from collections.abc import Sequence

from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_remote

Inputs = str | epath.PathLike | Sequence[str | epath.PathLike]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", *(f".jsonl{suffix}" for suffix in _COMPRESSIONS))
TEXT_FILES = (".txt", *(f".txt{suffix}" for suffix in _COMPRESSIONS))
PARQUET = (".parquet",)
RECORD_FILES = (*JSON_LINES, *PARQUET)  # what ``readers.read_records`` reads
DOCUMENT_FILES = (*JSON_LINES, *TEXT_FILES, *PARQUET)  # what ``readers.read_documents`` reads


def compression_of(file: str) -> str | None:
    """ "gzip" or "zstd", by the file's name; None where it is not compressed as a whole."""
    return next((name for suffix, name in _COMPRESSIONS.items() if file.endswith(suffix)), None)


def find_files(inputs: Inputs, suffixes: Sequence[str]) -> list[epath.Path]:
    """The files with one of ``suffixes`` among files, folders (searched through) and globs; ordered, each once.

    Raises UserError for an input that does not exist or holds no such file.
    """
    kinds = ", ".join(suffixes)
    files: dict[str, epath.Path] = {}
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        inputs = [inputs]
    for item in inputs:
        path = epath.Path(item)
        found = _files_under(path)
        if found == [path] and not path.name.endswith(tuple(suffixes)):
            raise UserError(f"{path} is not a file of a kind that is read here ({kinds})")
        if not found and _has_wildcard(str(path)):
            found = _glob(path)
        elif not found and not path.exists():
            raise UserError(f"{path} does not exist")
        found = [file for file in found if file.name.endswith(tuple(suffixes))]
        if not found:
            raise UserError(f"no file of a kind that is read here ({kinds}) at {path}")
        files.update((str(file), file) for file in found)
    return list(files.values())


def _files_under(path: epath.Path) -> list[epath.Path]:
    """The file itself, or the visible files of a folder and its folders, in order; empty where nothing exists."""
    if is_remote(path):
        return _remote_files(path, glob=False)
    if path.is_dir():
        visible = (entry for entry in path.iterdir() if not entry.name.startswith("."))
        return [file for entry in sorted(visible) for file in _files_under(entry)]
    return [path] if path.exists() else []


def _glob(pattern: epath.Path) -> list[epath.Path]:
    if "**" in pattern.parts:
        raise UserError(f"{pattern}: `**` is not understood; give the folder itself, it is searched through")
    if is_remote(pattern):
        return _remote_files(pattern, glob=True)
    base = _fixed_part(pattern)
    return [file for match in sorted(base.glob(str(pattern.relative_to(base)))) for file in _files_under(match)]


def _remote_files(path: epath.Path, glob: bool) -> list[epath.Path]:
    """``_files_under`` a path, or all matches of a glob, in object storage.

    Asks for whole listings, each a request for a thousand files and more; asking what an entry is costs one apiece.
    """
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(str(path))
    entries = filesystem.glob(root, detail=True) if glob else filesystem.find(root, detail=True)
    for name in [name for name, entry in entries.items() if entry["type"] == "directory"]:
        entries |= filesystem.find(name, detail=True)
    base = _fixed_part(path) if glob else path
    scheme = str(path).partition("://")[0]
    files = [epath.Path(f"{scheme}://{name}") for name, entry in entries.items() if entry["type"] == "file"]
    visible = (file for file in files if not any(part.startswith(".") for part in file.relative_to(base).parts))
    return sorted(visible, key=lambda file: file.parts)


def _fixed_part(pattern: epath.Path) -> epath.Path:
    """The folder that a glob looks in."""
    return epath.Path(*itertools.takewhile(lambda part: not _has_wildcard(part), pattern.parts))


def _has_wildcard(text: str) -> bool:
    return not set(text).isdisjoint("*?[")

"""Input files: which kinds there are, and finding them in files, folders and globs, local or under gs://.

Kinds: JSON lines (``.jsonl``, ``.ndjson``: one object a line) and ``.txt`` (one document a file), each also with
``.gz``, ``.zst``, ``.xz`` or ``.bz2`` appended, and ``.parquet``; in upper or lower case.
"""

import itertools
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from etils import epath

from medllm_jax.data.prepare.rejections import RejectionCounts
from medllm_jax.errors import UserError
from medllm_jax.storage.remote import is_remote, refuse_encoding

Inputs = str | epath.PathLike | Sequence[str | epath.PathLike]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
PLAIN_LINES = (".jsonl", ".ndjson")
JSON_LINES = (*PLAIN_LINES, *(line + suffix for line in PLAIN_LINES for suffix in _COMPRESSIONS))
TEXT_FILES = (".txt", *(f".txt{suffix}" for suffix in _COMPRESSIONS))
PARQUET = (".parquet",)
RECORD_FILES = (*JSON_LINES, *PARQUET)  # what ``readers.read_records`` reads
JSON_LISTS = (".json", *(f".json{suffix}" for suffix in _COMPRESSIONS))  # a list of objects, or objects line by line
DOCUMENT_FILES = (*JSON_LINES, *TEXT_FILES, *PARQUET)  # what ``readers.read_documents`` reads

# How a file begins that only says where its content is, and with which program to get it.
_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get"}
POINTER_BYTES = max(map(len, _POINTERS))


def is_kind(file: str, suffixes: Sequence[str]) -> bool:
    """Whether a file is of the kinds that some suffixes, in lower case, stand for."""
    return file.lower().endswith(tuple(suffixes))


def compression_of(file: str) -> str | None:
    """ "gzip", "zstd", "xz" or "bzip2", by the file's name; None where it is not compressed as a whole."""
    return next((name for suffix, name in _COMPRESSIONS.items() if is_kind(file, [suffix])), None)


def refuse_pointer(file: str, beginning: bytes) -> None:
    """UserError where a file, by its first POINTER_BYTES bytes, only points to its content."""
    for start, command in _POINTERS.items():
        if beginning.startswith(start):
            raise UserError(f"{file} only says where its content is: fetch it with `{command}`")


def find_files(
    inputs: Inputs, suffixes: Sequence[str], passed_over: RejectionCounts, *, by_name: Sequence[str] = ()
) -> list[epath.Path]:
    """The files with one of ``suffixes`` among files, folders (searched through) and globs; ordered, each once.

    by_name: suffixes of files that are read where an input ends with one, and in a folder are not, since many a file of
    that kind is none of the data.

    A file that several links, names or inputs lead to is one file. What is not read is counted in ``passed_over``.

    Raises UserError for an input that does not exist or holds no such file, a link that leads nowhere, and an object
    that can't be read under its name or as it was stored.
    """
    search = _Search(suffixes, passed_over)
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        inputs = [inputs]
    for item in inputs:
        if str(item).startswith("hf://"):
            raise UserError(f"{item} is read by `medllm data` alone: give files that are here or under gs://")
        path = epath.Path(item)
        search.suffixes = (*suffixes, *by_name) if is_kind(path.name, by_name) else suffixes
        before, seen = search.matches, passed_over.counts.copy()
        if is_remote(path):
            search.remote(path)
        else:
            search.local(path)
        if search.matches == before:
            raise search.nothing_at(path, passed_over.counts - seen)
    return list(search.found.values())


class _Search:
    """found: what identifies a file -> its path; matches: how many paths led to one."""

    def __init__(self, suffixes: Sequence[str], passed_over: RejectionCounts):
        self.found: dict[object, epath.Path] = {}
        self.matches = 0
        self.suffixes = suffixes
        self._passed_over = passed_over
        self._folders: set[tuple[int, int]] = set()

    def local(self, path: epath.Path) -> None:
        there = Path(path)
        self._folders.clear()
        if there.is_symlink() or there.exists():
            if there.is_file() and not is_kind(path.name, self.suffixes):
                raise self._wrong_kind(path)
            self._walk(there)
        elif _has_wildcard(str(path)):
            base = _fixed_part(_checked(path))
            for match in sorted(base.glob(str(path.relative_to(base)))):
                self._walk(Path(match))
        else:
            raise UserError(f"{path} does not exist")

    def _walk(self, path: Path) -> None:
        try:
            status = path.stat()
        except OSError as error:
            if path.is_symlink() and not isinstance(error, PermissionError):
                raise UserError(f"{path} is a link that leads nowhere: mend it or remove it") from None
            raise
        identity = (status.st_dev, status.st_ino)
        if not stat.S_ISDIR(status.st_mode):
            self._add(str(path), identity, regular=stat.S_ISREG(status.st_mode))
        elif identity in self._folders:
            self._passed_over.add("a folder that was searched before", str(path))
        else:
            self._folders.add(identity)
            for entry in sorted(path.iterdir()):
                if entry.name.startswith("."):
                    self._passed_over.add("hidden", str(entry))
                else:
                    self._walk(entry)

    def remote(self, path: epath.Path) -> None:
        """Asks for whole listings, each a request for a thousand files and more; not for each entry what it is."""
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(str(path))
        if not root.strip("/"):
            raise UserError(f"{path} names no bucket: gs://BUCKET/FOLDER is expected")
        scheme = str(path).partition("://")[0]
        entries, base = filesystem.find(root, detail=True), path
        if not entries and _has_wildcard(str(path)):
            base = _fixed_part(_checked(path))
            entries = filesystem.glob(root, detail=True)
            for name in [name for name, entry in entries.items() if entry["type"] == "directory"]:
                entries |= filesystem.find(name, detail=True)
        elif not entries:
            raise UserError(f"{path} does not exist")
        files = {f"{scheme}://{name}": entry for name, entry in entries.items() if entry["type"] == "file"}
        if str(path) in files and not is_kind(path.name, self.suffixes):
            raise self._wrong_kind(path)
        for name in sorted(files, key=lambda name: name.split("/")):
            file = epath.Path(name)
            if str(file) != name:
                raise UserError(f"{name} can't be read under this name, as a path it is {file}: rename the object")
            if any(part.startswith(".") for part in file.relative_to(base).parts):
                self._passed_over.add("hidden", name)
            elif self._add(name, name, regular=True):
                refuse_encoding(name, files[name].get("contentEncoding"))

    def _add(self, path: str, identity: object, *, regular: bool) -> bool:
        """Whether the file is read."""
        name = PurePosixPath(path).name
        if not regular:
            self._passed_over.add("neither a file nor a folder", path)
        elif not is_kind(name, self.suffixes):
            suffix = PurePosixPath(name).suffix.lower()[:12]
            self._passed_over.add(f"of a kind that is not read ({suffix or 'no suffix'})", path)
        else:
            self.matches += 1
            if identity not in self.found:
                self.found[identity] = epath.Path(path)
                return True
            if str(self.found[identity]) != path:
                self._passed_over.add("another path to a file that is read", path)
        return False

    def _wrong_kind(self, path: epath.Path) -> UserError:
        array = ""
        if is_kind(path.name, [".json"]):
            lines = f"{path.name}l"
            array = f": JSON is read one object a line; `jq -c '.[]' {path.name} > {lines}` makes such a file of a list"
        return UserError(f"{path} is not a file of a kind that is read here ({self._kinds()}){array}")

    def nothing_at(self, path: epath.Path, others: Counter[str]) -> UserError:
        """Why an input is refused that leads to no file; others: what it leads to, by reason."""
        if _has_wildcard(str(path)) and not others:
            return UserError(f"no file matches {path}: give files, folders or patterns of files that are there")
        found = ", ".join(f"{count:,} {reason}" for reason, count in others.most_common(5))
        there = f"; there are {found}" if found else ""
        return UserError(f"no file of a kind that is read here ({self._kinds()}) at {path}{there}")

    def _kinds(self) -> str:
        """The kinds that are read, each compression once."""
        plain = [suffix for suffix in self.suffixes if not is_kind(suffix, list(_COMPRESSIONS))]
        packed = any(is_kind(suffix, list(_COMPRESSIONS)) for suffix in self.suffixes)
        return ", ".join(plain) + (f"; all but .parquet also with {', '.join(_COMPRESSIONS)}" if packed else "")


def _checked(pattern: epath.Path) -> epath.Path:
    if "**" in pattern.parts:
        raise UserError(f"{pattern}: `**` is not understood; give the folder itself, it is searched through")
    return pattern


def _fixed_part(pattern: epath.Path) -> epath.Path:
    """The folder that a glob looks in."""
    return epath.Path(*itertools.takewhile(lambda part: not _has_wildcard(part), pattern.parts))


def _has_wildcard(text: str) -> bool:
    return not set(text).isdisjoint("*?[")

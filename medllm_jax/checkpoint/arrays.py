"""A checkpoint's weights, read and written slice by slice by TensorStore: what Orbax has no way to do.

In the folder of an Orbax item each weight is a zarr array, named by its path with dots: inside a key-value store of
Orbax's own (OCDBT), as training writes them, or as a folder of files, as `create` lays them out. Orbax reads both.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from medllm_jax.errors import UserError, first_line
from medllm_jax.storage.faults import passes, words_of
from medllm_jax.storage.json_files import MAX_BYTES, read_json
from medllm_jax.storage.remote import kvstore_spec

TREE = "_METADATA"  # Orbax's list of an item's weights
CHUNK_BYTES = 8 << 20
_LEAST_BYTES = 256 << 10  # of a chunk, where devices read less of a weight
_DESCRIPTIONS = {True: "zarr.json", False: ".zarray"}  # by whether it is version 3: the file that describes an array
_MOST_DESCRIBED = 2**20  # bytes of that file
# The texts of an item, and how its arrays were laid over devices, if there are any: TensorStore reads these too.
_TEXTS, _SHARDING = "_strings.json", "_sharding"


class UnreadableError(Exception):
    """What is stored can't be read; the text names the first cause."""


def chunk_shape(shape: tuple[int, ...], itemsize: int, row_parts: int, *, stacked: bool) -> tuple[int, ...]:
    """The shape of the chunks that a weight is stored in: the rows of a block that a device reads, or an even part.

    Rows are whole, so that chunks can be copied as they are. row_parts: into how many parts devices split the rows.
    stacked: the first dimension is that of the blocks, which are apart from each other.
    """
    size, row_bytes = shape[stacked], itemsize * math.prod(shape[stacked + 1 :])
    most, rows = max(1, CHUNK_BYTES // row_bytes), size // row_parts
    if rows > most:
        share, rows = rows, _largest_divisor(rows, most)
        if 4 * rows < most and share == size:
            rows = most  # what hardly divides, and is not split by devices, may end in a shorter chunk
    elif rows * row_bytes < _LEAST_BYTES:  # several devices read the same
        rows *= row_parts // _largest_divisor(row_parts, max(1, size * row_bytes // _LEAST_BYTES))
    return (*(1,) * stacked, rows, *shape[stacked + 1 :])


def _largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


def create(item: epath.Path, path: str, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> ts.TensorStore:
    """A weight's array in the folder of an item, to be written to in parts; the one that is there, if it is the same.

    Each chunk is a file of its own, there whole or not at all, with a checksum that every reader checks. UserError
    where another array is there, or a damaged one.
    """
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(item / _name(path)),
        "metadata": {
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [little_endian, {"name": "crc32c"}],
            "fill_value": 0 if "int" in dtype else "NaN",  # what Orbax reads of a chunk that was lost
        },
        "store_data_equal_to_fill_value": True,  # so that a chunk that is not there was lost
    }
    # What is written is lost when the machine is, not when the program is: as with `cp`.
    context = ts.Context({"file_io_sync": False})
    try:
        _check_description(item / _name(path) / _DESCRIPTIONS[True])
        return ts.open(spec, open=True, create=True, context=context).result()
    except (ValueError, UnreadableError) as error:
        if passes(error):
            raise
        raise UserError(
            f"{os.fspath(item / _name(path))} is damaged, or an array of another conversion ({words_of(error)}): "
            "remove what was begun, and begin anew"
        ) from error


def describe(tree: Mapping[str, Any]) -> str:
    """Orbax's list of an item's weights, for one whose arrays are those of `create`; from the list of another item of
    the same weights, whose arrays Orbax wrote.
    """
    weights = {key: dict(entry) for key, entry in tree["tree_metadata"].items()}
    for entry in weights.values():
        entry["value_metadata"] = {k: v for k, v in entry["value_metadata"].items() if k != "write_shape"}
    return json.dumps({**tree, "tree_metadata": weights, "use_ocdbt": False})


def open_arrays(item: epath.Path) -> dict[str, ts.TensorStore]:
    """Path -> array of every weight in the folder of an item, to be read in parts.

    UnreadableError where the list of them, or one of them, is not what was written.
    """
    tree = _listed(item)
    driver = "zarr3" if tree.use_zarr3 else "zarr"
    opened = {}
    for path in tree.paths:
        if tree.use_ocdbt:  # Orbax leaves out chunks of zeros
            where = {"kvstore": {"driver": "ocdbt", "base": kvstore_spec(item), "path": f"{_name(path)}/"}}
        else:
            where = {"kvstore": kvstore_spec(item / _name(path)), "fill_missing_data_reads": False}
        spec = {"driver": driver, "recheck_cached_data": "open", **where}
        opened[path] = ts.open(spec, open=True, read=True)
    arrays = {}
    for path, future in opened.items():
        try:
            arrays[path] = future.result()
        except ValueError as error:
            if passes(error):
                raise
            raise UnreadableError(f"{path} can't be opened: {first_line(error)}") from error
    return arrays


def chunk_of(array: ts.TensorStore) -> tuple[int, ...]:
    """The shape of the chunks that an array is stored in."""
    return tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or ())


def has_whole_rows(array: ts.TensorStore) -> bool:
    """Whether the chunks of an array hold whole rows."""
    return chunk_of(array)[-1:] == tuple(array.shape[-1:])


def check_descriptions(item: epath.Path) -> None:
    """UnreadableError where the description of an array can't be given to TensorStore, nor to Orbax, which asks it."""
    tree = _listed(item)
    for path in () if tree.use_ocdbt else tree.paths:  # a key-value store knows by checksums what was written
        _check_description(item / _name(path) / _DESCRIPTIONS[tree.use_zarr3])
    _check_description(item / _SHARDING, MAX_BYTES)


def check_texts(item: epath.Path) -> None:
    """UnreadableError where the texts of an item can't be given to TensorStore."""
    _check_description(item / _TEXTS, MAX_BYTES)


def _check_description(file: epath.Path, max_bytes: int = _MOST_DESCRIBED) -> None:
    """TensorStore follows what it nests, however deep, and the process ends where the stack does."""
    try:
        read_json(file, max_bytes=max_bytes)
    except FileNotFoundError:
        pass  # the reader will say so
    except UserError as error:
        raise UnreadableError(str(error)) from None


class _Tree(NamedTuple):
    paths: list[str]
    use_ocdbt: bool
    use_zarr3: bool


def _listed(item: epath.Path) -> _Tree:
    """What Orbax's list of an item's weights says."""
    try:
        tree = read_json(item / TREE)
        paths = ["/".join(str(key["key"]) for key in e["key_metadata"]) for e in tree["tree_metadata"].values()]
        if any(".." in path for path in paths):
            raise UnreadableError(f"{TREE} names a weight that leads out of the folder")
        return _Tree(paths, bool(tree.get("use_ocdbt", True)), bool(tree.get("use_zarr3")))
    except UserError as error:
        raise UnreadableError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{TREE} is no list of weights ({type(error).__name__}: {error})") from None


def _name(path: str) -> str:
    return path.replace("/", ".")

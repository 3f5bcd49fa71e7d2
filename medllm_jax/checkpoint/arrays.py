"""A checkpoint's weights, read and written slice by slice by TensorStore: what Orbax has no way to do.

In the folder of an Orbax item each weight is a zarr array, named by its path with dots: inside a key-value store of
Orbax's own (OCDBT), as training writes them, or as a folder of files, as `create` lays them out. Orbax reads both.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import tensorstore as ts
from etils import epath

from medllm_jax.errors import UserError
from medllm_jax.storage.remote import kvstore_spec

TREE = "_METADATA"  # Orbax's list of an item's weights
CHUNK_BYTES = 8 << 20
_SLICE_BYTES = 64 << 20  # of the rows that a chunk is a part of, which is what a writer holds at a time
# Chunks are not made narrower than so many columns, where no mesh says how devices split a weight, and where one does.
_COLUMNS, _COLUMNS_OF_PART = 2048, 512


def chunk_shape(
    shape: tuple[int, ...], itemsize: int, parts: tuple[int, ...] | None, *, stacked: bool
) -> tuple[int, ...]:
    """The shape of the chunks that a weight is stored in: a device's part of a block, or an even part of that.

    parts: into how many parts devices split each dimension; None where that is not known. stacked: the first dimension
    is that of the blocks, which are apart from each other.
    """
    matrix = len(shape) - stacked == 2
    row, columns = (len(shape) - 2, shape[-1]) if matrix else (len(shape) - 1, 1)
    wanted, least = (32, _COLUMNS) if parts is None else (parts[-1], _COLUMNS_OF_PART)
    across = [p for p in range(1, wanted + 1) if wanted % p == 0 == columns % p and (p == 1 or columns >= p * least)]
    chunk = list(shape)
    if stacked:
        chunk[0] = 1
    if matrix:
        chunk[-1] //= across[-1]
    rows = shape[row] // (1 if parts is None else parts[row])
    most = min(CHUNK_BYTES // (itemsize * columns // across[-1]), _SLICE_BYTES // (itemsize * columns))
    chunk[row] = rows if rows <= most else max(size for size in range(1, max(most, 1) + 1) if rows % size == 0)
    if 4 * chunk[row] < min(rows, most) and rows == shape[row]:
        chunk[row] = most  # what hardly divides, and is not split by devices, may end in a shorter chunk
    return tuple(chunk)


def create(item: epath.Path, path: str, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> ts.TensorStore:
    """A weight's array in the folder of an item, to be written to in parts; the one that is there, if it is the same.

    Each chunk is a file of its own, there whole or not at all, with a checksum that every reader checks. ValueError
    where another array is there.
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
    return ts.open(spec, open=True, create=True, context=context).result()


def describe(tree: Mapping[str, Any]) -> str:
    """Orbax's list of an item's weights, for one whose arrays are those of `create`; from the list of another item of
    the same weights, whose arrays Orbax wrote.
    """
    weights = {key: dict(entry) for key, entry in tree["tree_metadata"].items()}
    for entry in weights.values():
        entry["value_metadata"] = {k: v for k, v in entry["value_metadata"].items() if k != "write_shape"}
    return json.dumps({**tree, "tree_metadata": weights, "use_ocdbt": False})


def open_arrays(item: epath.Path) -> dict[str, ts.TensorStore]:
    """Path -> array of every weight in the folder of an item, to be read in parts. UserError where one is missing."""
    tree = json.loads((item / TREE).read_text())
    driver = "zarr3" if tree.get("use_zarr3") else "zarr"
    opened = {}
    for entry in tree["tree_metadata"].values():
        path = "/".join(str(key["key"]) for key in entry["key_metadata"])
        if tree.get("use_ocdbt", True):  # Orbax leaves out chunks of zeros
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
            raise UserError(f"{os.fspath(item)} is damaged: {path} can't be opened ({error}); copy it again") from None
    return arrays


def _name(path: str) -> str:
    return path.replace("/", ".")

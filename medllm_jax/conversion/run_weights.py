"""The weights of a checkpoint in ranges of rows, in tensors as Hugging Face names them."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tensorstore as ts

from medllm_jax.checkpoint.arrays import chunk_of
from medllm_jax.checkpoint.chunk_files import ChunkFiles, chunk_files
from medllm_jax.checkpoint.fingerprint import StreamedFingerprint
from medllm_jax.checkpoint.handle import Checkpoint
from medllm_jax.config.schema import AdapterConfig, ModelConfig
from medllm_jax.conversion.names import Tensor, parameter_shapes, tensors_of
from medllm_jax.model.lora import as_frozen, merge
from medllm_jax.model.quantize import Storage, dequantize, quantize
from medllm_jax.terminal.progress import Console

RANGE_BYTES = 16 << 20  # read of a tensor at a time
_MAX_RANGE_BYTES = 64 << 20  # where the chunks that it is stored in are large


class RunWeights:
    """The weights of a checkpoint: shape, dtype, and tensors as Hugging Face names them, read in ranges of rows.

    Adapters are merged into their base; quantised weights are dequantised. dtype: of the base, or of what is not
    quantised: as stored, or else that which it is to be read in.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype | None = None):
        whole = checkpoint.whole
        self.checkpoint, self.config, self.storage = checkpoint, checkpoint.model, whole.storage
        self.arrays = whole.open_arrays()
        found = {path: tuple(array.shape) for path, array in self.arrays.items()}
        expected = _stored_shapes(self.config, self.storage)
        if differing := sorted(p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p)):
            path = differing[0]
            raise whole.failure(f"has {path} of shape {found.get(path)}, of its model that is {expected.get(path)}")
        self.dtype: np.dtype = dtype or self.arrays["norm/weight"].dtype.numpy_dtype
        self.tensors: list[Tensor] = tensors_of(self.config)
        self._stored_in = whole
        self._factors = {} if checkpoint.adapter is None else checkpoint.host_params()

    def read(
        self, tensor: Tensor, first: int = 0, last: int | None = None, dtype: np.dtype | None = None
    ) -> np.ndarray:
        """Rows of one tensor, in host memory, in a dtype (default: this one's). Safe to call from several threads."""
        last = tensor.shape[0] if last is None else last
        rows = self._dequantized(tensor, first, last)
        adapter = self.checkpoint.adapter
        if adapter is not None:
            rows = self._merged(tensor, rows, first, last, adapter)
        return rows.astype(dtype or self.dtype, copy=False)

    def _dequantized(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        if self.storage is None or tensor.path in self.arrays:
            return self._rows(tensor.path, tensor, first, last)
        layer = tensor.path.rpartition("/")[0]
        names = ("codes", "absmax", "absmax_low", "absmax_step") if self.storage.double else ("codes", "absmax")
        codes = {name: self._rows(f"{layer}/{name}", tensor, first, last) for name in names}
        return np.asarray(_dequantizer(self.storage)(codes))

    def _merged(self, tensor: Tensor, rows: np.ndarray, first: int, last: int, adapter: AdapterConfig) -> np.ndarray:
        layer, _, name = tensor.path.rpartition("/")
        if name != "weight" or not layer.endswith("_proj"):
            return as_frozen(rows, adapter)
        factors = None
        if f"{layer}/lora_A" in self._factors:
            a, b = (self._factors[f"{layer}/lora_{matrix}"][tensor.layer] for matrix in "AB")
            factors = a, b[first:last]
        return merge(rows, factors, adapter, quantised=self.storage is not None)

    def _rows(self, path: str, tensor: Tensor, first: int, last: int) -> np.ndarray:
        array = self.arrays[path] if tensor.layer is None else self.arrays[path][tensor.layer]
        with self._stored_in.reading(path):
            return array[first:last].read().result()

    def chunks_of(self, tensor: Tensor, dtype: np.dtype) -> ChunkFiles | None:
        """The files that hold a tensor's rows as `read` would give them in a dtype; None where none do."""
        if self.checkpoint.adapter is not None or tensor.path not in self.arrays:
            return None
        chunks = chunk_files(self.arrays[tensor.path], tensor.layer)
        return chunks if chunks is not None and chunks.dtype == dtype else None

    def rows_at_a_time(self, tensor: Tensor) -> int:
        """How many rows of a tensor to read at a time: whole chunks, where they are not too large."""
        layer = tensor.path.rpartition("/")[0]
        array = self.arrays[tensor.path if tensor.path in self.arrays else f"{layer}/codes"]
        chunk = chunk_of(array)[0 if tensor.layer is None else 1]
        row_bytes = self.dtype.itemsize * math.prod(tensor.shape[1:])
        rows = chunk * max(1, RANGE_BYTES // max(1, chunk * row_bytes))
        return max(1, min(rows, _MAX_RANGE_BYTES // row_bytes))

    def chunk_bytes(self) -> int:
        """Bytes of the largest chunk that the weights are stored in, decoded."""
        return max(math.prod(chunk_of(array)) * array.dtype.numpy_dtype.itemsize for array in self.arrays.values())

    def check(self) -> None:
        """UserError where what is stored is not what was written, or not the base that adapters were trained on.

        Reads all of it, where that is known. A converted model carries no digests, but each of its chunks has its own
        checksum.
        """
        if self.checkpoint.adapter is not None:
            self.checkpoint.check_base(self.fingerprint("checking the base"))
        elif self.checkpoint.has_digests:
            self.checkpoint.check_lines(self._sums("checking the checkpoint").line_of_each("params/"))

    def fingerprint(self, heading: str) -> str:
        """`model_fingerprint` of the stored weights, which are read range by range."""
        return self._sums(heading).digest()

    def _sums(self, heading: str) -> StreamedFingerprint:
        shapes = {path: (tuple(array.shape), array.dtype.numpy_dtype) for path, array in self.arrays.items()}
        sums, done = StreamedFingerprint(shapes), 0
        total = sum(array.size * array.dtype.numpy_dtype.itemsize for array in self.arrays.values())
        with Console(heading, total, unit="bytes") as console:
            for path, array in self.arrays.items():
                for index, first in _parts(array):
                    with self._stored_in.reading(path):
                        values = array[index].read().result()
                    sums.add(path, first, values)
                    done += values.nbytes
                    console.update(done, path, every_seconds=10)
        return sums


def _stored_shapes(config: ModelConfig, storage: Storage | None) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each array that a model of a shape is stored in."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, shape in parameter_shapes(config).items():
        if storage is None or not path.endswith("_proj/weight"):
            shapes[path] = shape
            continue
        matrix = jax.ShapeDtypeStruct(shape[1:], np.float32)
        stored = jax.eval_shape(functools.partial(quantize, storage=storage), matrix)
        layer = path.rpartition("/")[0]
        shapes |= {f"{layer}/{name}": (shape[0], *array.shape) for name, array in stored.items()}
    return shapes


@functools.cache
def _dequantizer(storage: Storage) -> Callable[[dict[str, np.ndarray]], jax.Array]:
    return jax.jit(lambda arrays: dequantize(arrays, storage, np.float32))


def _parts(array: ts.TensorStore) -> Iterator[tuple[tuple, int]]:
    """Places of consecutive parts of an array, and the index of their first element."""
    blocks = [()] if array.ndim < 3 else [(block,) for block in range(array.shape[0])]
    shape = array.shape[array.ndim - 2 :] if array.ndim > 1 else array.shape
    row = math.prod(shape[1:])
    rows = max(1, RANGE_BYTES // (row * array.dtype.numpy_dtype.itemsize))
    for number, block in enumerate(blocks):
        for first in range(0, shape[0], rows):
            yield (*block, slice(first, min(first + rows, shape[0]))), (number * shape[0] + first) * row

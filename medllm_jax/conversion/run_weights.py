"""Reading a checkpoint of a run folder in parts of tensors, as Hugging Face names them."""

import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tensorstore as ts

from medllm_jax.checkpoint import orbax as checkpoint
from medllm_jax.checkpoint.fingerprint import Slices
from medllm_jax.config.schema import ModelConfig
from medllm_jax.conversion.names import Tensor, tensors_of
from medllm_jax.errors import UserError
from medllm_jax.model.lora import as_frozen, merge
from medllm_jax.model.quantize import Storage, dequantize
from medllm_jax.terminal.progress import Console

SLICE_BYTES = 16 << 20  # of a tensor, that are read at a time
_MAX_SLICE_BYTES = 64 << 20  # where the chunks that it is stored in are large


class Run:
    """A checkpoint of a run folder: shape, dtype, and weights in parts of tensors as Hugging Face names them.

    Of adapters these are the merged weights, of a quantised model what its codes stand for. dtype: in which the model
    that adapters stand on, or what is not quantised of it, is stored.
    """

    def __init__(self, path: str, step: int):
        self.path, self.step = path, step
        self.config: ModelConfig = checkpoint.load_model_config(path, step)
        self.adapted = checkpoint.load_adapted(path, step)
        base, base_step = (path, step) if self.adapted is None else self.adapted.base[:2]
        self.storage = checkpoint.load_storage(base, base_step)
        self.arrays = checkpoint.open_arrays(base, base_step)
        self.dtype: np.dtype = self.arrays["norm/weight"].dtype.numpy_dtype
        self.tensors: list[Tensor] = tensors_of(self.config)
        self._factors = {} if self.adapted is None else dict(checkpoint.stream_params(path, step))

    def read(
        self, tensor: Tensor, first: int = 0, last: int | None = None, dtype: np.dtype | None = None
    ) -> np.ndarray:
        """Rows of one tensor, in host memory, in a dtype (default: this one's). Safe to call from several threads."""
        last = tensor.shape[0] if last is None else last
        rows = self._stored(tensor, first, last)
        if self.adapted is not None:
            rows = self._merged(tensor, rows, first, last)
        return rows.astype(dtype or self.dtype, copy=False)

    def _stored(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """What is stored, or what the codes that are stored stand for."""
        if tensor.path in self.arrays:
            return self._rows(tensor.path, tensor, first, last)
        layer = tensor.path.rpartition("/")[0]
        names = ("codes", "absmax", "absmax_low", "absmax_step") if self.storage.double else ("codes", "absmax")
        codes = {name: self._rows(f"{layer}/{name}", tensor, first, last) for name in names}
        return np.asarray(_dequantizer(self.storage)(codes))

    def _merged(self, tensor: Tensor, rows: np.ndarray, first: int, last: int) -> np.ndarray:
        layer, _, name = tensor.path.rpartition("/")
        if name != "weight" or not layer.endswith("_proj"):
            return as_frozen(rows, self.adapted.settings)
        a, b = (self._factors.get(f"{layer}/lora_{matrix}") for matrix in "AB")
        factors = None if a is None else (a[tensor.layer], b[tensor.layer][first:last])
        return merge(rows, factors, self.adapted.settings, quantised=self.storage is not None)

    def _rows(self, path: str, tensor: Tensor, first: int, last: int) -> np.ndarray:
        array = self.arrays[path] if tensor.layer is None else self.arrays[path][tensor.layer]
        try:
            return array[first:last].read().result()
        except ValueError as error:
            raise UserError(f"{self.path}: {path} of step {self.step} can't be read ({error}): copy it again") from None

    def slice_rows(self, tensor: Tensor) -> int:
        """How many rows of a tensor to read at a time: whole chunks, where they are not too large."""
        layer = tensor.path.rpartition("/")[0]
        array = self.arrays.get(tensor.path, self.arrays.get(f"{layer}/codes"))
        chunk = array.chunk_layout.read_chunk.shape[0 if tensor.layer is None else 1]
        row_bytes = self.dtype.itemsize * math.prod(tensor.shape[1:])
        rows = chunk * max(1, SLICE_BYTES // max(1, chunk * row_bytes))
        return max(1, min(rows, _MAX_SLICE_BYTES // row_bytes))

    def chunk_bytes(self) -> int:
        """Of the largest chunk that the weights are stored in, decoded."""
        return max(
            math.prod(array.chunk_layout.read_chunk.shape) * array.dtype.numpy_dtype.itemsize
            for array in self.arrays.values()
        )

    def check(self) -> None:
        """UserError where what is stored is not what was written, or not the base that adapters were trained on.

        Reads all of it, where that is known: not of a converted model, every chunk of which has its own checksum.
        """
        if self.adapted is not None:
            checkpoint.check_base(self.adapted.base, fingerprint_of(self.arrays, "checking the base"))
        elif checkpoint.has_digests(self.path, self.step):
            found = _sums(self.arrays, "checking the checkpoint").line_of_each("params/")
            checkpoint.check_lines(self.path, self.step, found)


def open_run(source: str, step: int | None = None) -> Run:
    """A checkpoint of a run folder, the newest by default; UserError if the folder has no such checkpoint."""
    newest = checkpoint.latest_step(source)
    if step is not None and step not in checkpoint.steps(source):
        listed = ", ".join(map(str, checkpoint.steps(source)))
        raise UserError(f"{source} has no checkpoint of step {step}: it has {listed}")
    return Run(source, newest if step is None else step)


@functools.cache
def _dequantizer(storage: Storage) -> Callable[[dict[str, np.ndarray]], jax.Array]:
    return jax.jit(lambda arrays: dequantize(arrays, storage, np.float32))


def fingerprint_of(arrays: dict[str, ts.TensorStore], title: str) -> str:
    """`model_fingerprint` of the weights in some arrays, which are read slice by slice."""
    return _sums(arrays, title).digest()


def _sums(arrays: dict[str, ts.TensorStore], title: str) -> Slices:
    sums = Slices({path: (tuple(array.shape), array.dtype.numpy_dtype) for path, array in arrays.items()})
    total = sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    done = 0
    with Console(title, total, unit="bytes") as console:
        for path, array in arrays.items():
            for index, first in _parts(array):
                values = array[index].read().result()
                sums.add(path, first, values)
                done += values.nbytes
                console.update(done, path, every_seconds=10)
    return sums


def _parts(array: ts.TensorStore) -> Iterator[tuple[tuple, int]]:
    """Places of consecutive parts of an array, and the index of their first element."""
    blocks = [()] if array.ndim < 3 else [(block,) for block in range(array.shape[0])]
    shape = array.shape[array.ndim - 2 :] if array.ndim > 1 else array.shape
    row = math.prod(shape[1:])
    rows = max(1, SLICE_BYTES // (row * array.dtype.numpy_dtype.itemsize))
    for number, block in enumerate(blocks):
        for first in range(0, shape[0], rows):
            yield (*block, slice(first, min(first + rows, shape[0]))), (number * shape[0] + first) * row

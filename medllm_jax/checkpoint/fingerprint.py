"""A hash of a model's weights, the same on every mesh."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from medllm_jax.distributed.sharding import path_of, replicated

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def model_fingerprint(params: Any) -> str:
    """sha256 (hex) over path, shape, dtype and a 64-bit checksum of every parameter.

    The checksums are made on the device, of integers, whose sums don't depend on their order: no weight travels to the
    host, and any sharding gives the same result.
    """
    return digest(lines_of(params))


def lines_of(params: Any) -> list[str]:
    """The lines that the fingerprint is the hash of: one for each parameter, in the order of the tree."""
    return [f"{line}\n" for line in line_of_each(params).values()]


def line_of_each(params: Any) -> dict[str, str]:
    """Path -> its path, dtype, shape and checksum in words, for each array of a tree, in its order."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    arrays = [leaf for _, leaf in leaves]
    sharding = getattr(arrays[0], "sharding", None)  # an array in host memory has none
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    everywhere = replicated(mesh) if isinstance(mesh, Mesh) else None
    sums = jax.device_get(_checksums(everywhere)(arrays))
    paths = (path_of(key_path) for key_path, _ in leaves)
    return {
        path: _line(path, leaf.dtype, leaf.shape, checksum)
        for path, leaf, checksum in zip(paths, arrays, sums, strict=True)
    }


def _line(path: str, dtype: np.dtype, shape: tuple[int, ...], checksum: np.ndarray) -> str:
    words = " ".join(f"{int(word):08x}" for word in checksum)
    return f"{path} {dtype.name} {shape} {words}"


class StreamedFingerprint:
    """The fingerprint of a model whose parameters are only ever seen in parts."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._shapes = dict(shapes)
        self._sums = {path: np.zeros(2, np.uint32) for path in shapes}

    def add(self, path: str, first: int, values: np.ndarray) -> None:
        """Consecutive elements of a parameter, in order; first: the index of the first of them."""
        offset = np.uint32(first % 2**32)
        self._sums[path] += np.asarray(_checksum_of_part(values, offset))  # modulo 2^32, like the sums of a whole array

    def line_of_each(self, below: str = "") -> dict[str, str]:
        """`line_of_each` of the model, once every element was added once; below: a prefix of its paths."""
        # The order is that of a tree of dictionaries.
        paths = sorted(self._shapes, key=lambda path: path.split("/"))
        return {f"{below}{p}": _line(f"{below}{p}", *self._shapes[p][::-1], self._sums[p]) for p in paths}

    def digest(self) -> str:
        """`model_fingerprint` of the model, once every element was added once."""
        return digest(f"{line}\n" for line in self.line_of_each().values())


def digest(lines: Iterable[str]) -> str:
    """The fingerprint of a model, from the lines of its parameters."""
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.cache
def _checksums(sharding: NamedSharding | None) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda arrays: list(map(_checksum, arrays)), out_shardings=sharding)


def _checksum(array: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """uint32 [2]: two sums, modulo 2^32, of the array's bits mixed with each element's own index, from `first` on."""
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for dimension, size in enumerate(array.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
    index = index + jnp.uint32(first)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2**31)])


_checksum_of_part = jax.jit(_checksum)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (32 bit): every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

"""A hash of a model's weights, the same on every mesh."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from medllm_jax.sharding import path_of, replicated

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def model_fingerprint(params: Any) -> str:
    """sha256 (hex) over path, shape, dtype and a 64-bit checksum of every parameter.

    The checksums are made on the device, of integers, whose sums don't depend on their order: no weight travels to the
    host, and any sharding gives the same result.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    arrays = [leaf for _, leaf in leaves]
    everywhere = replicated(arrays[0].sharding.mesh) if isinstance(arrays[0].sharding, NamedSharding) else None
    sums = jax.device_get(jax.jit(lambda arrays: list(map(_checksum, arrays)), out_shardings=everywhere)(arrays))
    digest = hashlib.sha256()
    for (key_path, leaf), checksum in zip(leaves, sums, strict=True):
        words = " ".join(f"{int(word):08x}" for word in checksum)
        digest.update(f"{path_of(key_path)} {leaf.dtype.name} {leaf.shape} {words}\n".encode())
    return digest.hexdigest()


def _checksum(array: jax.Array) -> jax.Array:
    """uint32 [2]: two sums, modulo 2^32, of the array's bits mixed with each element's own index."""
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for dimension, size in enumerate(array.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2**31)])


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (32 bit): every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

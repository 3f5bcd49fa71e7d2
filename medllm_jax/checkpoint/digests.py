"""Digests that a checkpoint carries of itself: Orbax reads a flipped byte of an array without noticing.

Its meta holds a line for each array (`fingerprint.line_of_each`) and a digest of the meta itself.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from medllm_jax.checkpoint.fingerprint import line_of_each
from medllm_jax.distributed.sharding import path_of


def seal(meta: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """The meta with digests of the arrays in `items` (item name -> tree) and of the meta itself."""
    return seal_meta(meta | {"digests": line_of_each(items)})


def seal_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta with a digest of itself."""
    return meta | {"digest": _digest(meta)}


def meta_is_intact(meta: dict[str, Any]) -> bool:
    """Whether a meta is what was sealed; True where it carries no digest."""
    return "digest" not in meta or meta["digest"] == _digest(meta)


def changed_arrays(items: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    """Paths of the arrays in `items` that differ from what was sealed.

    Skips arrays that were read in another dtype, and those that the meta has no digest of.
    """
    sealed = meta.get("digests", {})
    leaves = jax.tree_util.tree_leaves_with_path(items)
    known = {path_of(path): leaf for path, leaf in leaves if _same_dtype(sealed.get(path_of(path)), leaf)}
    return changed_lines(line_of_each(known), meta) if known else []


def changed_lines(found: Mapping[str, str], meta: dict[str, Any]) -> list[str]:
    """Paths whose line (`fingerprint.line_of_each`) differs from the sealed one."""
    sealed = meta.get("digests", {})
    return [path for path, line in found.items() if line != sealed.get(path)]


def missing_lines(paths: Iterable[str], meta: dict[str, Any], below: str) -> list[str]:
    """Paths of the arrays below a prefix that were sealed and are not among those that were found."""
    return sorted({path for path in meta.get("digests", {}) if path.startswith(below)} - set(paths))


def _digest(meta: dict[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _same_dtype(line: str | None, leaf: jax.Array) -> bool:
    return line is not None and line.split()[1] == leaf.dtype.name

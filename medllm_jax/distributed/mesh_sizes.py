"""Sizes of a mesh's axes, without devices: as users write them, as messages show them, and over a number of devices."""

import math
import re
from collections.abc import Mapping

from medllm_jax.config.schema import MeshConfig
from medllm_jax.errors import UserError, quoted


def parse_mesh_sizes(text: str, defaults: MeshConfig = MeshConfig()) -> MeshConfig:  # noqa: B008 (frozen)
    """Reads sizes such as ``fsdp=16,tensor=4``, the value of a --mesh option.

    Args:
      text: ``axis=size`` with commas between them; an axis may be left out, and one may be -1.
      defaults: the sizes of axes that are left out.

    Raises:
      UserError: the text is something else.
    """
    sizes = vars(defaults).copy()
    for entry in filter(None, text.split(",")):
        axis, _, size = entry.partition("=")
        if axis not in sizes or not re.fullmatch(r"-1|[1-9][0-9]{0,8}", size):
            raise UserError(
                f"--mesh {quoted(text, str)}: {quoted(entry)} is not the size of an axis ({', '.join(sizes)}); "
                "sizes of axes are expected, such as fsdp=16,tensor=4"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """``data=1, fsdp=16, tensor=4``: a mesh in messages and reports."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Axis -> size over so many devices, -1 resolved; UserError where the sizes don't multiply to that number."""
    sizes = vars(config)
    known = math.prod(size for size in sizes.values() if size != -1)
    resolved = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(resolved.values()) != devices:
        raise UserError(
            f"mesh {mesh_text(sizes)} does not divide {devices} devices: the sizes must multiply to that number"
        )
    return resolved

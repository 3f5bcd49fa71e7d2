"""Sizes of a mesh: what users write is read, and -1 is resolved as a run does it."""

import pytest

from medllm_jax.config.schema import MeshConfig
from medllm_jax.distributed.mesh_sizes import mesh_sizes, mesh_text, parse_mesh_sizes
from medllm_jax.errors import UserError


def test_sizes_are_read_and_the_others_stay():
    assert parse_mesh_sizes("") == MeshConfig()
    assert parse_mesh_sizes("fsdp=16,tensor=4") == MeshConfig(1, 16, 4)
    assert parse_mesh_sizes("tensor=4,data=-1", MeshConfig(1, 1, 1)) == MeshConfig(-1, 1, 4)


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=0", "fsdp=-2", "rows=2", "fsdp=2;tensor=2", "fsdp=two", "data=-1,fsdp=-1"]
)
def test_other_text_is_refused(text):
    with pytest.raises(UserError, match="sizes"):
        parse_mesh_sizes(text)


def test_what_is_left_goes_to_the_axis_of_minus_one():
    assert mesh_sizes(MeshConfig(2, -1, 4), 64) == {"data": 2, "fsdp": 8, "tensor": 4}
    for wrong in (MeshConfig(1, -1, 3), MeshConfig(1, 2, 4), MeshConfig(128, -1, 1)):
        with pytest.raises(UserError, match=f"mesh {mesh_text(vars(wrong))} does not divide 64 devices"):
            mesh_sizes(wrong, 64)

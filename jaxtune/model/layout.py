"""The sharding of activations on a mesh, by the names of their axes; does nothing if the model computes on one device.

The compiler would choose a layout by itself, but not always the intended one: gradients of weights that are sharded along their input make
it shard activations along their width, and every layer then moves all tokens between all devices.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")  # the mesh axes that hold different rows of a batch
# "groups" and "width": rows and columns as found by a lookup in a table sharded along its width, before each row is gathered
RULES = {
    "rows": ROWS, "groups": "data", "width": "fsdp", "tokens": "sequence",
    "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor",
}  # fmt: skip


def constrain(mesh: Mesh | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` sharded by one logical axis name (or None: whole) per dimension. A dimension that is not divisible stays whole."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(mesh, x.shape, axes)))


def partition(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of each dimension."""
    return PartitionSpec(*(RULES[axis] if axis and parts(mesh, size, axis) > 1 else None for size, axis in zip(shape, axes, strict=True)))


def parts(mesh: Mesh | None, size: int, axis: str) -> int:
    """The number of parts that a dimension of this logical axis is split into; 1 if it is not divisible."""
    if mesh is None or axis not in RULES:
        return 1
    name = RULES[axis]
    number = math.prod(mesh.shape[one] for one in ((name,) if isinstance(name, str) else name))
    return number if size % number == 0 else 1


def split(mesh: Mesh | None, *axes: str) -> bool:
    """Whether any of these mesh axes has more than one device."""
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in axes)


def each_part(function, mesh: Mesh, in_specs, out_specs, axes: frozenset[str]):
    """`function` on each device's part along `axes` of the mesh (the compiler handles the others): `jax.shard_map`."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)

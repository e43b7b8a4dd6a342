"""Where activations lie on a mesh, by the names of their axes; nothing where the model computes on one device.

The compiler would find a layout by itself, but not always the one that was meant: gradients of weights that are cut along their input
pull activations over to be cut along their width, and every layer then moves all tokens between all devices.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")  # the axes of the mesh that hold different rows of a batch
RULES = {"rows": ROWS, "tokens": "sequence", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def constrain(mesh: Mesh | None, x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by one logical axis name (or None: whole) per dimension. A dimension that does not divide stays whole."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(mesh, x.shape, axes)))


def partition(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of each dimension."""
    names = []
    for size, axis in zip(shape, axes, strict=True):
        name = RULES[axis] if axis else None
        parts = 1
        for one in (name,) if isinstance(name, str) else name or ():
            parts *= mesh.shape[one]
        names.append(name if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*names)

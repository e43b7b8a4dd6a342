"""Read tensors of a checkpoint straight onto a mesh: a process reads, casts and quantises only what its own devices will hold.

Quantising needs more than a device's own part in two cases. If blocks (or int8's rows) cross a shard boundary, the whole matrix is read.
Double quantisation has one mean for all scales of a matrix, so the processes exchange those: a 64th of the numbers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune import parallel
from jaxtune.convert.names import Cell
from jaxtune.convert.tensors import Checkpoint
from jaxtune.model import quant
from jaxtune.model.quant import NF4
from jaxtune.model.row import Row
from jaxtune.model.weight import Matrix, is_weight

Index = tuple[slice, ...]


class Shards:
    """Leaves of a parameter tree on `mesh`, one tensor at a time. All processes must request the same tensors in the same order."""

    def __init__(self, source: Checkpoint, mesh: Mesh, quantization: str | None = None):
        self.source, self.mesh, self.quantization = source, mesh, quantization

    def leaf(self, name: str, cell: Cell, row: Row, dtype: str) -> Matrix:
        """One tensor of a stack as a leaf on the mesh, in `dtype` or quantised."""
        kind = self.quantization if row.can_be_packed else None
        value, depth = self._open(name, cell), len(cell.index)
        shape = cell.shape[::-1] if cell.transposed else cell.shape
        matrix = parallel.sharding(self.mesh, cell.path, shape, row.axes[depth:])
        if kind is not None:
            return self._packed(value, shape, matrix, cell.path, row, dtype, kind)
        whole = value(None)
        if is_weight(whole):  # quantised in the file
            return parallel.place(whole, self.of_layer(whole, cell.path, row))
        return jax.make_array_from_callback(shape, matrix, _once(lambda index: value(index).astype(dtype)))

    def shardings(self, path: str, row: Row, shapes: Matrix) -> Any:
        """The sharding of a whole stack of leaves."""
        return parallel.leaf_shardings(self.mesh, path, row, shapes)

    def _open(self, name: str, cell: Cell) -> Callable[[Index | None], Any]:
        """`part(index)` of the tensor in the tree's orientation (`[out, in]`); `part(None)` is a leaf that is quantised in the file."""
        is_packed = getattr(self.source.entries[name], "packed", None)  # dequantised whole, and therefore only once
        partial = None if is_packed else getattr(self.source, "read_part", None)
        whole = None if partial else self.source.read(name)

        def part(index: Index | None) -> Any:
            if index is None:
                return whole
            if partial:
                return partial(name, index[::-1]).T if cell.transposed else partial(name, index)
            assert whole is not None
            return (whole.T if cell.transposed else whole)[index]

        return part

    def _packed(self, value, shape, matrix: NamedSharding, path: str, row: Row, dtype: str, kind: str) -> Matrix:
        code, _, nested = kind.partition("-")
        plain, own = quant.abstract(code, shape), quant.abstract(code, matrix.shard_shape(shape))
        shardings = self.of_layer(plain, path, row)
        alone = code != "int8" or matrix.shard_shape(shape)[1] == shape[1]  # its rows have one scale
        for whole, part, sharding in zip(*map(jax.tree.leaves, (plain, own, shardings)), strict=True):
            alone &= sharding.shard_shape(whole.shape) == part.shape
        if not alone:
            leaf = quant.quantize(jnp.asarray(value((slice(None), slice(None))).astype(dtype)), kind)
            return parallel.place(leaf, self.of_layer(leaf, path, row))
        pack = _once(lambda index: quant.quantize(jnp.asarray(value(index).astype(dtype)), code))
        leaf = _assemble(plain, shardings, {device: pack(index) for device, index in matrix.addressable_devices_indices_map(shape).items()})
        if not nested:
            return leaf
        assert isinstance(leaf, NF4)
        scales = quant.nest(leaf.replace(absmax=parallel.fetch(leaf.absmax)))
        return parallel.place(scales, self.of_layer(scales, path, row))

    def of_layer(self, leaf: Matrix, path: str, row: Row) -> Any:
        """The sharding of one leaf of a stack: the stack's, without the stacked axes."""
        depth = len(row.axes) - 2
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1,) * depth + x.shape, x.dtype), leaf)
        stacked = self.shardings(path, row, shapes)
        return jax.tree.map(lambda s: NamedSharding(self.mesh, PartitionSpec(*s.spec[depth:])), stacked)


def _once(function: Callable[[Index], Any]) -> Callable[[Index], Any]:
    """The function, called once per index: devices that hold copies share one read."""
    known: dict[tuple, Any] = {}

    def call(index: Index) -> Any:
        key = tuple((part.start, part.stop) for part in index)
        if key not in known:
            known[key] = function(index)
        return known[key]

    return call


def _assemble(shapes: Matrix, shardings: Matrix, parts: dict[Any, Matrix]) -> Matrix:
    """One leaf on the mesh from the devices' own parts."""
    arrays = []
    for number, (shape, sharding) in enumerate(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)):
        pieces = [jax.device_put(jax.tree.leaves(part)[number], device) for device, part in parts.items()]
        arrays.append(jax.make_array_from_single_device_arrays(shape.shape, sharding, pieces))
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)

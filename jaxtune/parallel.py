"""Devices: the mesh, and the sharding of every array on it, derived from the row table's logical axes.

The mesh has four axes: `data` (rows), `fsdp` (rows, and weights split along their input), `tensor` (weights split along heads and MLP) and
`sequence` (the tokens of a row). Devices of one process are neighbours on the mesh, along the last axes first.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.config import MeshConfig
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import ROWS
from jaxtune.model.quant import NF4, Int8
from jaxtune.model.spec import Row, spec
from jaxtune.model.weight import is_weight
from jaxtune.peft import kind_of
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.sites import adaptable, whole_rows
from jaxtune.tree import flatten, unflatten

AXES = ("data", "fsdp", "tensor", "sequence")
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "experts": None, "layers": None}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices (or those given); an axis of -1 takes the rest. ConfigError if the sizes do not multiply to their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        given = ", ".join(f"{axis}: {getattr(config, axis)}" for axis in AXES)
        raise ConfigError(f"mesh {{{given}}} does not multiply out to the {len(devices)} devices here; set one axis to -1, the rest")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def data_parallel(mesh: Mesh) -> int:
    """How many devices hold different rows."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, micro_batches: bool = True) -> NamedSharding:
    """Rows over `data` and `fsdp`: `[A, B, T]`, or `[B, T]`. (The model splits T over `sequence` where it matters.)"""
    return NamedSharding(mesh, PartitionSpec(*(None,) * micro_batches, ROWS))


def row_part(mesh: Mesh) -> tuple[int, int]:
    """`(part, parts)`: the part of a batch's rows that this process's devices hold, of how many equal parts.

    Processes that share the devices of one part (`tensor` or `sequence` over several hosts) hold the same rows.
    """
    groups = mesh.devices.reshape(data_parallel(mesh), -1)
    mine = [number for number, group in enumerate(groups) if any(d.process_index == jax.process_index() for d in group)]
    first, count = mine[0], len(mine)
    if mine != list(range(first, first + count)) or first % count or len(groups) % count:
        sizes = dict(mesh.shape)
        raise ConfigError(f"mesh {sizes} gives this process rows {mine} of {len(groups)}; choose tensor * sequence to divide its devices")
    return first // count, len(groups) // count


def put(batch: Any, mesh: Mesh, micro_batches: bool = True) -> Any:
    """A batch with this process's part of the rows (numpy) as arrays on the whole mesh."""
    sharding, (_, parts) = batch_sharding(mesh, micro_batches), row_part(mesh)

    def one(x: np.ndarray) -> jax.Array:
        shape = list(x.shape)
        shape[micro_batches] *= parts
        return jax.make_array_from_process_local_data(sharding, x, tuple(shape))

    return jax.tree.map(one, batch)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays where `shardings` says. Anything that is not a global array yet must be equal on every process, which keeps its own
    shards."""

    def one(x, sharding):
        if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
    """The tree as whole numpy arrays on every process; all processes must call it, in the same order."""

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x))

    return jax.tree.map(one, tree)


WHOLE = ("vocab",)  # axes that may stay whole if not divisible: vocabulary sizes are rarely round, and such models should work


def sharding(mesh: Mesh, path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], whole: tuple = WHOLE) -> NamedSharding:
    """Shard each dimension along its axis of the mesh; ConfigError if it is not divisible (axes in `whole` then stay whole)."""
    names = []
    for size, axis in zip(shape, axes, strict=True):
        name = RULES.get(axis) if axis else None
        if name and size % mesh.shape[name]:
            if axis not in whole:
                choices = ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == 0)
                raise ConfigError(f"mesh.{name} is {mesh.shape[name]}; {path} is {shape}, and {size} divides by {choices}; write one")
            name = None
        names.append(name)
    return NamedSharding(mesh, PartitionSpec(*names))


def param_shardings(mesh: Mesh, config: ModelConfig, params: dict) -> dict:
    """A sharding for every array of a parameter tree (or its shapes); quantised leaves are sharded like the matrix they stand for."""
    rows = spec(config)
    return unflatten({path: leaf_shardings(mesh, path, rows[path], leaf) for path, leaf in flatten(params).items()})


def leaf_shardings(mesh: Mesh, path: str, row: Row, leaf: Any) -> Any:
    """The shardings of one leaf (or its shapes), stacked as the row says."""
    if not is_weight(leaf):
        return sharding(mesh, path, leaf.shape, row.axes)
    whole = jax.tree.map(lambda _: replicated(mesh), leaf)
    if isinstance(leaf, Int8):
        absmax = sharding(mesh, path, leaf.absmax.shape, row.axes[:-1])
        return whole.replace(codes=sharding(mesh, path, leaf.codes.shape, row.axes), absmax=absmax)
    if isinstance(leaf, NF4) and leaf.codes.shape[-1] == leaf.shape[0]:  # blocks end with the rows, so both are sharded alike
        axes = (*row.axes[:-2], row.axes[-1], row.axes[-2])  # stored transposed
        absmax = sharding(mesh, path, leaf.absmax.shape, axes, whole=axes)  # small: whole if its blocks are not divisible
        return whole.replace(codes=sharding(mesh, path, leaf.codes.shape, axes), absmax=absmax)
    return whole


def trainable_shardings(mesh: Mesh, config: ModelConfig, trainable: Any) -> Any:
    """Shardings of what is trained: a full tree and whole modules like parameters, an adapter's arrays like the matrix they belong to."""
    if not isinstance(trainable, Adapter):
        return param_shardings(mesh, config, trainable)
    rows, kind = adaptable(config), kind_of(trainable.config)
    ranks = {site.path: max(site.ranks) for site in trainable.sites}

    def arrays(path: str, leaves: dict) -> dict:
        if path not in rows:  # virtual tokens: few, and the same for every device
            return {name: replicated(mesh) for name in leaves}
        *lead, out, width = rows[path].axes
        along = {"out": out, "in": width, None: None}
        parts = kind.parts(trainable.config, path, rows[path], ranks[path])
        axes = {name: [along[axis] for axis in part.axes] for name, part in parts.items()}
        return {name: sharding(mesh, f"{path}/{name}", leaf.shape, (*lead, *axes[name])) for name, leaf in leaves.items()}

    def saved(path: str, leaf: Any) -> NamedSharding:
        axes = whole_rows(config)[path].axes
        some = next(whole.numbers for whole in trainable.wholes if whole.path == path)
        return sharding(mesh, path, leaf.shape, axes if some is None else (None, *axes[1:]))

    params = {path: arrays(path, leaves) for path, leaves in trainable.params.items()}
    return trainable.replace(params=params, saved={path: saved(path, leaf) for path, leaf in trainable.saved.items()})


def like(trainable: Any, shardings: Any, tree: Any, default: NamedSharding) -> Any:
    """Shardings for a tree that contains copies of `trainable` (an optimiser's state): those of the parameter whose path the leaf's path
    ends with, if the leaf has its shape or a compatible part of it; `default` for the rest."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    known = {path: (leaf.shape, sharding) for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def alike(shape: tuple[int, ...], leaf: Any, sharding: NamedSharding) -> bool:
        """A copy, or one number per equal part of an axis (the scales of 8-bit moments), if it is divisible in the same places."""
        if leaf.shape == shape:
            return True
        if len(shape) != leaf.ndim or not all(part and whole % part == 0 for whole, part in zip(shape, leaf.shape, strict=True)):
            return False
        cuts = [math.prod(sharding.mesh.shape[name] for name in _names(axis)) for axis in sharding.spec]
        return all(part % cut == 0 for part, cut in zip(leaf.shape, cuts, strict=False))

    def find(path, leaf):
        found = next((known[path[i:]] for i in range(len(path)) if path[i:] in known), None)
        return found[1] if found and alike(found[0], leaf, found[1]) else default

    return jax.tree_util.tree_map_with_path(find, tree)


def state_shardings(mesh: Mesh, state: Any, trainable: Any, own: Any, zero_stage: int = 0) -> Any:
    """Shardings of a `TrainState` (its shapes): copies of `trainable` like it (`own`), the rest on every device.

    `zero_stage` 1: the optimiser's copies are sharded over `data` as well (ZeRO-1, arXiv 1910.02054): each device updates its part of the
    parameters, which are then gathered.
    """
    shardings = like(trainable, own, state, replicated(mesh))
    if zero_stage:
        shardings = shardings.replace(opt_state=jax.tree.map(_over_data, shardings.opt_state, state.opt_state))
    return shardings


def _names(axis: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return axis if isinstance(axis, tuple) else (axis,) if axis else ()


def _over_data(where: NamedSharding, leaf: Any) -> NamedSharding:
    """Also shard the first divisible dimension over `data`; a leaf without one is unchanged."""
    mesh, spec = where.mesh, list(where.spec) + [None] * (leaf.ndim - len(where.spec))
    for number, size in enumerate(leaf.shape):
        names = _names(spec[number])
        if size % math.prod(mesh.shape[name] for name in (*names, "data")) == 0:
            spec[number] = (*names, "data")
            return NamedSharding(mesh, PartitionSpec(*spec))
    return where

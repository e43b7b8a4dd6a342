"""A stack of equal layers, one after the other, and what its backward pass keeps of them.

Where layers are computed again, the backward pass is written here, not derived: it goes through groups of layers, last first, from the
input of each group (Chen et al., arXiv 1604.06174), makes the inputs of its layers again, then each layer itself. A layer's weights are
cut out of the stack where they are used, and only gradients that somebody asked for take memory. With an `Update` none do: the optimiser's
step is then part of the backward pass.

| remat     | kept                                        | computed again                            |
|-----------|---------------------------------------------|-------------------------------------------|
| `none`    | all that autodiff keeps                     |                                           |
| `dots`    | products and attention                      | the rest                                  |
| `full`    | each layer's input                          | each layer                                |
| `offload` | each layer's input, in the host's memory    | each layer                                |
| `groups`  | the inputs of about sqrt(L) groups          | each layer, and all but a group's last one twice |
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxtune.model import nf4_kernel
from jaxtune.model.attention import Keys
from jaxtune.model.block import RECOMPUTED, Place, block
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain, split
from jaxtune.model.quant import NF4, Int8
from jaxtune.model.spec import spec


class Shared(NamedTuple):
    """What all layers work with: rotations `[R, B, T, h / 2]` and the tokens' places."""

    cos: jax.Array
    sin: jax.Array
    queries: Keys
    keys: Keys


class Update(struct.PyTreeNode):
    """The optimiser's step of a stack's layers, taken in the backward pass as soon as a layer's gradient is there; beside the layers'
    weights as `weights["update"]`, if all of them are trained and their backward pass is the one written here.

    weights  references (`jax.new_ref`) to the stack's weights `[L, ...]` by name, which the backward pass leaves as they are after the step
    state    references to the optimiser's state of these layers, `[L, ...]`, and values that are not of one layer
    square   reference to float32 []; the sum of squares of the gradients is added
    apply    `(weights, grads, state) -> (weights, state)` of one layer, `[1, ...]`
    taken    one more entry for each backward pass that is traced; there may be one
    """

    weights: dict
    state: Any
    square: Any
    apply: Callable = struct.field(pytree_node=False)
    taken: list = struct.field(pytree_node=False)


def run(config: ModelConfig, stack: int, weights: dict, x_BTD: jax.Array, shared: Shared, kv):
    """`x_BTD` after all layers of that stack, the cache's (k, v), and the sums of its routers (None without experts)."""
    sums: Any  # the routers' of each layer
    if kv is None and config.remat in RECOMPUTED:
        weights = dict(weights)
        x_BTD, sums = _recomputed(config, stack, weights, x_BTD, shared, weights.pop("update", None))
    else:

        weights, whole = _opened(config, stack, weights)

        def layer(carry, scanned):
            number, w = scanned
            x_BTD, kv, sums = one_layer(config, stack, number, whole(w, number), carry[0], shared, carry[1])
            return (x_BTD, kv), sums

        if config.remat == "dots":
            kept = jax.checkpoint_policies.save_only_these_names("linear", "attention")
            layer = jax.checkpoint(layer, policy=kept, prevent_cse=False)  # a scan cannot be CSE'd across
        (x_BTD, kv), sums = jax.lax.scan(layer, (x_BTD, kv), (jnp.arange(len(config.stacks[stack])), weights))
    return x_BTD, kv, jax.tree.map(lambda x: x.sum(0), sums)


def one_layer(config: ModelConfig, stack: int, number: jax.Array, w, x_BTD: jax.Array, shared: Shared, kv=None):
    """`x_BTD` after layer `number` of the stack, whose weights are `w`; the cache's (k, v) and its router's sums."""
    layers = config.stacks[stack]
    rope = jnp.asarray([config.layer_ropes[i] % (len(config.ropes) + 1) for i in layers])[number]
    window = jnp.asarray([config.layer_windows[i] for i in layers])[number]
    place = Place(shared.cos[rope], shared.sin[rope], window, shared.queries, shared.keys, jnp.asarray(layers)[number])
    x_BTD, kv, sums = block(config, w, x_BTD, place, kv)
    return constrain(config.mesh, x_BTD, "rows", "tokens", None), kv, sums


# ---- a layer's weights ----


class _Layer(Mapping):
    """One layer's weights by name, each cut out of the stack where it is asked for: cut ahead of a checkpoint, they would be kept for it.

    `own`: leaves that come from elsewhere (those that a gradient is taken of), by their path in `weights`, such as `q` or `q/a`.
    """

    def __init__(self, config: ModelConfig, stack: int, weights: dict, number: jax.Array, own: dict[str, jax.Array] | None = None):
        self.config, self.stack, self.weights, self.number, self.own = config, stack, weights, number, own or {}

    def __getitem__(self, name: str):
        stacked, whole = _opened(self.config, self.stack, {name: self.weights[name]})

        def cut(path, leaf):
            own = self.own.get(_name(path))
            return _cut(leaf, self.number) if own is None else own

        return whole(jax.tree_util.tree_map_with_path(cut, stacked), self.number)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _cut(leaf: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False, allow_negative_indices=False)


def _opened(config: ModelConfig, stack: int, weights: dict):
    """What to cut layers out of, and `whole(layer, number)`, which makes a layer's weights of what was cut: packed matrices come together
    over the mesh, and the kernel takes 4-bit ones from their stack.

    The kernel only in a step, which knows on which devices the arguments are: a kernel is not cut over them by itself."""
    if config.quantization_kernel == "xla" or config.mesh is None or split(config.mesh, "tensor"):
        return weights, lambda layer, number: _brought(config, stack, layer)
    weights, put = nf4_kernel.hold(weights, config.mesh)
    return weights, lambda layer, number: put(_brought(config, stack, layer), number)


def _brought(config: ModelConfig, stack: int, layer: dict) -> dict:
    """A layer's packed matrices, brought together over `fsdp` as they are packed: left to itself, the compiler unpacks them first and
    moves eight times the bytes."""
    if config.mesh is None:
        return layer
    axes = {path.removeprefix(f"layers/{stack}/"): row.axes for path, row in spec(config).items()}

    def bring(name: str, leaf):
        if not isinstance(leaf, NF4 | Int8) or (isinstance(leaf, NF4) and leaf.absmax.shape[-1] != leaf.shape[0]):
            return leaf
        names = [axis if axis != "embed" else None for axis in axes[name][1:]]
        if isinstance(leaf, NF4):  # packed the other way round
            names[-2:] = names[:-3:-1]
        fields = {"codes": leaf.codes, "absmax": leaf.absmax}
        return leaf.replace(**{name: constrain(config.mesh, x, *names[: x.ndim]) for name, x in fields.items() if x is not None})

    return {
        name: jax.tree.map(lambda leaf, name=name: bring(name, leaf), leaf, is_leaf=lambda leaf: isinstance(leaf, NF4 | Int8))
        for name, leaf in layer.items()
    }


# ---- layers that the backward pass computes again ----


class _Kept(struct.PyTreeNode):
    """What the backward pass starts from: `inputs[part]` are the inputs of the groups of `groups`, `[groups, B, T, D]`."""

    weights: dict
    shared: Shared
    inputs: list[jax.Array]
    update: Update | None
    trained: tuple[bool, ...] = struct.field(pytree_node=False)  # by leaf of `weights`


def groups(config: ModelConfig, stack: int) -> list[tuple[int, int, int]]:
    """`(first layer, number of groups, layers of a group)`: groups of one size, and a smaller one where they do not divide the stack."""
    L = len(config.stacks[stack])
    size = 1
    if config.remat == "groups":  # fewest inputs at one time; groups that differ are compiled twice
        size = min(range(1, L + 1), key=lambda size: (-(-L // size) + size + (L % size > 0), size))
    parts = [(0, L // size, size)]
    return parts if L % size == 0 else [*parts, (L - L % size, 1, L % size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(config, stack, weights, x_BTD, shared, update):
    def layer(x_BTD, number):
        x_BTD, _, sums = one_layer(config, stack, number, _Layer(config, stack, weights, number), x_BTD, shared)
        return x_BTD, sums

    return jax.lax.scan(layer, x_BTD, jnp.arange(len(config.stacks[stack])))


def _recomputed_fwd(config, stack, weights, x_BTD, shared, update):
    trained = tuple(leaf.perturbed for leaf in jax.tree.leaves(weights))
    assert not any(leaf.perturbed for leaf in jax.tree.leaves(shared)), "places have no gradient"
    assert update is None or not any(trained), "gradients and an update of the same weights"
    weights, x_BTD, shared, update = jax.tree.map(lambda primal: primal.value, (weights, x_BTD, shared, update))

    def layer(x_BTD, number):
        x_BTD, _, sums = one_layer(config, stack, number, _Layer(config, stack, weights, number), x_BTD, shared)
        return x_BTD, sums

    def group(x_BTD, numbers):
        after, sums = jax.lax.scan(layer, x_BTD, numbers) if numbers.shape[0] > 1 else _single(layer, x_BTD, numbers)
        kept = jax.device_put(x_BTD, jax.memory.Space.Host) if config.remat == "offload" else x_BTD
        return after, (kept, sums)

    inputs, sums = [], []
    for part in groups(config, stack):
        x_BTD, (kept, of_part) = jax.lax.scan(group, x_BTD, _numbers(*part))
        inputs.append(kept)
        sums.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_part))
    return (x_BTD, jax.tree.map(lambda *x: jnp.concatenate(x), *sums)), _Kept(weights, shared, inputs, update, trained)


def _recomputed_bwd(config, stack, kept: _Kept, cotangents):
    dx_BTD, dsums = jax.tree.map(_number, cotangents, is_leaf=_is_zero)
    leaves, tree = jax.tree_util.tree_flatten_with_path(kept.weights)
    trained = {_name(path): leaf for (path, leaf), yes in zip(leaves, kept.trained, strict=True) if yes}
    found = _Gradients(trained) if kept.update is None else _Updates(kept.update)

    def forward(x_BTD, number, own=None):
        w = _Layer(config, stack, kept.weights, number, own)
        x_BTD, _, sums = one_layer(config, stack, number, w, x_BTD, kept.shared)
        return x_BTD, sums

    def layer(carry, scanned):
        (dx_BTD, so_far), (number, x_BTD, dsums) = carry, scanned

        def of(x_BTD, own):
            return forward(x_BTD, number, own)

        # under a checkpoint, whose own backward pass leaves out what no gradient needs; the result itself is dropped here
        _, pull = jax.vjp(jax.checkpoint(of, prevent_cse=False), x_BTD, found.weights(number))
        dx_BTD, own = pull((dx_BTD, dsums))
        return (dx_BTD, found.add(so_far, number, own)), None

    def group(carry, scanned):
        numbers, x_BTD, dsums = scanned
        x_BTD = jax.device_put(x_BTD, jax.memory.Space.Device) if config.remat == "offload" else x_BTD
        if numbers.shape[0] == 1:
            return _single(layer, carry, (numbers, x_BTD[None], dsums))
        inputs = jnp.zeros((numbers.shape[0], *x_BTD.shape), x_BTD.dtype).at[0].set(x_BTD)

        def again(i, inputs):
            return inputs.at[i + 1].set(forward(inputs[i], numbers[i], found.weights(numbers[i]))[0])

        inputs = jax.lax.fori_loop(0, numbers.shape[0] - 1, again, inputs)
        return jax.lax.scan(layer, carry, (numbers, inputs, dsums), reverse=True)[0], None

    carry: Any = (dx_BTD, found.none())
    for (first, number, size), inputs in reversed(list(zip(groups(config, stack), kept.inputs, strict=True))):

        def by_group(x, first=first, number=number, size=size):
            return x[first : first + number * size].reshape(number, size, *x.shape[1:])

        scanned = _numbers(first, number, size), inputs, jax.tree.map(by_group, dsums)
        carry, _ = jax.lax.scan(group, carry, scanned, reverse=True)
    dx_BTD, grads = carry
    return tree.unflatten([grads.get(_name(path)) for path, _ in leaves]), dx_BTD, None, None


class _Gradients:
    """What the backward pass gathers of a stack's weights, by path: their gradients."""

    def __init__(self, trained: dict[str, jax.Array]):
        self.trained = trained

    def none(self):
        return jax.tree.map(jnp.zeros_like, self.trained)

    def weights(self, number):
        """A layer's own."""
        return {path: _cut(leaf, number) for path, leaf in self.trained.items()}

    def add(self, so_far, number, own):
        return {path: grad.at[number].set(own[path]) for path, grad in so_far.items()}


class _Updates(_Gradients):
    """Or nothing: what an `Update` refers to is changed instead."""

    def __init__(self, update: Update):
        super().__init__({})
        self.update = update
        update.taken.append(self)

    def weights(self, number):
        return {name: ref[number] for name, ref in self.update.weights.items()}

    def add(self, so_far, number, own):
        refs = self.update.weights, self.update.state
        weights, state = jax.tree.map(lambda leaf: leaf[number][None] if is_ref(leaf) else leaf, refs)
        grads = {name: grad[None] for name, grad in own.items()}
        new = self.update.apply(weights, grads, state)
        for leaf, after in zip(jax.tree.leaves(refs), jax.tree.leaves(new), strict=True):
            if is_ref(leaf):
                leaf[number] = after[0]
        self.update.square[...] += sum(jnp.square(grad.astype(jnp.float32)).sum() for grad in grads.values())
        return so_far


def is_ref(leaf) -> bool:
    """Whether a leaf is a reference, not an array."""
    return isinstance(jax.typeof(leaf), jax.ref.AbstractRef)


_recomputed.defvjp(_recomputed_fwd, _recomputed_bwd, symbolic_zeros=True)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _number(cotangent) -> jax.Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


def _numbers(first: int, number: int, size: int) -> jax.Array:
    """Layers of the groups, `[groups, size]`."""
    return first + jnp.arange(number * size).reshape(number, size)


def _single(function, carry, xs):
    """`lax.scan` of one step, without a loop."""
    carry, out = function(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)

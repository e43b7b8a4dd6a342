"""Stacks of identical layers, applied one after the other, and what their backward pass keeps.

The stacks of one pattern (`ModelConfig.patterns`) are processed in units, which contain some layers of each; usually there is one stack,
whose units are single layers.

If layers are recomputed, the backward pass is written here instead of derived by autodiff: it goes through groups of layers, last first,
from the input of each group (Chen et al., arXiv 1604.06174), computes the inputs of its layers again, then each layer itself. A layer's
weights are cut out of the stack where they are used, and only requested gradients take memory. With an `Update` none do: the optimiser's
step is then part of the backward pass.

| remat     | kept                                        | computed again                            |
|-----------|---------------------------------------------|-------------------------------------------|
| `none`    | all that autodiff keeps                     |                                           |
| `dots`    | products and attention                      | the rest                                  |
| `full`    | each layer's input                          | each layer                                |
| `offload` | each layer's input, in host memory          | each layer                                |
| `groups`  | the inputs of about sqrt(L) groups of units | each layer, and all but a group's last one twice |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxtune.model.block import RECOMPUTED
from jaxtune.model.families import ModelConfig, Pattern
from jaxtune.model.layer import Layer, Shared, cut, name_of, one_layer, opened


class Update(struct.PyTreeNode):
    """The optimiser's step for a stack's layers, applied in the backward pass as soon as a layer's gradient is known. It is stored beside
    the layers' weights as `weights["update"]`, if all of them are trained and their backward pass is the one written here.

    weights  references (`jax.new_ref`) to the stack's weights `[L, ...]` by name, which the backward pass updates
    state    references to the optimiser's state of these layers, `[L, ...]`, and values that belong to no layer
    square   reference to float32 []; the sum of squares of the gradients is added
    apply    `(weights, grads, state) -> (weights, state)` for one layer, `[1, ...]`
    taken    gets one entry for each backward pass that is traced; only one is allowed
    """

    weights: dict
    state: Any
    square: Any
    apply: Callable = struct.field(pytree_node=False)
    taken: list = struct.field(pytree_node=False)


def run(config: ModelConfig, pattern: Pattern, weights: list[dict], x_BTD: jax.Array, shared: Shared, kv):
    """`x_BTD` after all layers of a pattern, the cache's memory, and for each stack the sums of its routers (None without experts).
    `weights`: of each stack."""
    sums: Any  # the routers' sums of each layer
    if kv is None and config.remat in RECOMPUTED:
        weights = [dict(own) for own in weights]
        x_BTD, sums = _recomputed(config, pattern, weights, x_BTD, shared, [own.pop("update", None) for own in weights])
        sums = jax.tree.map(lambda x: x.sum(1), sums)
    else:
        stacked = [opened(config, stack, own) for stack, own in zip(pattern.numbers, weights, strict=True)]

        def unit(carry, scanned):
            number, weights = scanned
            sums = []
            for stack, times, own, (_, whole) in zip(pattern.numbers, pattern.times, weights, stacked, strict=True):

                def layer(carry, scanned, stack=stack, whole=whole):
                    number, w = scanned
                    x_BTD, kv, sums = one_layer(config, stack, number, whole(w, number), carry[0], shared, carry[1])
                    return (x_BTD, kv), sums

                if config.remat == "dots":
                    kept = jax.checkpoint_policies.save_only_these_names("linear", "attention")
                    # common subexpressions cannot be eliminated across a scan
                    layer = jax.checkpoint(layer, policy=kept, prevent_cse=False)
                # weights enter whole: of a slice, autodiff would keep a copy for each layer
                carry, of_stack = layer(carry, (number, own)) if times == 1 else jax.lax.scan(layer, carry, (_layers(number, times), own))
                sums.append(of_stack if times == 1 else jax.tree.map(lambda x: x.sum(0), of_stack))
            return carry, sums

        def by_unit(own: dict, times: int) -> dict:
            return own if times == 1 else jax.tree.map(lambda x: x.reshape(pattern.units, times, *x.shape[1:]), own)

        scanned = [by_unit(own, times) for (own, _), times in zip(stacked, pattern.times, strict=True)]
        (x_BTD, kv), sums = jax.lax.scan(unit, (x_BTD, kv), (jnp.arange(pattern.units), scanned))
    return x_BTD, kv, jax.tree.map(lambda x: x.sum(0), sums)


# ---- layers that the backward pass computes again ----


class _Kept(struct.PyTreeNode):
    """What the backward pass starts from. `inputs[i]` are those of the groups in `groups`: for groups of one unit the inputs of its layers,
    `[groups, times, B, T, D]` for each stack, otherwise the first one, `[groups, B, T, D]`."""

    weights: list[dict]
    shared: Shared
    inputs: list[Any]
    updates: list[Update | None]
    trained: tuple[tuple[bool, ...], ...] = struct.field(pytree_node=False)  # by stack, by leaf of its weights


def groups(config: ModelConfig, pattern: Pattern) -> list[tuple[int, int, int]]:
    """`(first unit, number of groups, units per group)`: groups of one size, and a smaller one if it does not divide the number of units.
    """
    units, layers, size = pattern.units, sum(pattern.times), 1
    if config.remat == "groups":  # fewest inputs at a time; groups of different sizes are compiled separately

        def inputs(size: int) -> int:
            return -(-units // size) * (layers if size == 1 else 1) + size * layers + (units % size > 0)

        size = min(range(1, units + 1), key=lambda size: (inputs(size), size))
    parts = [(0, units // size, size)]
    return parts if units % size == 0 else [*parts, (units - units % size, 1, units % size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(config, pattern, weights, x_BTD, shared, updates):
    def unit(x_BTD, number):
        x_BTD, _, sums = _unit(config, pattern, _plain(config, pattern, weights), number, x_BTD, shared, keep=False)
        return x_BTD, sums

    return jax.lax.scan(unit, x_BTD, jnp.arange(pattern.units))


def _plain(config, pattern, weights):
    """A layer's weights by its place in the pattern and its number in its stack."""
    return lambda place, number: Layer(config, pattern.first + place, weights[place], number)


def _unit(config, pattern, layer_of: Callable, number, x_BTD, shared, keep: bool):
    """`x_BTD` after a unit; for each stack its layers' inputs (None unless they are kept) and their routers' sums, `[times, ...]`."""
    inputs, sums = [], []
    for place, times in enumerate(pattern.times):

        def layer(x_BTD, number, place=place):
            after, _, sums = one_layer(config, pattern.first + place, number, layer_of(place, number), x_BTD, shared)
            return after, (x_BTD if keep else None, sums)

        x_BTD, number = _after(pattern, x_BTD, number)
        x_BTD, (before, of_stack) = _scan(layer, x_BTD, _layers(number, times))
        inputs.append(before)
        sums.append(of_stack)
    return x_BTD, inputs, sums


def _after(pattern: Pattern, x_BTD, number):
    """The number, available only after `x_BTD`: otherwise the layers of a unit, whose weights it selects, would all begin at once."""
    return (x_BTD, number) if len(pattern.stacks) == 1 else jax.lax.optimization_barrier((x_BTD, number))


def _recomputed_fwd(config, pattern, weights, x_BTD, shared, updates):
    trained = tuple(tuple(leaf.perturbed for leaf in jax.tree.leaves(own)) for own in weights)
    assert not any(leaf.perturbed for leaf in jax.tree.leaves(shared)), "places have no gradient"
    assert not any(update and any(own) for update, own in zip(updates, trained, strict=True)), "gradients and an update of the same weights"
    weights, x_BTD, shared, updates = jax.tree.map(lambda primal: primal.value, (weights, x_BTD, shared, updates))

    def unit(x_BTD, number, keep=False):
        after, inputs, sums = _unit(config, pattern, _plain(config, pattern, weights), number, x_BTD, shared, keep)
        return after, (inputs, sums)

    def group(x_BTD, numbers):
        if numbers.shape[0] == 1:
            after, (kept, sums) = unit(x_BTD, numbers[0], keep=True)
            sums = jax.tree.map(lambda x: x[None], sums)
        else:
            after, (_, sums) = jax.lax.scan(unit, x_BTD, numbers)
            kept = x_BTD
        kept = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), kept) if config.remat == "offload" else kept
        return after, (kept, sums)

    inputs, sums = [], []
    for own in groups(config, pattern):
        x_BTD, (kept, of_group) = jax.lax.scan(group, x_BTD, _numbers(*own))
        inputs.append(kept)
        sums.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_group))
    return (x_BTD, jax.tree.map(lambda *x: jnp.concatenate(x), *sums)), _Kept(weights, shared, inputs, updates, trained)


def _recomputed_bwd(config, pattern, kept: _Kept, cotangents):
    dx_BTD, dsums = jax.tree.map(_number, cotangents, is_leaf=_is_zero)
    found = [_found(*own) for own in zip(kept.weights, kept.trained, kept.updates, strict=True)]

    def layer_of(place, number, own=None):
        own = found[place].weights(number) if own is None else own
        return Layer(config, pattern.first + place, kept.weights[place], number, own)

    def layer(place, carry, scanned):
        (dx_BTD, so_far), (number, x_BTD, dsums) = carry, scanned

        def of(x_BTD, own):
            x_BTD, _, sums = one_layer(config, pattern.first + place, number, layer_of(place, number, own), x_BTD, kept.shared)
            return x_BTD, sums

        # under a checkpoint, whose own backward pass skips what no gradient needs; the result itself is discarded here
        _, pull = jax.vjp(jax.checkpoint(of, prevent_cse=False), x_BTD, found[place].weights(number))
        dx_BTD, own = pull((dx_BTD, dsums))
        return (dx_BTD, found[place].add(so_far, number, own)), None

    def unit(carry, scanned):
        (dx_BTD, so_far), (number, inputs, dsums) = carry, scanned
        so_far = list(so_far)
        for place, times in reversed(list(enumerate(pattern.times))):
            dx_BTD, number = _after(pattern, dx_BTD, number)
            layers = _layers(number, times), inputs[place], dsums[place]
            (dx_BTD, so_far[place]), _ = _scan(functools.partial(layer, place), (dx_BTD, so_far[place]), layers, reverse=True)
        return (dx_BTD, so_far), None

    def group(carry, scanned):
        numbers, inputs, dsums = scanned
        inputs = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), inputs) if config.remat == "offload" else inputs
        if (size := numbers.shape[0]) == 1:
            return _scan(unit, carry, (numbers, jax.tree.map(lambda x: x[None], inputs), dsums))

        def again(i, carry):
            x_BTD, inputs = carry
            x_BTD, own, _ = _unit(config, pattern, layer_of, numbers[i], x_BTD, kept.shared, keep=True)
            return x_BTD, [whole.at[i].set(x) for whole, x in zip(inputs, own, strict=True)]

        inputs = inputs, [jnp.zeros((size, times, *inputs.shape), inputs.dtype) for times in pattern.times]
        _, inputs = again(size - 1, jax.lax.fori_loop(0, size - 1, again, inputs))  # the result of the last layer is not needed
        return jax.lax.scan(unit, carry, (numbers, inputs, dsums), reverse=True)[0], None

    carry: Any = (dx_BTD, [own.none() for own in found])
    for (first, number, size), inputs in reversed(list(zip(groups(config, pattern), kept.inputs, strict=True))):

        def by_group(x, first=first, number=number, size=size):
            return x[first : first + number * size].reshape(number, size, *x.shape[1:])

        scanned = _numbers(first, number, size), inputs, jax.tree.map(by_group, dsums)
        carry, _ = jax.lax.scan(group, carry, scanned, reverse=True)
    dx_BTD, grads = carry

    def gradients(own: dict, found: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: found.get(name_of(path)), own)

    return [gradients(*of_stack) for of_stack in zip(kept.weights, grads, strict=True)], dx_BTD, None, None


def _found(weights: dict, trained: tuple[bool, ...], update: Update | None) -> "_Gradients":
    """What the backward pass collects for a stack."""
    if update is not None:
        return _Updates(update)
    leaves = zip(jax.tree_util.tree_flatten_with_path(weights)[0], trained, strict=True)
    return _Gradients({name_of(path): leaf for (path, leaf), yes in leaves if yes})


class _Gradients:
    """What the backward pass collects for a stack's weights, by path: their gradients."""

    def __init__(self, trained: dict[str, jax.Array]):
        self.trained = trained

    def none(self):
        return jax.tree.map(jnp.zeros_like, self.trained)

    def weights(self, number):
        """A layer's own."""
        return {path: cut(leaf, number) for path, leaf in self.trained.items()}

    def add(self, so_far, number, own):
        return {path: grad.at[number].set(own[path]) for path, grad in so_far.items()}


class _Updates(_Gradients):
    """Or nothing: the references of an `Update` are changed instead."""

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


def _layers(unit: jax.Array, times: int) -> jax.Array:
    """Numbers of a unit's layers in their stack, `[times]`."""
    return unit * times + jnp.arange(times)


def _scan(function, carry, xs, reverse: bool = False):
    """`lax.scan`, without a loop if there is one step."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(function, carry, xs, reverse=reverse)
    carry, out = function(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)

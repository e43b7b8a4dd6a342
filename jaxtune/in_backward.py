"""Full tuning with optimiser steps inside the backward pass (`optimizer_in_bwd`; LOMO, arXiv 2306.09782, for any optimiser): a layer is
updated as soon as its gradient is known, so only one layer's gradients exist at a time.

The numbers equal those of the ordinary step. Whatever needs all gradients at once (clipping by their norm, sums over micro-batches,
skipping a bad step) is refused: config/checks.py. Layers are updated from last to first, then everything outside the layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.model.stack import Update, is_ref


def update(total: Callable, trainable: dict, opt_state: Any, optimizer: optax.GradientTransformation):
    """`(trainable, opt_state, loss, grad_norm)` after a step of `total(trainable) -> (sum, Loss)`, which runs the model once."""
    rest, stacks = _without_layers(trainable), trainable["layers"]
    updates = {stack: _update(optimizer, stack, weights, opt_state) for stack, weights in stacks.items()}
    layers = {stack: weights | {"update": updates[stack]} for stack, weights in stacks.items()}
    _, pull, loss = jax.vjp(lambda rest: total(rest | {"layers": layers}), rest, has_aux=True)
    (grads,) = pull(1 / loss.weight)
    assert all(len(one.taken) == 1 for one in updates.values()), "an objective that runs the model more than once takes several steps"
    changes, state = optimizer.update(grads, _part(opt_state, _without_layers), rest)
    rest: Any = optax.apply_updates(rest, changes)
    done = jax.tree.map(lambda leaf: jax.freeze(leaf) if is_ref(leaf) else leaf, updates)
    trainable = rest | {"layers": {stack: one.weights for stack, one in done.items()}}
    norm = jnp.sqrt(sum(one.square for one in done.values()) + optax.tree.norm(grads, squared=True))
    return trainable, _whole(state, [one.state for one in done.values()]), loss, norm


def _update(optimizer: optax.GradientTransformation, stack: str, weights: dict, opt_state: Any) -> Update:
    """The optimiser's step for one stack."""
    state = _part(opt_state, lambda tree: {"layers": {stack: tree["layers"][stack]}})
    layers = next(iter(weights.values())).shape[0]

    def apply(weights, grads, state):
        weights, grads = {"layers": {stack: weights}}, {"layers": {stack: grads}}
        changes, state = optimizer.update(grads, state, weights)
        new: Any = optax.apply_updates(weights, changes)
        return new["layers"][stack], state

    refs = jax.tree.map(lambda leaf: jax.new_ref(leaf) if leaf.shape[:1] == (layers,) else leaf, (weights, state))
    return Update(weights=refs[0], state=refs[1], square=jax.new_ref(jnp.zeros((), jnp.float32)), apply=apply, taken=[])


# ---- parts of an optimiser's state, wherever it holds trees like the parameters ----


def _like_params(node: Any) -> bool:
    return isinstance(node, dict) and "layers" in node


def _without_layers(tree: dict) -> dict:
    return {name: leaf for name, leaf in tree.items() if name != "layers"}


def _part(state: Any, pick: Callable[[dict], dict]) -> Any:
    """The state of some of the parameters, with whatever belongs to no parameter (the step count)."""
    return jax.tree.map(lambda node: pick(node) if _like_params(node) else node, state, is_leaf=_like_params)


def _whole(rest: Any, of_stacks: list) -> Any:
    """The inverse: the state of all parameters; whatever belongs to no parameter is taken from `rest`."""
    first, *others = of_stacks

    def join(one, rest, *more):
        if not _like_params(one):
            return rest
        return rest | {"layers": {stack: leaf for tree in (one, *more) for stack, leaf in tree["layers"].items()}}

    return jax.tree.map(join, first, rest, *others, is_leaf=_like_params)

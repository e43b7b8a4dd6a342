"""Optimiser moments in 8 bits: block-wise dynamic quantisation, as in bitsandbytes' 8-bit optimisers (arXiv 2110.02861).

    core = in_8_bits(optax.scale_by_adam(...), layers)      # the same updates, from moments of one byte per number

A block of 256 numbers of one parameter has one float32 `absmax`; each number is stored as the nearest of 256 levels times it. The levels
are bitsandbytes' dynamic map, seven decades with twice as many levels in each as in the one below:

    level(i, k) = 10^(i - 6) (0.1 + 0.9 (k + 1/2) / n),   0 <= k < n = 2^i (signed) or 2^(i + 1) (unsigned),   i = 0..6;   0;   1

Codes number them in ascending order, so 0 is code 127 of the signed map and code 0 of the unsigned one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLOCK = 256
SMALLEST = 4096  # numbers per parameter; smaller moments stay float32, as in bitsandbytes (min_8bit_size)
DECADES = 7


class Packed(NamedTuple):
    """An optimiser's state with its moments quantised.

    codes: the state, with moments as uint8 in the parameter's own shape (so that they are sharded like it); small ones are float32. absmax:
    one float32 per block where `codes` is quantised, else None.
    """

    codes: Any
    absmax: Any


def in_8_bits(core: optax.GradientTransformation, layers: Callable[[tuple], int], in_turn: bool = True) -> optax.GradientTransformation:
    """`core` with its moments stored in 8 bits between steps; the update is computed from them in float32. `core`'s state is a NamedTuple
    of scalars and of trees like the parameters.

    `layers(path)` is the number of leading axes of a leaf that count parameters (1 for a stack of layers); blocks do not cross them.
    `in_turn`: update a stack's layers one after the other, in place, so that only one layer's moments are in float32 at a time. Not for
    state that is sharded over the layers (ZeRO-1).
    """

    def init(params):
        return pack(core.init(params), layers)

    def one(update, state, param, lead):
        update, full = core.update(update, unpack(state, lambda _: lead), param)
        return update, pack(full, lambda _: lead)

    def stack(update, state, param):
        def layer(i, done):
            # every layer gets a scalar (the step count) as it was before the first
            update_i, state_i = jax.tree.map(lambda now, before: now[i] if now.ndim else before, done, (update, state))
            new = one(update_i, state_i, None if param is None else param[i], 0)
            return jax.tree.map(lambda now, new: now.at[i].set(new) if now.ndim else new, done, new)

        return jax.lax.fori_loop(0, update.shape[0], layer, (update, state))

    def update(updates, state, params=None):
        paths, tree = jax.tree_util.tree_flatten_with_path(updates)
        params = [None] * len(paths) if params is None else tree.flatten_up_to(params)
        done = []
        for (path, leaf), of_leaf, param in zip(paths, _apart(state, tree), params, strict=True):
            lead = layers(path)
            done.append(stack(leaf, of_leaf, param) if lead and in_turn else one(leaf, of_leaf, param, lead))
        return tree.unflatten([leaf for leaf, _ in done]), _together([of_leaf for _, of_leaf in done], tree, state)

    return optax.GradientTransformation(init, update)


def _apart(state: Packed, tree) -> list[Packed]:
    """The state of each parameter separately; each contains the scalars."""

    def fields(part):
        return [tree.flatten_up_to(field) if _per_parameter(field) else [field] * tree.num_leaves for field in part]

    return [Packed(*both) for both in zip(*([type(part)(*one) for one in zip(*fields(part), strict=True)] for part in state), strict=True)]


def _together(states: list[Packed], tree, like: Packed) -> Packed:
    """The inverse of `_apart`."""

    def field(part: int, name: str):
        each = [getattr(state[part], name) for state in states]
        return tree.unflatten(each) if _per_parameter(getattr(like[part], name)) else each[0]

    return Packed(*(type(like[part])(*(field(part, name) for name in like[part]._fields)) for part in range(2)))


def _per_parameter(field: Any) -> bool:
    """Whether a field of a state is a tree like the parameters, not a scalar."""
    return field is not None and not jax.tree_util.treedef_is_leaf(jax.tree.structure(field))


def pack(state: Any, layers: Callable[[tuple], int]) -> Packed:
    """Quantise the moments of an optax state: `nu` unsigned, the others signed."""

    def one(path, leaf):
        lead = layers(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or math.prod(leaf.shape[lead:]) < SMALLEST:
            return leaf, None
        return quantize(leaf, _signed(path), lead)

    pairs = jax.tree_util.tree_map_with_path(one, state)
    return Packed(*(jax.tree.map(lambda _, pair, i=i: pair[i], state, pairs) for i in range(2)))


def unpack(state: Packed, layers: Callable[[tuple], int]) -> Any:
    """The float32 state again."""

    def one(path, codes, absmax):
        return codes if absmax is None else dequantize(codes, absmax, _signed(path), layers(path))

    return jax.tree_util.tree_map_with_path(one, state.codes, state.absmax)


def _signed(path: tuple) -> bool:
    return not any(getattr(key, "name", None) == "nu" for key in path)


def quantize(x: jax.Array, signed: bool, lead: int = 0) -> tuple[jax.Array, jax.Array]:
    """`(codes, uint8 in x's shape; absmax, float32 per block)`; a block of zeros has absmax 0."""
    blocks = _blocks(x, lead)
    absmax = jnp.max(jnp.abs(blocks), -1)
    share = blocks / jnp.where(absmax > 0, absmax, 1.0)[..., None]
    rank = _rank(jnp.abs(share), signed)
    code = jnp.where(share < 0, 127 - jnp.minimum(rank, 127), 127 + rank) if signed else rank
    return _unblocked(code.astype(jnp.uint8), x.shape, lead), absmax


def dequantize(codes: jax.Array, absmax: jax.Array, signed: bool, lead: int = 0) -> jax.Array:
    """float32 of `codes`' shape."""
    blocks = _blocks(codes, lead)
    values = jnp.asarray(levels(signed))[blocks.astype(jnp.int32)]
    return _unblocked(values * absmax[..., None], codes.shape, lead)


def levels(signed: bool) -> np.ndarray:
    """The 256 levels in ascending order, float32 `[256]`."""
    above = _magnitudes(signed)
    return np.concatenate([-above[-2::-1], [0.0], above] if signed else [[0.0], above]).astype(np.float32)


def _magnitudes(signed: bool) -> np.ndarray:
    """The positive levels in ascending order, float64."""
    counts = [2 ** (i + (not signed)) for i in range(DECADES)]
    decades = [10.0 ** (i - DECADES + 1) * (0.1 + 0.9 * (np.arange(n) + 0.5) / n) for i, n in enumerate(counts)]
    return np.concatenate([*decades, [1.0]])


def _rank(share: jax.Array, signed: bool) -> jax.Array:
    """Number of the level nearest to `share` in 0..1, where 0 is zero: int32.

    Levels within a decade are evenly spaced, so a position in it is computed; a comparison is needed only at the borders of decades. (A
    search through the 256 levels is 8 gathers per number, which are slow on TPUs.)
    """
    above, last = _magnitudes(signed), 0
    middle = (np.concatenate([[0.0], above[:-1]]) + above) / 2  # below middle[r] a number is nearer to level r - 1
    rank = jnp.zeros(share.shape, jnp.int32)
    for i in range(DECADES):
        n = 2 ** (i + (not signed))
        place = jnp.floor((share * (10.0 ** (DECADES - 1 - i)) - 0.1) * (n / 0.9)).astype(jnp.int32)
        rank = jnp.where(share > middle[last], 1 + last + jnp.clip(place, 0, n - 1), rank)
        last += n
    return jnp.where(share > middle[last], last + 1, rank)


def _blocks(x: jax.Array, lead: int) -> jax.Array:
    """`[..., number of blocks, 256]`, each parameter's numbers in order, padded with zeros.

    Rows made of whole blocks keep their axes, so that a sharded leaf is not gathered.
    """
    if x.ndim > lead and x.shape[-1] % BLOCK == 0:
        return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    flat = x.reshape(*x.shape[:lead], -1)
    flat = jnp.pad(flat, [(0, 0)] * lead + [(0, -flat.shape[-1] % BLOCK)])
    return flat.reshape(*x.shape[:lead], -1, BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...], lead: int) -> jax.Array:
    flat = blocks.reshape(*shape[:lead], -1)
    return flat[..., : math.prod(shape[lead:])].reshape(shape)

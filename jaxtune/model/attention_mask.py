"""Which keys a query sees: earlier tokens of its own segment, and of the segment that it continues, within the layer's window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MANY = 2**30
UNSEEN = float(jnp.finfo(jnp.float32).min)  # finite, so that a difference of two is not NaN


class Keys(NamedTuple):
    """The places of keys (or queries): slot in the row, position in the document, segment; int32 `[B, T]`.

    `parents`, if given, is the segment that a token's own segment continues (0: none): a prompt that several answers share. `common`, for
    keys: bool, whether every segment sees it (virtual tokens). `bias`, for keys: float32 `[B, S, H]`, added to all scores of a key (ALiBi).
    """

    slots: jax.Array
    positions: jax.Array
    segments: jax.Array
    parents: jax.Array | None = None
    common: jax.Array | None = None
    bias: jax.Array | None = None


def least_seen(positions: jax.Array, window: jax.Array | int) -> jax.Array:
    """The least position that a token at each of these positions sees. `window` includes the token itself; 0 is no window, and -n means
    chunks of n positions, of which a token sees its own."""
    start = jnp.where(window > 0, positions - window + 1, positions - positions % jnp.maximum(-jnp.asarray(window), 1))
    return jnp.where(window == 0, -_MANY, start)


def visible(queries: Keys, keys: Keys, window: jax.Array | int) -> jax.Array:
    """bool `[B, T, S]`: whether a query may see a key; `window` as in `least_seen`."""
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    if queries.parents is not None:
        same |= queries.parents[:, :, None] == keys.segments[:, None, :]
    if keys.common is not None:
        same |= keys.common[:, None, :]
    seen = same & (keys.segments[:, None, :] > 0) & (queries.slots[:, :, None] >= keys.slots[:, None, :])
    return seen & (keys.positions[:, None, :] >= least_seen(queries.positions, window)[:, :, None])


def score_bias(queries: Keys, keys: Keys, window, K: int) -> jax.Array:
    """The keys' own bias where a query sees a key, otherwise a number in which any score vanishes, `[B, K, G, T, S]` (K and G are 1 without
    such a bias). Added, not selected: the constants of a select have the scores' shape, and XLA keeps one for each span through all layers.
    """
    bias = jnp.where(visible(queries, keys, window), 0.0, UNSEEN)[:, None, None]
    if keys.bias is None:
        return bias
    B, S, H = keys.bias.shape
    return bias + keys.bias.reshape(B, S, K, H // K).transpose(0, 2, 3, 1)[:, :, :, None]


def needed(queries: Keys, keys: Keys, window, q_block: int, k_block: int) -> jax.Array:
    """bool `[B, Q, K]`: whether any query of a block may see any key of another, judged by the least and largest slot, segment and position
    of each block: documents elsewhere in the row, and later tokens, take no time."""

    def least(x, live, block):
        return jnp.where(live, x, _MANY).reshape(x.shape[0], -1, block).min(-1)

    def most(x, live, block):
        return jnp.where(live, x, -1).reshape(x.shape[0], -1, block).max(-1)

    own, ours, theirs = queries.segments, queries.segments > 0, keys.segments > 0
    parents = own if queries.parents is None else jnp.where(queries.parents > 0, queries.parents, own)
    q_least, q_most = ((lambda x, f=f: f(x, ours, q_block)[:, :, None]) for f in (least, most))
    k_least, k_most = ((lambda x, f=f: f(x, theirs, k_block)[:, None]) for f in (least, most))
    seen = k_most(keys.segments) >= q_least(jnp.minimum(own, parents))
    seen &= k_least(keys.segments) <= q_most(jnp.maximum(own, parents))
    if keys.common is not None:
        seen |= keys.common.reshape(keys.common.shape[0], 1, -1, k_block).any(-1)
    seen &= k_least(keys.slots) <= q_most(queries.slots)
    return seen & (least_seen(q_least(queries.positions), window) <= k_most(keys.positions))


def needed_blocks(block: int, queries: Keys, keys: Keys, window) -> tuple[jax.Array, jax.Array]:
    """The first block of keys that any of these queries may see, in any row, and the one after the last."""
    any_K = needed(queries, keys, window, queries.slots.shape[1], block).any((0, 1))
    numbers = jnp.arange(any_K.shape[0])
    return jnp.where(any_K, numbers, _MANY).min(), jnp.where(any_K, numbers + 1, 0).max()

"""What the attention kernels for GPU (model/flash.py) and TPU (model/splash.py) share: the computation for one tile of queries and keys,
the tokens' places, and which tiles are needed at all.

The arithmetic is that of model/attention.py (online softmax, arXiv 1805.02867; backward by recomputation, arXiv 2205.14135), in float32. A
tile is queries by keys or keys by queries: per-query (or per-key) numbers are a column or a row accordingly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.model.attention import UNSEEN
from jaxtune.model.attention_mask import Keys, least_seen
from jaxtune.model.layers import softcap

NOBODY, NO_PARENT = -1, -2  # segments that no query has: of padding as keys, and of a query without a parent
PLACES = 8  # rows of a table of places; four are used, and a TPU's tile has eight


class Place(NamedTuple):
    """Slot, position and segment of each token as a key; as a query, the least position that it sees in place of its own."""

    slot: jax.Array
    position: jax.Array
    segment: jax.Array
    parent: jax.Array | None = None


def tables(queries: Keys, keys: Keys, window) -> tuple[jax.Array, jax.Array]:
    """Places of queries and keys, `[B, PLACES, T]` int32, in the order of `Place`."""
    least = least_seen(queries.positions, window)
    parents = [] if queries.parents is None else [jnp.where(queries.parents > 0, queries.parents, NO_PARENT)]
    segments = jnp.where(keys.segments > 0, keys.segments, NOBODY)
    return _table(queries.slots, least, queries.segments, *parents), _table(keys.slots, keys.positions, segments)


def _table(*rows) -> jax.Array:
    return jnp.pad(jnp.stack(rows, 1), ((0, 0), (0, PLACES - len(rows)), (0, 0)))


def ranges(tiles_BQK: jax.Array) -> jax.Array:
    """int32 `[2, B, Q]`: the first needed tile along the last axis, and the one after the last (0 and 0 if none is needed)."""
    numbers = jnp.arange(tiles_BQK.shape[-1], dtype=jnp.int32)
    first = jnp.where(tiles_BQK, numbers, numbers.size).min(-1)
    end = jnp.where(tiles_BQK, numbers + 1, 0).max(-1)
    return jnp.stack([jnp.where(end > 0, first, 0), end])


# ---- one tile ----


def seen(query: Place, key: Place) -> jax.Array:
    """Whether a query sees a key (`attention_mask.visible`); a column and a row make a tile."""
    same = query.segment == key.segment
    if query.parent is not None:
        same |= query.parent == key.segment
    return same & (query.slot >= key.slot) & (key.position >= query.position)


def product(a, b, a_axis: int, b_axis: int) -> jax.Array:
    """float32 product of two matrices, contracted over one axis of each."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def scores(how, a, b) -> jax.Array:
    """Scaled, capped products of all rows of `a` and `b`."""
    return softcap(product(a, b, 1, 1) * how.scale, how.cap)


def nothing(rows: int, width: int):
    """The sums over no keys: weighted values, the largest score, the weights."""
    return jnp.zeros((rows, width), jnp.float32), jnp.full((rows, 1), UNSEEN, jnp.float32), jnp.zeros((rows, 1), jnp.float32)


def fold(how, sums, q, k, v, mask):
    """`sums` with the keys of one more tile, queries by keys."""
    out, top, total = sums
    s = jnp.where(mask, scores(how, q, k), UNSEEN)
    both = jnp.maximum(top, s.max(1, keepdims=True))
    shrink, weights = jnp.exp(top - both), jnp.exp(s - both)
    return out * shrink + product(weights.astype(v.dtype), v, 1, 0), both, total * shrink + weights.sum(1, keepdims=True)


def finish(sums):
    """The result, and the log of the sum that the softmax divides by; zeros if nothing was seen, NaN if a score is NaN."""
    out, top, total = sums
    unseen = (top <= UNSEEN) & (total == total)
    total = jnp.where(unseen, 1.0, total)
    return jnp.where(unseen, 0.0, out / total), jnp.where(unseen, 0.0, top + jnp.log(total))


def gradients(how, left, right, dleft, dright, logz, delta, mask):
    """Probabilities, and derivatives of the scores, in the dtype of `left`. `left`, `right`: queries and keys in either order; `dleft`,
    `dright`: the results' derivatives and values in that order."""
    capped = scores(how, left, right)
    probs = jnp.where(mask, jnp.exp(capped - logz), 0.0)
    dscores = probs * (product(dleft, dright, 1, 1) - delta) * how.scale
    if how.cap != 0.0:
        dscores *= 1 - jnp.square(capped / how.cap)
    return probs.astype(left.dtype), dscores.astype(left.dtype)

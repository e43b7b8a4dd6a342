"""Attention by segments: a token sees earlier tokens of its own segment, and of the segment it goes on from, within the layer's window.
Softmax in float32.

Plain XLA, over blocks of queries so that the scores of a long row are never all there at once; the backward pass recomputes a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

QUERY_BLOCK = 1024  # rows up to this long are one block


class Keys(NamedTuple):
    """Where keys (or queries) stand: slot in the row, position in the document, segment; int32 `[B, T]`.

    `parents`, where given, is the segment that a token's own segment goes on from (0: none): a prompt that several answers share.
    """

    slots: jax.Array
    positions: jax.Array
    segments: jax.Array
    parents: jax.Array | None = None


def visible(queries: Keys, keys: Keys, window: jax.Array | int) -> jax.Array:
    """bool `[B, T, S]`: whether a query may see a key. `window` counts the token itself; 0 is no window."""
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    if queries.parents is not None:
        same |= queries.parents[:, :, None] == keys.segments[:, None, :]
    seen = same & (keys.segments[:, None, :] > 0) & (queries.slots[:, :, None] >= keys.slots[:, None, :])
    return seen & ((window == 0) | (distance < window))


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`: at most `cap` (Gemma 2, arXiv 2408.00118); x itself where cap is 0."""
    return x if cap == 0.0 else cap * jnp.tanh(x / cap)


def attend(q_BTHh, k_BSKh, v_BSKh, queries: Keys, keys: Keys, *, scale: float, window: jax.Array | int = 0, cap: float = 0.0):
    """Grouped-query attention, `[B, T, H, h]` in q's dtype; a query that sees nothing (padding) gets a mean of values, never NaN.

    `cap` bounds the scores (`softcap`).
    """
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q = q_BTHh.reshape(B, T, K, H // K, h)

    def block(q, queries: Keys) -> jax.Array:
        scores = softcap(jnp.einsum("btkgh,bskh->bkgts", q, k_BSKh, preferred_element_type=jnp.float32) * scale, cap)
        mask = visible(queries, keys, window)[:, None, None]
        # finite, so that a row that sees nothing has no NaN, neither here nor in its gradient
        probs = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", probs.astype(v_BSKh.dtype), v_BSKh)

    if T <= QUERY_BLOCK:
        return block(q, queries).reshape(B, T, H, h)
    pad = -T % QUERY_BLOCK

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(lambda args: block(*args)), (split(q), jax.tree.map(split, queries)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, H, h)[:, :T]

"""Attention by segments: a token sees earlier tokens of its own segment, and of the segment that it continues, within the layer's window.
Softmax in float32.

Three implementations compute it: kernels for GPUs (model/flash.py) and TPUs (model/splash.py), and plain XLA here, by blocks of queries
and, in long rows, of keys. In all of them memory grows with the length, not with its square. The backward pass computes a block's scores
again from what the forward pass kept: queries, keys, values, the result, and the log of each softmax's sum (arXiv 2205.14135).
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import ModelError
from jaxtune.model.attention_mask import UNSEEN, Keys, needed_blocks, score_bias
from jaxtune.model.layers import softcap

SPANS = 8  # a shorter row is cut into at most this many spans of blocks; the products of a span omit the keys after its end


class Tile(NamedTuple):
    """Tokens per block in plain XLA: queries, and keys in rows that have more. Large blocks keep an accelerator busy; on a CPU the scores
    of a small block stay in the cache, and more of what no query of a block sees is skipped."""

    queries: int = 128
    keys: int = 1024


TILE, CPU_TILE = Tile(), Tile(64, 64)
CACHE_BLOCK = 64  # slots of a cache that a CPU reads at a time


def attend(
    q_BTHh, k_BSKh, v_BSKh, queries: Keys, keys: Keys, *, scale: float, window: jax.Array | int = 0, cap: float = 0.0, form: str = "xla",
    tile: Tile = TILE, sinks_H: jax.Array | None = None,
):  # fmt: skip
    """Grouped-query attention, `[B, T, H, h]` in q's dtype; zeros for a query that sees nothing (padding).

    `cap` bounds the scores (`softcap`). If there are as many keys as queries, both are the same tokens, in slots 0, 1, 2, ... `form`: xla |
    flash | splash; `tile` applies to xla. `sinks_H`: a score per head that takes part in every softmax and contributes no value (arXiv
    2309.17453; GPT-OSS).
    """
    T, (S, K) = q_BTHh.shape[1], k_BSKh.shape[1:3]
    q = checkpoint_name(_grouped(q_BTHh, K), "attention")
    k, v = checkpoint_name(k_BSKh.swapaxes(1, 2), "attention"), checkpoint_name(v_BSKh.swapaxes(1, 2), "attention")
    if form != "xla":
        if keys.bias is not None:
            raise ModelError(f"attention {form} is a kernel that knows no ALiBi; write attention: xla")
        if keys.common is not None:
            raise ModelError(f"attention {form} is a kernel that knows no virtual tokens (prompt and prefix tuning); write attention: xla")
        q, queries = (_whole(x, _kernel(form).block(T), T) for x in (q, queries))
        k, v, keys = (_whole(x, _kernel(form).block(S), S) for x in (k, v, keys))
    elif T > tile.queries and S > tile.keys:
        k, v, keys = (_whole(x, tile.keys, S) for x in (k, v, keys))
    sinks = _by_group(sinks_H, K)
    out: Any = _attend(_How(scale, cap, form, tile), q, k, v, sinks, queries, keys, jnp.asarray(window))
    return _ungrouped(out[:, :, :, :T])


def attend_cached(
    q_BTHh, k_LBKSh, v_LBKSh, layer: jax.Array, queries: Keys, keys: Keys, *, scale: float, window: jax.Array | int = 0, cap: float = 0.0,
    sinks_H: jax.Array | None = None,
):  # fmt: skip
    """`attend` over the keys and values of one layer of a cache, without derivatives.

    On a CPU by blocks of slots, if they divide the cache: those that no query sees (not filled yet, before a window) take no time, and no
    copy of all that a layer keeps is written first.
    """
    _, B, K, S, h = k_LBKSh.shape
    q, how = _grouped(q_BTHh, K), _How(scale, cap, "xla", TILE)

    def slots(i, block: int) -> Any:
        at = (layer, 0, 0, i * block, 0)
        k, v = (jax.lax.dynamic_slice(x, at, (1, B, K, block, h))[0] for x in (k_LBKSh, v_LBKSh))
        return k, v, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1), keys)

    def at_once():
        return _finished(q.dtype, *_part(how, window, q, queries, *slots(0, S)))

    def in_blocks():
        needed = needed_blocks(CACHE_BLOCK, queries, keys, window)
        return _folded(how, window, q, queries, needed, functools.partial(slots, block=CACHE_BLOCK))

    out, logz = jax.lax.platform_dependent(cpu=in_blocks, default=at_once) if S % CACHE_BLOCK == 0 else at_once()
    return _ungrouped(_with_sinks(out, logz, _by_group(sinks_H, K))[0])


def _grouped(q_BTHh: jax.Array, K: int) -> jax.Array:
    """Queries by the key head that they use, `[B, K, H / K, T, h]`."""
    B, T, H, h = q_BTHh.shape
    return q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)


def _ungrouped(out_BKGTh: jax.Array) -> jax.Array:
    """The inverse of `_grouped`."""
    B, K, G, T, h = out_BKGTh.shape
    return out_BKGTh.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, h)


def _by_group(sinks_H, K: int):
    return None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(K, -1)


def _whole(tree: Any, block: int, length: int) -> Any:
    """Pad to whole blocks of tokens; those after the last have segment 0 and are seen by nobody."""
    pad = -length % block

    def filled(x):
        axis = 1 if x.ndim == 2 else x.ndim - 2  # of the tokens: in places, and in the layout of heads
        return jnp.pad(x, [(0, pad if n == axis else 0) for n in range(x.ndim)])

    return jax.tree.map(filled, tree) if pad else tree


class _How(NamedTuple):
    """How scores follow from products, and what computes them."""

    scale: float
    cap: float
    form: str
    tile: Tile


def _kernel(form: str):
    """The module of a kernel; imported when used, since that takes a while."""
    return importlib.import_module(f"jaxtune.model.{form}")


# From here on q and out are [B, K, G, T, h] (G = H / K), k and v are [B, K, S, h], and logz, the log of a softmax's sum, is [B, K, G, T].


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q, k, v, sinks, queries, keys, window):
    return _attend_fwd(how, q, k, v, sinks, queries, keys, window)[0]


def _attend_fwd(how, q, k, v, sinks, queries, keys, window):
    forward = _forward if how.form == "xla" else _kernel(how.form).forward
    out, logz = forward(how, q, k, v, queries, keys, window)
    out, logz = _with_sinks(out, logz, sinks)
    out, logz = checkpoint_name(out, "attention"), checkpoint_name(logz, "attention")
    return out, (q, k, v, sinks, queries, keys, window, out, logz)


def _with_sinks(out, logz, sinks):
    if sinks is None:
        return out, logz
    both = jnp.logaddexp(logz, sinks[:, :, None])  # [K, G]: one more term of each sum
    return (out * jnp.exp(logz - both)[..., None]).astype(out.dtype), both


def _attend_bwd(how, residuals, dout):
    q, k, v, sinks, queries, keys, window, out, logz = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    backward = _backward if how.form == "xla" else _kernel(how.form).backward
    # a sink is a key whose value is zero
    dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks[:, :, None] - logz) * delta, axis=(0, 3))
    return *backward(how, q, k, v, queries, keys, window, dout, logz, delta), dsinks, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(how, q, k, v, queries, keys, window):
    outs, logzs = [], []
    for span, seen in _spans(how.tile, q.shape[3], k.shape[2]):
        keys_seen = k[:, :, :seen], v[:, :, :seen], _slots(keys, slice(seen))

        def block(_, part, keys_seen=keys_seen):
            return None, _block(how, window, *part, *keys_seen)

        _, (out, logz) = _by_blocks(how.tile, block, None, (q[:, :, :, span], _slots(queries, span)))
        outs.append(out)
        logzs.append(logz)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(logzs, axis=3)


def _backward(how, q, k, v, queries, keys, window, dout, logz, delta):
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dqs = []
    for span, seen in _spans(how.tile, q.shape[3], k.shape[2]):
        # otherwise the queries and keys of all spans would be cut out at once, in the forward pass
        held: Any = jax.lax.optimization_barrier((q, k, v, dk, dv))
        q, k, v, dk, dv = held
        keys_seen = k[:, :, :seen], v[:, :, :seen], _slots(keys, slice(seen))

        def block(totals, part, keys_seen=keys_seen):
            dq, *totals = _block_gradient(how, window, *part, *keys_seen, totals=totals)
            return tuple(totals), dq

        part = (q[:, :, :, span], _slots(queries, span), dout[:, :, :, span], logz[:, :, :, span], delta[:, :, :, span])
        totals, dq = _by_blocks(how.tile, block, (dk[:, :, :seen], dv[:, :, :seen]), part)
        dk, dv = dk.at[:, :, :seen].set(totals[0]), dv.at[:, :, :seen].set(totals[1])
        dqs.append(dq)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype)


def _block(how, window, q, queries, k, v, keys):
    """Result and logz of one block of queries: over all keys at once, or block by block."""
    if _at_once(how.tile, k):
        return _finished(q.dtype, *_part(how, window, q, queries, k, v, keys))
    needed = needed_blocks(how.tile.keys, queries, keys, window)
    return _folded(how, window, q, queries, needed, lambda i: _key_block(how.tile, i, k, v, keys))


def _folded(how, window, q, queries, needed: tuple[jax.Array, jax.Array], block_of: Callable):
    """Result and logz over some blocks of keys, one after the other (online softmax, arXiv 1805.02867)."""

    def fold(i, sums):
        return _joined(sums, _part(how, window, q, queries, *block_of(i)))

    nothing = jnp.full((*q.shape[:-1], 1), UNSEEN)
    out, top, total = jax.lax.fori_loop(*needed, fold, (jnp.zeros(q.shape, jnp.float32), nothing, jnp.zeros_like(nothing)))
    return _finished(q.dtype, out, top, total)


def _finished(dtype, out, top, total):
    """Result and logz of sums; zeros for a query that saw nothing."""
    unseen = (top <= UNSEEN) & ~jnp.isnan(total)  # on CPUs a maximum ignores NaN, which must be propagated
    total = jnp.where(unseen, 1, total)
    return jnp.where(unseen, 0, out / total).astype(dtype), jnp.where(unseen, 0, top + jnp.log(total))[..., 0]


def _part(how, window, q, queries, k, v, keys):
    """Partial sums over some keys: the largest score, and relative to it the sum of weights and of weighted values, float32."""
    B, K, G, t, h = q.shape
    scores = softcap(_product(q.reshape(B, K, G * t, h), k, 3, 3).reshape(B, K, G, t, -1) * how.scale, how.cap)
    scores += score_bias(queries, keys, window, K)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return _product(weights.astype(v.dtype).reshape(B, K, G * t, -1), v, 3, 2).reshape(B, K, G, t, h), top, total


def _joined(one, other):
    """The sums of two parts relative to the larger of their maxima."""
    (out, top, total), (out_2, top_2, total_2) = one, other
    both = jnp.maximum(top, top_2)
    shrink, shrink_2 = jnp.exp(top - both), jnp.exp(top_2 - both)
    return out * shrink + out_2 * shrink_2, both, total * shrink + total_2 * shrink_2


def _block_gradient(how, window, q, queries, dout, logz, delta, k, v, keys, totals):
    """dq of one block of queries, and `totals`, the accumulated dk and dv, with its part added."""
    if _at_once(how.tile, k):
        dq, dk, dv = _part_gradient(how, window, q, queries, dout, logz, delta, k, v, keys)
        return dq.astype(q.dtype), totals[0] + dk, totals[1] + dv

    def fold(i, sums):
        dq, *totals = sums
        dq_i, *parts = _part_gradient(how, window, q, queries, dout, logz, delta, *_key_block(how.tile, i, k, v, keys))
        at = 0, 0, i * how.tile.keys, 0
        here = (jax.lax.dynamic_slice(total, at, part.shape) + part for total, part in zip(totals, parts, strict=True))
        return dq + dq_i, *(jax.lax.dynamic_update_slice(total, part, at) for total, part in zip(totals, here, strict=True))

    dq, *totals = jax.lax.fori_loop(*needed_blocks(how.tile.keys, queries, keys, window), fold, (jnp.zeros(q.shape, jnp.float32), *totals))
    return dq.astype(q.dtype), *totals


def _part_gradient(how, window, q, queries, dout, logz, delta, k, v, keys):
    """dq, dk, dv for some queries and keys, float32. Scores have keys first, `[B, K, S, G, t]`, so that two of three products need no
    transpose."""
    B, K, G, t, h = q.shape
    flat_q, flat_dout = q.reshape(B, K, G * t, h), dout.reshape(B, K, G * t, h)
    capped = softcap(_product(k, flat_q, 3, 3).reshape(B, K, -1, G, t) * how.scale, how.cap)
    bias = score_bias(queries, keys, window, K).transpose(0, 1, 4, 2, 3)
    probs = jnp.exp(capped + bias - logz[:, :, None])
    dprobs = _product(v, flat_dout, 3, 3).reshape(probs.shape)
    dscores = probs * (dprobs - delta[:, :, None]) * how.scale
    if how.cap != 0.0:
        dscores *= 1 - jnp.square(capped / how.cap)
    probs, dscores = (x.astype(q.dtype).reshape(B, K, -1, G * t) for x in (probs, dscores))
    dq = _product(dscores, k, 2, 2).reshape(q.shape)
    return dq, _product(dscores, flat_q, 3, 2), _product(probs, flat_dout, 3, 2)


def _product(a, b, a_axis, b_axis):
    """Batched over the first two axes, contracted over one of each, in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


# ---- spans and blocks ----


def _spans(tile: Tile, T: int, S: int) -> list[tuple[slice, int]]:
    """Where a row of T queries is cut, and how many keys each span may see: all, unless queries and keys are the same tokens. Rows with
    more keys than a block are not cut: each block of queries skips the blocks of keys that it does not need (`needed_blocks`)."""
    if T != S or S > tile.keys:
        return [(slice(0, T), S)]
    length = tile.queries * -(-T // (tile.queries * SPANS))
    return [(slice(start, min(start + length, T)), min(start + length, T)) for start in range(0, T, length)]


def _at_once(tile: Tile, k) -> bool:
    """Whether the keys form one block: few, or a cache of another size, which could only be padded by copying it."""
    return k.shape[2] <= tile.keys or k.shape[2] % tile.keys != 0


def _key_block(tile: Tile, i, k, v, keys: Keys):
    """Block i of the keys and values."""
    k, v = (jax.lax.dynamic_slice_in_dim(x, i * tile.keys, tile.keys, axis=2) for x in (k, v))
    return k, v, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * tile.keys, tile.keys, axis=1), keys)


def _slots(keys: Keys, part: slice) -> Keys:
    return jax.tree.map(lambda x: x[:, part], keys)


def _by_blocks(tile: Tile, function, carry, parts):
    """`carry, out = function(carry, part)` over blocks of queries, in order, with the outs joined again. Blocks grow with a long row: fewer
    steps, and still less memory than the row itself takes."""
    length = parts[0].shape[3]
    if length <= tile.queries:
        return function(carry, parts)
    size = tile.queries * max(1, min(tile.keys // tile.queries, length // (8 * tile.keys)))
    pad = -length % size

    def axis(x):
        return 1 if x.ndim == 2 else 3  # of the queries, in [B, T] and in [B, K, G, T, ...]

    def split(x):
        x = jnp.pad(x, [(0, pad if i == axis(x) else 0) for i in range(x.ndim)])  # segment 0: sees nothing
        return jnp.moveaxis(x.reshape(*x.shape[: axis(x)], -1, size, *x.shape[axis(x) + 1 :]), axis(x), 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]

    def step(state, scanned):  # the result of a block of queries replaces it: a second array of that size would outlive the layer
        (carry, blocks), (i, rest) = state, scanned
        carry, out = function(carry, (blocks[i], *rest))
        first, *others = jax.tree.leaves(out)
        return (carry, blocks.at[i].set(first)), others

    queries, *rest = jax.tree.map(split, parts)
    (carry, first), others = jax.lax.scan(step, (carry, queries), (jnp.arange(queries.shape[0]), rest))
    out = jax.tree.map(join, (first, *others))
    return carry, out if others else out[0]

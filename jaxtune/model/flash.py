"""Attention as a GPU kernel (Pallas, compiled by Triton): scores exist for one tile at a time, forward and backward (arXiv 2307.08691).

It supports what model/attention.py does: segments, parents, windows, soft caps, grouped queries without repeated keys. A program handles
one block of queries (of keys, for the derivatives of keys and values), and iterates over the tiles that it needs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxtune.model import tiles
from jaxtune.model.attention_mask import Keys, needed

INTERPRET = False  # on a CPU, for tests
BLOCK = 128  # rows are padded to multiples of this, like all tile sizes


class _Size(NamedTuple):
    """A tile's queries and keys; warps per program; stages of its load pipeline."""

    q: int
    k: int
    warps: int
    stages: int


# by bytes per head: forward and backward. Each fits the 99 KiB of shared memory of consumer cards.
SIZES = {
    128: (_Size(128, 64, 4, 3), _Size(64, 64, 4, 2)),
    256: (_Size(128, 64, 8, 2), _Size(64, 64, 8, 1)),
    512: (_Size(64, 32, 8, 2), _Size(32, 32, 4, 1)),
    1024: (_Size(32, 32, 8, 1), _Size(16, 16, 4, 1)),
}


def block(length: int) -> int:
    """Rows of that many tokens come in multiples of this."""
    return BLOCK


def forward(how, q, k, v, queries: Keys, keys: Keys, window):
    """Result `[B, K, G, T, h]` and logz `[B, K, G, T]` for q `[B, K, G, T, h]`, k and v `[B, K, S, h]`."""
    size, h, parents = _size(q, 0), q.shape[-1], queries.parents is not None
    needs = tiles.ranges(needed(queries, keys, window, size.q, size.k))

    def kernel(q_ref, k_ref, v_ref, q_places, k_places, needs, out_ref, logz_ref):
        q, query = _load(h, q_ref), _place(q_places, slice(None), 1, parents)

        def step(i, sums):
            here = pl.ds(i * size.k, size.k)
            return tiles.fold(how, sums, q, _load(h, k_ref, here), _load(h, v_ref, here), tiles.seen(query, _place(k_places, here, 0)))

        out, logz = tiles.finish(jax.lax.fori_loop(needs[0], needs[1], step, tiles.nothing(*q.shape)))
        _store(h, out_ref, out)
        logz_ref[:] = logz.reshape(-1)

    view = _by_query(q, k, size)
    return _call(kernel, view, size, (q, k, v, *tiles.tables(queries, keys, window), needs), q=(q,), number=(q[..., 0],))


def backward(how, q, k, v, queries: Keys, keys: Keys, window, dout, logz, delta):
    """dq, dk, dv."""
    size, h, parents = _size(q, 1), q.shape[-1], queries.parents is not None

    def dq_kernel(q_ref, k_ref, v_ref, q_places, k_places, needs, dout_ref, logz_ref, delta_ref, dq_ref):
        q, dout, query = _load(h, q_ref), _load(h, dout_ref), _place(q_places, slice(None), 1, parents)
        logz, delta = logz_ref[:][:, None], delta_ref[:][:, None]

        def step(i, dq):
            here = pl.ds(i * size.k, size.k)
            k, mask = _load(h, k_ref, here), tiles.seen(query, _place(k_places, here, 0))
            _, dscores = tiles.gradients(how, q, k, dout, _load(h, v_ref, here), logz, delta, mask)
            return dq + tiles.product(dscores, k, 1, 0)

        _store(h, dq_ref, jax.lax.fori_loop(needs[0], needs[1], step, jnp.zeros(q.shape, jnp.float32)))

    def dkv_kernel(q_ref, k_ref, v_ref, q_places, k_places, needs, dout_ref, logz_ref, delta_ref, dk_ref, dv_ref):
        k, v, key = _load(h, k_ref), _load(h, v_ref), _place(k_places, slice(None), 1)

        def head(g, sums):
            def step(i, sums):
                here = pl.ds(i * size.q, size.q)
                q, dout, mask = _load(h, q_ref, g, here), _load(h, dout_ref, g, here), tiles.seen(_place(q_places, here, 0, parents), key)
                probs, dscores = tiles.gradients(how, k, q, v, dout, logz_ref[g, here][None], delta_ref[g, here][None], mask)
                return sums[0] + tiles.product(dscores, q, 1, 0), sums[1] + tiles.product(probs, dout, 1, 0)

            return jax.lax.fori_loop(needs[0], needs[1], step, sums)

        zeros = jnp.zeros(k.shape, jnp.float32)
        dk, dv = jax.lax.fori_loop(0, q_ref.shape[0], head, (zeros, zeros))
        _store(h, dk_ref, dk)
        _store(h, dv_ref, dv)

    blocks = needed(queries, keys, window, size.q, size.k)
    arrays = q, k, v, *tiles.tables(queries, keys, window)
    (dq,) = _call(dq_kernel, _by_query(q, k, size), size, (*arrays, tiles.ranges(blocks), dout, logz, delta), q=(q,))
    dk, dv = _call(dkv_kernel, _by_key(q, k, size), size, (*arrays, tiles.ranges(blocks.swapaxes(1, 2)), dout, logz, delta), k=(k, v))
    return dq, dk, dv


def _place(table, here, axis: int, parents: bool = False) -> tiles.Place:
    """Places as a row (axis 0) or as a column (axis 1)."""
    return tiles.Place(*(jnp.expand_dims(table[row, here], axis) for row in range(4 if parents else 3)))


def _load(h: int, ref, *index):
    """A tile of heads of size h, padded with zeros (`_width`)."""
    width = ref.shape[-1]
    ref = ref.at[*index, :] if index else ref
    return ref[...] if width == h else triton.load(ref, mask=(jnp.arange(width) < h)[None], other=0)


def _store(h: int, ref, x) -> None:
    x = x.astype(ref.dtype)
    if ref.shape[-1] == h:
        ref[...] = x
    else:
        triton.store(ref, x, mask=(jnp.arange(ref.shape[-1]) < h)[None])


# ---- what of each array a program sees; programs are numbered (block, head, row) ----


class _View(NamedTuple):
    """The grid, and the parts of queries, keys, their places, the needed tiles, and per-query numbers (logz)."""

    grid: tuple[int, ...]
    q: pl.BlockSpec
    k: pl.BlockSpec
    q_places: pl.BlockSpec
    k_places: pl.BlockSpec
    needs: pl.BlockSpec
    number: pl.BlockSpec


NEEDS = pl.BlockSpec((2, None, None), lambda i, n, b: (0, b, i))


def _by_query(q, k, size: _Size) -> _View:
    (B, K, G, T, h), S = q.shape, k.shape[2]
    width = _width(h)
    return _View(
        (T // size.q, K * G, B),
        pl.BlockSpec((None, None, None, size.q, width), lambda i, n, b: (b, n // G, n % G, i, 0)),
        pl.BlockSpec((None, None, S, width), lambda i, n, b: (b, n // G, 0, 0)),
        pl.BlockSpec((None, tiles.PLACES, size.q), lambda i, n, b: (b, 0, i)),
        pl.BlockSpec((None, tiles.PLACES, S), lambda i, n, b: (b, 0, 0)),
        NEEDS,
        pl.BlockSpec((None, None, None, size.q), lambda i, n, b: (b, n // G, n % G, i)),
    )


def _by_key(q, k, size: _Size) -> _View:
    (B, K, G, T, h), S = q.shape, k.shape[2]
    width = _width(h)
    return _View(
        (S // size.k, K, B),
        pl.BlockSpec((None, None, G, T, width), lambda i, n, b: (b, n, 0, 0, 0)),
        pl.BlockSpec((None, None, size.k, width), lambda i, n, b: (b, n, i, 0)),
        pl.BlockSpec((None, tiles.PLACES, T), lambda i, n, b: (b, 0, 0)),
        pl.BlockSpec((None, tiles.PLACES, size.k), lambda i, n, b: (b, 0, i)),
        NEEDS,
        pl.BlockSpec((None, None, G, T), lambda i, n, b: (b, n, 0, 0)),
    )


def _width(h: int) -> int:
    """The width of a tile of heads: a power of two, and at least as wide as a product requires."""
    return max(16, pl.next_power_of_2(h))


def _size(q, backward: int) -> _Size:
    return SIZES[max(128, _width(q.shape[-1]) * q.dtype.itemsize)][backward]


def _call(kernel, view: _View, size: _Size, arrays, q=(), k=(), number=()):
    """Run a kernel; `q`, `k`, `number`: arrays that its results have the shapes of, in this order."""
    inputs = [view.q, view.k, view.k, view.q_places, view.k_places, view.needs, view.q, view.number, view.number]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*q, *k)] + [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in number]
    return pl.pallas_call(
        kernel,
        grid=view.grid,
        in_specs=inputs[: len(arrays)],
        out_specs=[view.q] * len(q) + [view.k] * len(k) + [view.number] * len(number),
        out_shape=like,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        interpret=INTERPRET,
        name=f"flash_{kernel.__name__}",
    )(*arrays)

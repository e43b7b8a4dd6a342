"""Attention as a TPU kernel (Pallas, compiled by Mosaic): scores exist for one tile at a time, forward and backward (arXiv 2307.08691).

It supports what model/attention.py does: segments, parents, windows, soft caps, grouped queries without repeated keys. The grid's last axis
runs over the tiles that one block of queries (of keys, for the derivatives of keys and values) needs, accumulating sums; surplus programs
load and do nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxtune.model import tiles
from jaxtune.model.attention_mask import Keys, needed

INTERPRET = False  # on a CPU, for tests
LANES, SUBLANES = 128, 8
BLOCK = 512  # tokens per block, in rows that have as many


def block(length: int) -> int:
    """Rows of that many tokens come in multiples of this: as few blocks as possible, all equal."""
    blocks = -(-length // BLOCK)
    return -(-length // (blocks * LANES)) * LANES


def forward(how, q, k, v, queries: Keys, keys: Keys, window):
    """Result `[B, K, G, T, h]` and logz `[B, K, G, T]` for q `[B, K, G, T, h]`, k and v `[B, K, S, h]`."""
    parents = queries.parents is not None

    def kernel(needs, q_ref, k_ref, v_ref, q_places, k_places, out_ref, logz_ref, *sums):
        @pl.when(pl.program_id(4) == 0)
        def _():
            for ref, x in zip(sums, tiles.nothing(*q_ref.shape), strict=True):
                ref[...] = jnp.broadcast_to(x, ref.shape)

        def before():
            out, top, total = sums
            return out[...], top[:, :1], total[:, :1]

        @pl.when(_is_needed(needs, 3, 4))
        def _():
            mask = tiles.seen(_columns(q_places, parents), _rows(k_places))
            after = tiles.fold(how, before(), q_ref[...], k_ref[...], v_ref[...], mask)
            for ref, x in zip(sums, after, strict=True):
                ref[...] = jnp.broadcast_to(x, ref.shape)

        @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
        def _():
            out, logz = tiles.finish(before())
            out_ref[...] = out.astype(out_ref.dtype)
            logz_ref[...] = jnp.broadcast_to(logz, (logz.size, LANES)).T[:1]

    view = _by_query(q, k)
    needs = tiles.ranges(needed(queries, keys, window, view.q_block, view.k_block))
    scratch = [(view.q_block, q.shape[-1]), (view.q_block, LANES), (view.q_block, LANES)]
    out, logz = _call(kernel, view, scratch, (needs, q, k, v, *tiles.tables(queries, keys, window)), q=(q,), number=(q[..., 0],))
    return out, logz[:, :, :, 0]


def backward(how, q, k, v, queries: Keys, keys: Keys, window, dout, logz, delta):
    """dq, dk, dv."""
    parents = queries.parents is not None

    def dq_kernel(needs, q_ref, k_ref, v_ref, q_places, k_places, dout_ref, logz_ref, delta_ref, dq_ref, dq):
        @pl.when(pl.program_id(4) == 0)
        def _():
            dq[...] = jnp.zeros_like(dq)

        @pl.when(_is_needed(needs, 3, 4))
        def _():
            k, mask = k_ref[...], tiles.seen(_columns(q_places, parents), _rows(k_places))
            logz, delta = _column(logz_ref), _column(delta_ref)
            _, dscores = tiles.gradients(how, q_ref[...], k, dout_ref[...], v_ref[...], logz, delta, mask)
            dq[...] += tiles.product(dscores, k, 1, 0)

        @pl.when(pl.program_id(4) == pl.num_programs(4) - 1)
        def _():
            dq_ref[...] = dq[...].astype(dq_ref.dtype)

    def dkv_kernel(needs, q_ref, k_ref, v_ref, q_places, k_places, dout_ref, logz_ref, delta_ref, dk_ref, dv_ref, dk, dv):
        @pl.when((pl.program_id(3) == 0) & (pl.program_id(4) == 0))
        def _():
            dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

        @pl.when(_is_needed(needs, 2, 4))
        def _():
            q, dout, mask = q_ref[...], dout_ref[...], tiles.seen(_rows(q_places, parents), _columns(k_places))
            probs, dscores = tiles.gradients(how, k_ref[...], q, v_ref[...], dout, logz_ref[...], delta_ref[...], mask)
            dk[...] += tiles.product(dscores, q, 1, 0)
            dv[...] += tiles.product(probs, dout, 1, 0)

        @pl.when((pl.program_id(3) == pl.num_programs(3) - 1) & (pl.program_id(4) == pl.num_programs(4) - 1))
        def _():
            dk_ref[...], dv_ref[...] = dk[...].astype(dk_ref.dtype), dv[...].astype(dv_ref.dtype)

    view, h = _by_query(q, k), q.shape[-1]
    blocks = needed(queries, keys, window, view.q_block, view.k_block)
    arrays = q, k, v, *tiles.tables(queries, keys, window), dout, logz[:, :, :, None], delta[:, :, :, None]
    (dq,) = _call(dq_kernel, view, [(view.q_block, h)], (tiles.ranges(blocks), *arrays), q=(q,))
    needs = tiles.ranges(blocks.swapaxes(1, 2))
    dk, dv = _call(dkv_kernel, _by_key(q, k), [(view.k_block, h)] * 2, (needs, *arrays), k=(k, v))
    return dq, dk, dv


def _columns(table, parents: bool = False) -> tiles.Place:
    columns = table[...].T
    return tiles.Place(*(columns[:, n : n + 1] for n in range(4 if parents else 3)))


def _rows(table, parents: bool = False) -> tiles.Place:
    return tiles.Place(*(table[n : n + 1] for n in range(4 if parents else 3)))


def _column(row_ref) -> jax.Array:
    return jnp.broadcast_to(row_ref[...], (SUBLANES, row_ref.shape[1])).T[:, :1]


# ---- what of each array a program sees ----


def _is_needed(needs, outer: int, inner: int):
    """Whether this program has a tile: block `outer` of the grid needs those from `needs[0]` up to `needs[1]`."""
    block = pl.program_id(0) * pl.num_programs(outer) + pl.program_id(outer)
    return needs[0, block] + pl.program_id(inner) < needs[1, block]


def _tile(needs, block, step):
    """The tile of a step; after the last one the same again, so that nothing is loaded."""
    return jnp.minimum(needs[0, block] + step, jnp.maximum(needs[1, block] - 1, 0))


class _View(NamedTuple):
    """Block sizes, the grid, and the parts of queries, keys, their places, and per-query numbers (logz)."""

    q_block: int
    k_block: int
    grid: tuple[int, ...]
    q: pl.BlockSpec
    k: pl.BlockSpec
    q_places: pl.BlockSpec
    k_places: pl.BlockSpec
    number: pl.BlockSpec


def _by_query(q, k) -> _View:
    """Programs are numbered (row, key head, its query head, block of queries, step)."""
    (B, K, G, T, h), S = q.shape, k.shape[2]
    q_block, k_block = block(T), block(S)
    Q = T // q_block
    return _View(
        q_block, k_block, (B, K, G, Q, S // k_block),
        pl.BlockSpec((None, None, None, q_block, h), lambda b, n, g, i, j, needs: (b, n, g, i, 0)),
        pl.BlockSpec((None, None, k_block, h), lambda b, n, g, i, j, needs: (b, n, _tile(needs, b * Q + i, j), 0)),
        pl.BlockSpec((None, tiles.PLACES, q_block), lambda b, n, g, i, j, needs: (b, 0, i)),
        pl.BlockSpec((None, tiles.PLACES, k_block), lambda b, n, g, i, j, needs: (b, 0, _tile(needs, b * Q + i, j))),
        pl.BlockSpec((None, None, None, 1, q_block), lambda b, n, g, i, j, needs: (b, n, g, 0, i)),
    )  # fmt: skip


def _by_key(q, k) -> _View:
    """Programs are numbered (row, key head, block of keys, query head, step)."""
    (B, K, G, T, h), S = q.shape, k.shape[2]
    q_block, k_block = block(T), block(S)
    N = S // k_block
    return _View(
        q_block, k_block, (B, K, N, G, T // q_block),
        pl.BlockSpec((None, None, None, q_block, h), lambda b, n, i, g, j, needs: (b, n, g, _tile(needs, b * N + i, j), 0)),
        pl.BlockSpec((None, None, k_block, h), lambda b, n, i, g, j, needs: (b, n, i, 0)),
        pl.BlockSpec((None, tiles.PLACES, q_block), lambda b, n, i, g, j, needs: (b, 0, _tile(needs, b * N + i, j))),
        pl.BlockSpec((None, tiles.PLACES, k_block), lambda b, n, i, g, j, needs: (b, 0, i)),
        pl.BlockSpec((None, None, None, 1, q_block), lambda b, n, i, g, j, needs: (b, n, g, 0, _tile(needs, b * N + i, j))),
    )  # fmt: skip


def _call(kernel, view: _View, scratch: list[tuple[int, int]], arrays, q=(), k=(), number=()):
    """Run a kernel; `q`, `k`, `number`: arrays that its results have the shapes of, in this order. The first of `arrays`, which says what
    is needed, goes into scalar memory, where a short last axis would be padded."""
    inputs = [view.q, view.k, view.k, view.q_places, view.k_places, view.q, view.number, view.number]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*q, *k)]
    like += [jax.ShapeDtypeStruct((*x.shape[:3], 1, x.shape[3]), jnp.float32) for x in number]
    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=view.grid, in_specs=inputs[: len(arrays) - 1],
        out_specs=[view.q] * len(q) + [view.k] * len(k) + [view.number] * len(number),
        scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in scratch],
    )  # fmt: skip
    order = ("parallel", "parallel", "parallel" if q else "arbitrary", "parallel" if q else "arbitrary", "arbitrary")
    return pl.pallas_call(
        kernel, grid_spec=grid, out_shape=like, interpret=INTERPRET, name=f"splash_{kernel.__name__}",
        compiler_params=tpu.CompilerParams(dimension_semantics=order),
    )(arrays[0].reshape(2, -1), *arrays[1:])  # fmt: skip

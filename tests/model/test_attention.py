"""Blockwise attention against one plain softmax over all scores: values and gradients, whatever hides a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model import attention, tiles
from jaxtune.model.attention import TILE, Tile, attend, attend_cached
from jaxtune.model.attention_mask import Keys, needed, needed_blocks, visible

B, T, H, K, h = 2, 45, 6, 2, 8
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((B, T, H, h)).astype(np.float32)
KV = RNG.standard_normal((2, B, T, K, h)).astype(np.float32)
OUT = RNG.standard_normal((B, T, H, h)).astype(np.float32)
# three documents in the first row; two and padding in the second
SEGMENTS = np.stack([np.repeat([1, 2, 3], 15), np.repeat([1, 2, 0], [20, 14, 11])]).astype(np.int32)
SLOTS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
POSITIONS = SLOTS - np.stack([np.repeat([0, 15, 30], 15), np.repeat([0, 20, 34], [20, 14, 11])]).astype(np.int32)
PARENTS = np.where(SEGMENTS == 3, 1, 0).astype(np.int32)
CASES = {
    "segments": {},
    "window": {"window": 4},
    "softcap": {"cap": 1.5},
    "parents": {"parents": PARENTS},
    "all": {"window": 40, "cap": 1.5, "parents": PARENTS, "sinks": np.asarray([2.0, -1.0, 0.0, 0.5, 1.0, -3.0], np.float32)},
}


def plain(q, k, v, window=0, cap=0.0, parents=None, sinks=None):
    """All scores at once, by loops that follow the docstring of `Keys`; zeros where a query sees nothing."""
    seen = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(t + 1):
                mine = SEGMENTS[b, s] in (SEGMENTS[b, t], *([] if parents is None else [parents[b, t]]))
                near = window == 0 or POSITIONS[b, t] - POSITIONS[b, s] < window
                seen[b, t, s] = mine and near and SEGMENTS[b, s] > 0
    k, v = jnp.repeat(k, H // K, axis=2), jnp.repeat(v, H // K, axis=2)
    scores = jnp.einsum("bthx,bshx->bhts", q, k) * 0.3
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    scores = jnp.where(seen[:, None], scores, -1e30)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (B, H, T, 1))], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., :T] * seen.any(-1)[:, None, :, None]
    return jnp.einsum("bhts,bshx->bthx", probs, v)


def test_chunks_of_positions():
    """What is seen, by hand; the kernels' tables agree, and no block is skipped that is partly seen."""
    keys, chunk = Keys(SLOTS, POSITIONS, SEGMENTS), 6
    seen = np.asarray(visible(keys, keys, -chunk))
    for b, t, s in np.ndindex(B, T, T):
        own = SEGMENTS[b, t] == SEGMENTS[b, s] > 0 and POSITIONS[b, t] // chunk == POSITIONS[b, s] // chunk
        assert seen[b, t, s] == (s <= t and own)
    queries, of_keys = (tiles.Place(*table.swapaxes(0, 1)[:3]) for table in tiles.tables(keys, keys, -chunk))
    columns = tiles.Place(*(x[:, :, None] for x in queries[:3]))
    np.testing.assert_array_equal(tiles.seen(columns, tiles.Place(*(x[:, None] for x in of_keys[:3]))), seen)
    possible = np.asarray(needed(keys, keys, -chunk, 5, 3))
    blocks = seen.reshape(B, T // 5, 5, T // 3, 3).any((2, 4))
    assert (possible >= blocks).all() and possible.mean() < 0.4


def ours(q, k, v, window=0, cap=0.0, parents=None, sinks=None, tile=TILE):
    queries = Keys(SLOTS, POSITIONS, SEGMENTS, parents)
    return attend(q, k, v, queries, queries._replace(parents=None), scale=0.3, window=window, cap=cap, tile=tile, sinks_H=sinks)


@pytest.fixture(params=[(128, 8, 1024), (8, 8, 64), (8, 2, 64), (8, 8, 16), (8, 8, 8)], ids=str)
def tile(request, monkeypatch):
    """One block; one span per block; spans of several blocks, the last one not full; also blocks of keys: larger than those of queries, and
    equal."""
    queries, spans, keys = request.param
    monkeypatch.setattr(attention, "SPANS", spans)
    return Tile(queries, keys)


PLAIN = {}  # of a case, for all tiles


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(tile, case):
    settings, sinks = dict(CASES[case]), CASES[case].get("sinks")
    settings.pop("sinks", None)

    def through(function):
        return lambda q, k, v, sinks: (function(q, k, v, **settings, sinks=sinks) * OUT).sum()

    of = (0, 1, 2) if sinks is None else (0, 1, 2, 3)

    def value_and_gradient(function):
        return function(Q, *KV, **CASES[case]), jax.grad(through(function), of)(Q, *map(jnp.asarray, KV), sinks)

    if case not in PLAIN:
        PLAIN[case] = value_and_gradient(plain)
    value, gradient = value_and_gradient(functools.partial(ours, tile=tile))
    np.testing.assert_allclose(value, PLAIN[case][0], atol=2e-6)
    for one, other in zip(gradient, PLAIN[case][1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_padding_is_zero_and_gives_no_gradient(tile):
    assert np.all(np.asarray(ours(Q, *KV, tile=tile))[SEGMENTS == 0] == 0)
    grads = jax.grad(lambda q, k, v: jnp.square(ours(q, k, v, tile=tile)).sum(), (0, 1, 2))(Q, *map(jnp.asarray, KV))
    assert all(np.all(np.asarray(g)[SEGMENTS == 0] == 0) and np.all(np.isfinite(g)) for g in grads)


def test_more_slots_than_queries(tile, monkeypatch):
    """As with a cache: the queries are the last tokens, and slots after them are empty. In a cache of layers their block is not read."""
    whole = ours(Q, *KV)
    k, v = (np.concatenate([x, np.full((B, 5, K, h), 7, np.float32)], 1) for x in KV)

    def empty(x):
        return np.concatenate([x, np.zeros((B, 5), np.int32)], 1)

    keys = Keys(np.broadcast_to(np.arange(T + 5), (B, T + 5)), empty(POSITIONS), empty(SEGMENTS))
    queries = Keys(*(x[:, 10:] for x in (SLOTS, POSITIONS, SEGMENTS)))
    np.testing.assert_allclose(attend(Q[:, 10:], k, v, queries, keys, scale=0.3, tile=tile), whole[:, 10:], atol=2e-6)
    for block, rest in ((64, 7), (5, np.nan)):
        monkeypatch.setattr(attention, "CACHE_BLOCK", block)
        k[:, T:], v[:, T:] = rest, rest
        layers = (np.stack([np.full_like(x, np.nan), x]).swapaxes(2, 3) for x in (k, v))
        np.testing.assert_allclose(attend_cached(Q[:, 10:], *layers, 1, queries, keys, scale=0.3), whole[:, 10:], atol=2e-6)


def test_scores_are_never_all_there():
    """Temporaries of the backward pass grow with the length, not with its square."""

    def temporaries(length):
        x, kv = (jax.ShapeDtypeStruct((1, length, heads, h), jnp.float32) for heads in (H, K))
        slots = jnp.broadcast_to(jnp.arange(length), (1, length))
        keys = Keys(slots, slots, jnp.ones((1, length), jnp.int32))
        grad = jax.grad(lambda q, k, v: jnp.square(attend(q, k, v, keys, keys, scale=0.3, tile=Tile(16, 32))).sum(), (0, 1, 2))
        return jax.jit(grad).lower(x, kv, kv).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(256), temporaries(512)
    assert long < 2.1 * short
    assert long < 512 * 512 * H * 4


def test_blocks_of_keys_that_nobody_sees_are_left_out():
    """Of four blocks of keys, only those of the third document's queries; with its parent, from that one's first on."""
    block = 15
    keys = Keys(*(x[:1] for x in (SLOTS, POSITIONS, SEGMENTS)))
    last = jax.tree.map(lambda x: x[:, 35:40], keys)
    assert [int(x) for x in needed_blocks(block, last, keys, 0)] == [2, 3]
    assert [int(x) for x in needed_blocks(block, last._replace(parents=jnp.ones((1, 5), jnp.int32)), keys, 0)] == [0, 3]
    padding = last._replace(segments=jnp.zeros((1, 5), jnp.int32))
    first, end = needed_blocks(block, padding, keys, 0)
    assert int(first) >= int(end)
    alone = keys._replace(segments=jnp.ones_like(keys.segments), positions=keys.slots)
    assert [int(x) for x in needed_blocks(block, jax.tree.map(lambda x: x[:, 16:20], alone), alone, 0)] == [0, 2]
    assert [int(x) for x in needed_blocks(block, jax.tree.map(lambda x: x[:, 35:40], alone), alone, 4)] == [2, 3]

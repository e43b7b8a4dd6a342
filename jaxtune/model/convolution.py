"""The short convolution of layers that carry a state from token to token, within a token's own document, and the layer that consists of
nothing else (LFM2's, arXiv 2511.23404)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.model.attention_mask import Keys
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain
from jaxtune.model.memory import Memory, Place
from jaxtune.model.weight import linear


def short_convolution(
    config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, kv: Memory | None
) -> tuple[jax.Array, Memory | None]:
    """The mixer of such a layer: `out(c * convolution(b * u))` for `b, c, u = in_bcu x`, and the memory updated with these tokens."""
    b_BTC, c_BTC, u_BTC = jnp.split(checkpoint_name(linear(w["in_bcu"], x_BTD, w.get("in_bcu_bias")), "attention"), 3, axis=-1)
    first_BT = begins(place.queries, None if kv is None else place.keys)
    # a row's tokens on one device: each depends on those before it
    gated_BTC = constrain(config.mesh, b_BTC * u_BTC, "rows", None, "heads")
    mixed_BTC, tail = convolution(w["conv"][:, 0], gated_BTC, first_BT, None if kv is None else at(kv.tail, place.number))
    kv = kv if kv is None else kv._replace(tail=put(kv.tail, tail, place.number))
    return linear(w["out"], c_BTC * mixed_BTC, w.get("out_bias")), kv


def begins(queries: Keys, keys: Keys | None) -> jax.Array:
    """bool `[B, T]`: whether a token is the first of its document (or of padding). `keys`, with a cache: the previous tokens' places."""
    now, before = queries.segments, jnp.zeros_like(queries.segments[:, :1])
    if keys is not None:
        before = jax.lax.dynamic_slice_in_dim(keys.segments, jnp.maximum(queries.slots[0, 0] - 1, 0), 1, axis=1)
    return now != jnp.concatenate([before, now[:, :-1]], axis=1)


def at(stacked: jax.Array, number: jax.Array) -> jax.Array:
    """What a layer keeps, from the memory's stack."""
    return jax.lax.dynamic_index_in_dim(stacked, number, keepdims=False)


def put(stacked: jax.Array, own: jax.Array, number: jax.Array) -> jax.Array:
    """The memory's stack with a layer's new values."""
    return jax.lax.dynamic_update_index_in_dim(stacked, own.astype(stacked.dtype), number, 0)


def convolution(
    w_CW: jax.Array, x_BTC: jax.Array, begins_BT: jax.Array, tail_BWC: jax.Array | None = None, bias_C: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`sum_j w[:, W - 1 - j] x_{t - j} + bias` for each channel within the token's own document, in x's dtype; and the new tail.

    `tail_BWC`: the W - 1 tokens before these, 0 if they belong to another document than the last one; None: there are none.
    """
    (B, T, C), W = x_BTC.shape, w_CW.shape[1]
    tail_BWC = jnp.zeros((B, W - 1, C), x_BTC.dtype) if tail_BWC is None else tail_BWC
    x = jnp.concatenate([tail_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    number = jnp.pad(jnp.cumsum(begins_BT, axis=1), ((0, 0), (W - 1, 0)))[..., None]  # documents begun so far
    y = sum(
        jnp.where(number[:, j : j + T] == number[:, W - 1 :], x[:, j : j + T], 0).astype(jnp.float32) * w_CW[:, j].astype(jnp.float32)
        for j in range(W)
    )
    y = jnp.asarray(y) if bias_C is None else y + bias_C.astype(jnp.float32)
    return y.astype(x_BTC.dtype), jnp.where(number[:, T:] == number[:, -1:], x[:, T:], 0)

"""Several residual streams, of which a layer's parts see one (AltUp, arXiv 2301.13310, as in Gemma 3n).

Each layer predicts its streams from those before it, applies its parts to the active one, and corrects all by what these have changed. The
streams lie side by side, `[B, T, n D]`, so that stacks of layers and their backward passes need not know of them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtune.model.block import input_network, norm
from jaxtune.model.families import ModelConfig
from jaxtune.model.families.factors import Streams
from jaxtune.model.weight import alone, linear

_LEAST = 1e-5  # of a mean square that is divided by
_NONE = 1e-30  # of any, since the root's derivative at 0 is infinite


def entered(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """The first layer's streams: x, and projections of it with its magnitude."""
    if config.streams is None:
        return x_BTD
    others = [_as_large_as(x_BTD, linear(w, x_BTD)) for w in _matrices(config.streams, params, "enter")]
    return jnp.concatenate([x_BTD, *others], -1)


def left(config: ModelConfig, params: dict, x_BTS: jax.Array) -> jax.Array:
    """The mean of the last layer's streams, the others projected and given the first one's magnitude."""
    if config.streams is None:
        return x_BTS
    first, *others = jnp.split(x_BTS, config.streams.count, -1)
    matrices = _matrices(config.streams, params, "leave")
    others = [_as_large_as(first, linear(w, x_BTD)) for w, x_BTD in zip(matrices, others, strict=True)]
    return sum([first, *others]) / jnp.asarray(config.streams.count, first.dtype)


def predicted(config: ModelConfig, w: Mapping, x_BTS: jax.Array) -> jax.Array:
    """The streams `[B, T, n, D]` before a layer: `x_i + sum_j c_ij x_j`, with coefficients made of the active one."""
    assert config.streams is not None
    n = config.streams.count
    x_BTnD = x_BTS.reshape(*x_BTS.shape[:2], n, -1)
    made_BTn = _modalities(config, w, x_BTnD[:, :, config.streams.active])
    c_BTnn = linear(w["streams_predict"], made_BTn).reshape(*made_BTn.shape[:2], n, n)
    return x_BTnD + jnp.einsum("BTij,BTjD->BTiD", c_BTnn, x_BTnD)


def corrected(config: ModelConfig, w: Mapping, x_BTnD: jax.Array, active_BTD: jax.Array) -> jax.Array:
    """The streams `[B, T, n D]` after a layer whose parts made `active` of the predicted active one: `x_i + (1 + c_i) (active - x_a)`. All
    but the first get the layer's own input too, gated by the active one."""
    assert config.streams is not None
    a = config.streams.active
    c_BTn = 1 + linear(w["streams_correct"], _modalities(config, w, active_BTD))
    x_BTnD = x_BTnD + c_BTn[..., None] * (active_BTD - x_BTnD[:, :, a])[:, :, None]
    seen = x_BTnD[:, :, a]
    seen = seen * w["streams_scale"].astype(seen.dtype) if config.streams.scaled else seen
    x_BTnD = x_BTnD.at[:, :, 1:].add(input_network(config, w, seen)[:, :, None])
    return x_BTnD.reshape(*active_BTD.shape[:2], -1)


def _modalities(config: ModelConfig, w: Mapping, x_BTD: jax.Array) -> jax.Array:
    routed = norm(config, w, "streams_norm", x_BTD) * jnp.asarray(1 / config.hidden_size, x_BTD.dtype)
    return jnp.tanh(linear(w["streams_router"], routed).astype(jnp.float32)).astype(x_BTD.dtype)


def _matrices(streams: Streams, params: dict, name: str) -> list:
    """The projections of all streams but the first."""
    return [alone(params["streams"][f"{name}_{n}"]) for n in range(streams.count - 1)]


def _as_large_as(like_BTD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """x with the root mean square of another array."""

    def square(x: jax.Array) -> jax.Array:
        return jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)

    ratio = jnp.sqrt(jnp.maximum(square(like_BTD), _NONE)) / jnp.sqrt(jnp.maximum(square(x_BTD), _LEAST))
    return (x_BTD.astype(jnp.float32) * ratio).astype(x_BTD.dtype)

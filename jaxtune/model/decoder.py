"""The decoder: tokens -> hidden states -> logits, as pure functions of (config, params).

Layers of one stack run under `lax.scan`. Optional parts of a block (biases, query/key norms) are used where the tree has them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxtune.model.attention import Keys, attend
from jaxtune.model.families import ModelConfig
from jaxtune.model.rope import cos_sin, rotate
from jaxtune.model.weight import linear, rows

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens so far, `[L, B, S, K, h]`, and where they stand, `[B, S]`; `length` slots are filled."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segments: jax.Array
    length: jax.Array


def init_cache(config: ModelConfig, batch: int, size: int) -> Cache:
    """An empty cache for `batch` rows of up to `size` tokens."""
    kv = jnp.zeros((config.num_layers, batch, size, config.num_kv_heads, config.head_dim), config.dtype)
    ids = jnp.zeros((batch, size), jnp.int32)
    return Cache(kv, kv, ids, ids, jnp.zeros((), jnp.int32))


class Output(NamedTuple):
    """What the decoder gives: `hidden_BTD` after the final norm, and the cache with these tokens added (None without one)."""

    hidden_BTD: jax.Array
    cache: Cache | None


def embed(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Token embeddings `[B, T, D]` in the compute dtype."""
    return rows(params["embed"], tokens_BT, config.dtype)


def hidden(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: Cache | None = None,
    embeds_BTD: jax.Array | None = None,
) -> Output:
    """Hidden states after the final norm.

    Positions default to 0, 1, 2, ... and segments to 1 (no padding). With `cache`, the tokens follow those in it.
    `embeds_BTD` stands in for the token embeddings (noise, soft prompts).
    """
    B, T = tokens_BT.shape
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) + (0 if cache is None else cache.length)
    start = 0 if cache is None else cache.length
    queries = Keys(jnp.broadcast_to(jnp.arange(T) + start, (B, T)), positions_BT, segments_BT)
    keys = queries
    if cache is not None:
        cache = cache.replace(
            positions=jax.lax.dynamic_update_slice(cache.positions, positions_BT, (0, start)),
            segments=jax.lax.dynamic_update_slice(cache.segments, segments_BT, (0, start)),
        )
        keys = Keys(jnp.broadcast_to(jnp.arange(cache.k.shape[2]), cache.positions.shape), cache.positions, cache.segments)

    x_BTD = embed(config, params, tokens_BT) if embeds_BTD is None else embeds_BTD.astype(config.dtype)
    cos, sin = cos_sin(config.ropes, positions_BT, config.head_dim)

    def layer(carry, scanned):
        x_BTD, kv = carry
        weights, number, rope, window = scanned
        place = Place(cos[rope], sin[rope], window, queries, keys, number)
        return block(config, weights, x_BTD, place, kv), None

    kv = None if cache is None else (cache.k, cache.v)
    for name, layers in zip(params["layers"], config.stacks, strict=True):
        numbers = jnp.asarray(layers)
        ropes = jnp.asarray([config.layer_ropes[i] % (len(config.ropes) + 1) for i in layers])
        windows = jnp.asarray([config.layer_windows[i] for i in layers])
        (x_BTD, kv), _ = jax.lax.scan(_remat(config, layer), (x_BTD, kv), (params["layers"][name], numbers, ropes, windows))
    if cache is not None:
        cache = cache.replace(k=kv[0], v=kv[1], length=cache.length + T)
    return Output(rms_norm(config, params["norm"], x_BTD), cache)


def forward(config: ModelConfig, params: dict, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
    """Logits, float32 `[B, T, V]`, of int32 tokens `[B, T]`; segment 0 is padding."""
    return logits(config, params, hidden(config, params, tokens_BT, positions_BT, segments_BT).hidden_BTD)


def logits(config: ModelConfig, params: dict, hidden_D: jax.Array) -> jax.Array:
    """float32 logits `[..., V]` of hidden states `[..., D]`."""
    return linear(output_head(params), hidden_D).astype(jnp.float32)


def output_head(params: dict):
    """The matrix `[V, D]` that makes logits: the embedding itself where the head is tied."""
    return params["head"] if "head" in params else params["embed"]


class Place(NamedTuple):
    """Where a layer works: its rotation, its window, the tokens' places, its number (its slice of the cache)."""

    cos: jax.Array
    sin: jax.Array
    window: jax.Array
    queries: Keys
    keys: Keys
    number: jax.Array


def block(config: ModelConfig, w: dict, x_BTD: jax.Array, place: Place, kv):
    """One layer; `kv` is the cache's (k, v) of all layers, or None. Returns x and kv."""
    attn, kv = attention(config, w, rms_norm(config, w["attn_norm"], x_BTD), place, kv)
    x_BTD = x_BTD + attn
    return x_BTD + mlp(config, w, rms_norm(config, w["mlp_norm"], x_BTD)), kv


def attention(config: ModelConfig, w: dict, x_BTD: jax.Array, place: Place, kv):
    """Self-attention with grouped key/value heads and rotary positions."""
    B, T, _ = x_BTD.shape

    def heads(name: str) -> jax.Array:
        return linear(w[name], x_BTD, w.get(f"{name}_bias")).reshape(B, T, -1, config.head_dim)

    q, k, v = heads("q"), heads("k"), heads("v")
    q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
    if kv is not None:
        start = (place.number, 0, place.queries.slots[0, 0], 0, 0)
        kv = tuple(jax.lax.dynamic_update_slice(cached, new[None], start) for cached, new in zip(kv, (k, v), strict=True))
        k, v = (jax.lax.dynamic_index_in_dim(cached, place.number, keepdims=False) for cached in kv)
    mixed = attend(q, k, v, place.queries, place.keys, scale=config.attention_scale, window=place.window)
    return linear(w["o"], mixed.reshape(B, T, -1), w.get("o_bias")), kv


def mlp(config: ModelConfig, w: dict, x_BTD: jax.Array) -> jax.Array:
    """Gated feed-forward, `down(act(gate x) * up x)`."""
    gate = ACTIVATIONS[config.hidden_act](linear(w["gate"], x_BTD, w.get("gate_bias")))
    return linear(w["down"], gate * linear(w["up"], x_BTD, w.get("up_bias")), w.get("down_bias"))


def rms_norm(config: ModelConfig, scale: jax.Array, x: jax.Array) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * scale`; the mean in float32, the product in x's dtype, as Llama does."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + config.norm_eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def _remat(config: ModelConfig, layer):
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if config.remat == "none":
        return layer
    return jax.checkpoint(layer, policy=policies[config.remat], prevent_cse=False)  # a scan cannot be CSE'd across

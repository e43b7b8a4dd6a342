"""The decoder: tokens -> hidden states -> logits, as pure functions of (config, params).

model/stack.py runs a stack of identical layers, model/block.py one layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import ModelError, check_argument
from jaxtune.model import streams, virtual_tokens
from jaxtune.model.attention_mask import Keys
from jaxtune.model.block import norm
from jaxtune.model.embedding import lookup
from jaxtune.model.families import ModelConfig
from jaxtune.model.layer import Shared
from jaxtune.model.layer_inputs import LayerInputs
from jaxtune.model.layers import softcap
from jaxtune.model.layout import constrain
from jaxtune.model.memory import Memory
from jaxtune.model.moe import RouterSums
from jaxtune.model.rope import cos_sin
from jaxtune.model.stack import run
from jaxtune.model.weight import linear, rows


class Cache(struct.PyTreeNode):
    """What the layers keep of the tokens so far, and the places of keys and values, `[B, S]`; `length` slots are filled."""

    memory: Memory
    positions: jax.Array
    segments: jax.Array
    length: jax.Array


def init_cache(config: ModelConfig, batch: int, size: int) -> Cache:
    """An empty cache for `batch` rows of up to `size` tokens."""
    shapes = [(len(own), batch, at.num_kv_heads, size, at.head_dim) for own in config.memories for at in [config.at(own[0])]]
    kv = tuple(jnp.zeros(shape, config.dtype) for shape in shapes)
    state = tail = None
    if (r := config.recurrent) is not None:
        state = None if r.state is None else jnp.zeros((len(r.layers), batch, *r.state), jnp.float32)
        tail = jnp.zeros((len(r.layers), batch, r.kernel - 1, r.channels), config.dtype)
    ids = jnp.zeros((batch, size), jnp.int32)
    return Cache(Memory(kv, kv, state, tail), ids, ids, jnp.zeros((), jnp.int32))


class Output(NamedTuple):
    """The decoder's result: `hidden_BTD` after the final norm, the cache with these tokens added (None without one), and where the routers
    of expert layers sent the tokens (`moe.load_balancing_loss`; None without experts)."""

    hidden_BTD: jax.Array
    cache: Cache | None
    aux: RouterSums | None = None


def embed(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Token embeddings `[B, T, D]` in the compute dtype, as from transformers' embedding layer; padding gets no gradient."""
    return lookup(config, params["embed"], tokens_BT, config.embed_scale)


def entered(config: ModelConfig, params: dict, x_BTD: jax.Array, queries: Keys, keys: Keys) -> tuple[jax.Array, Shared]:
    """The first layer's input for embeddings `[B, T, D]`, of all streams, and what all layers share."""
    if config.embedding_multiplier != 1.0:
        x_BTD = x_BTD * jnp.asarray(config.embedding_multiplier, config.dtype)
    if "positions" in params:
        x_BTD = x_BTD + rows(params["positions"], queries.positions + config.position_offset, config.dtype)
    x_BTD = norm(config, params, "embed_norm", constrain(config.mesh, x_BTD, "rows", "tokens", None))
    if config.alibi is not None:
        keys = keys._replace(bias=config.alibi.bias(keys.positions))
    return streams.entered(config, params, x_BTD), Shared(*cos_sin(config.ropes, queries.positions, queries.segments), queries, keys)


def hidden(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    *,
    cache: Cache | None = None,
    embeds_BTD: jax.Array | None = None,
    parents_BT: jax.Array | None = None,
    first: bool | None = None,
) -> Output:
    """Hidden states after the final norm.

    Positions default to 0, 1, 2, ... and segments to 1 (no padding). With `cache`, the tokens follow those in it. `embeds_BTD` replaces the
    token embeddings (noise, soft prompts). `parents_BT`: the segment that a token's own segment continues and can see (0: none); its
    positions then continue from there. `first`: whether virtual tokens precede these, if the tree has some (None: without a cache).
    """
    (B, T), given = tokens_BT.shape, positions_BT is not None
    if config.carries_state and (parents_BT is not None or virtual_tokens.count(params)):
        what = "shared prompts (data.shared_prompts: false)" if parents_BT is not None else "virtual tokens (method: lora)"
        raise ModelError(f"layers of this {config.model_type} model carry a state through each document, so that there are no {what}")
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) + (0 if cache is None else cache.length)
    x_BTD = embed(config, params, tokens_BT) if embeds_BTD is None else embeds_BTD.astype(config.dtype)
    P, first = virtual_tokens.count(params), cache is None if first is None else first
    if P and (first or given):  # otherwise the cache's length counts them
        positions_BT = positions_BT + P
    if P and first:
        x_BTD, T = virtual_tokens.before(params, x_BTD), T + P
        positions_BT = virtual_tokens.widened(params, positions_BT, jnp.arange(P))
        segments_BT = virtual_tokens.widened(params, segments_BT, virtual_tokens.SEGMENT)
        parents_BT = None if parents_BT is None else virtual_tokens.widened(params, parents_BT, 0)
    start = 0 if cache is None else cache.length
    queries = Keys(jnp.broadcast_to(jnp.arange(T) + start, (B, T)), positions_BT, segments_BT, parents_BT)
    keys = queries._replace(parents=None, common=segments_BT == virtual_tokens.SEGMENT if P else None)
    if cache is not None:
        cache = cache.replace(
            positions=jax.lax.dynamic_update_slice(cache.positions, positions_BT, (0, start)),
            segments=jax.lax.dynamic_update_slice(cache.segments, segments_BT, (0, start)),
        )
        keys = Keys(jnp.broadcast_to(jnp.arange(cache.positions.shape[1]), cache.positions.shape), cache.positions, cache.segments)
        keys = keys._replace(common=cache.segments == virtual_tokens.SEGMENT if P else None)

    inputs = LayerInputs(config, params, tokens_BT, x_BTD)
    x_BTD, shared = entered(config, params, x_BTD, queries, keys)
    kv, routed = None if cache is None else cache.memory, []
    for pattern in config.patterns:
        weights = []
        for stack in pattern.numbers:
            own = virtual_tokens.with_prefix(config, params, stack) if first else params["layers"][str(stack)]
            weights.append(inputs.added_to(own, stack, x_BTD, shared))
        x_BTD, kv, sums = run(config, pattern, weights, x_BTD, shared, kv)
        routed += [of_stack for of_stack in sums if of_stack is not None]
    if cache is not None and kv is not None:
        cache = cache.replace(memory=kv, length=cache.length + T)
    aux = jax.tree.map(lambda *x: sum(x), *routed) if routed else None
    x_BTD = x_BTD[:, P:] if P and first else x_BTD
    return Output(norm(config, params, "norm", streams.left(config, params, x_BTD)), cache, aux)


def forward(config: ModelConfig, params: dict, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
    """Logits, float32 `[B, T, V]`, for int32 tokens `[B, T]`, at every position: those at t predict the token after it.

    A token sees the earlier tokens of its own segment. `segments_BT`: 0 is padding, 1, 2, ... documents (a tokenizer's attention_mask
    works); by default all 1. `positions_BT`: positions inside a document; by default 0, 1, 2, ... of the row. Pure: may be jitted,
    differentiated by `params`, vmapped, and given arrays sharded over a mesh. Only reverse-mode derivatives are defined: `jax.grad`, and
    for dense or 8-bit weights without experts a `jax.grad` of it; not `jax.jvp`. Raises ModelError for tokens of another shape or type, and
    (except when traced) for those that the vocabulary lacks.
    """
    check_argument("config", config, ModelConfig, "write jt.forward(model.config, model.params, tokens)")
    tokens_BT = jnp.asarray(tokens_BT)
    whole = jnp.issubdtype(tokens_BT.dtype, jnp.integer)
    if tokens_BT.ndim != 2 or not tokens_BT.size or not whole:
        hint = "one row is tokens[None]" if whole else "tokens.astype(int)"
        raise ModelError(f"the tokens are {tokens_BT.dtype} {list(tokens_BT.shape)}; they have to be whole numbers [B, T]: {hint}")
    if not isinstance(tokens_BT, jax.core.Tracer) and tokens_BT.is_fully_addressable:
        known = np.asarray(tokens_BT)  # also inside another function's trace, where jnp would turn constants into tracers
        least, most = int(known.min()), int(known.max())
        if least < 0 or most >= config.vocab_size:
            raise ModelError(f"the tokens are from {least} to {most}; this model's are from 0 to {config.vocab_size - 1}")
    return logits(config, params, hidden(config, params, tokens_BT, positions_BT, segments_BT).hidden_BTD)


def logits(config: ModelConfig, params: dict, hidden_D: jax.Array) -> jax.Array:
    """float32 logits `[..., V]` of hidden states `[..., D]`."""
    head = output_head(params)
    return logits_transform(config, linear(head["head"], hidden_D, head.get("head_bias")).astype(jnp.float32))


def scores(config: ModelConfig, params: dict, hidden_D: jax.Array) -> jax.Array:
    """float32 scores `[..., num_labels]` of hidden states `[..., D]` by a scoring head; the product is computed in float32."""
    return linear(params["score"], hidden_D.astype(jnp.float32), params.get("score_bias"))


def values(params: dict, hidden_D: jax.Array) -> jax.Array:
    """float32 values `[...]` of hidden states `[..., D]` by a value head; the product is computed in float32."""
    return linear(params["value"], hidden_D.astype(jnp.float32), params["value_bias"])[..., 0]


def logits_transform(config: ModelConfig, raw_logits: jax.Array) -> jax.Array:
    """A family's elementwise transform of the head's output: `logits / scaling`, then `cap * tanh(logits / cap)`."""
    if config.logits_scaling != 1.0:
        raw_logits = raw_logits / config.logits_scaling
    return softcap(raw_logits, config.logits_softcap)


def output_head(params: dict) -> dict:
    """What produces logits: the matrix `head [V, D]`, or the tied embedding, and `head_bias [V]` if there is one.

    Raises ModelError for a model that scores instead.
    """
    if "score" in params:
        raise ModelError("the model has a scoring head in place of the vocabulary's, so it writes no text; score texts with jt.score")
    head = {"head": params["head"] if "head" in params else params["embed"]}
    return head | {"head_bias": params["head_bias"]} if "head_bias" in params else head

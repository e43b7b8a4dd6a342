"""Linear attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464): a layer keeps one matrix per head, whatever the text's
length.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T,    o_t = S_t^T q_t

Tokens are processed in chunks: inside a chunk the updates are one triangular system, solved by products (arXiv 2406.06484), so that a row
is a few products per chunk and one step of a scan. The backward pass computes a block of chunks again from the state that entered it: only
the inputs and a state every `BLOCK` tokens are kept. At a document's first token the state is reset to 0, and the convolution looks no
further back.

Mamba-2's layers (model/mamba.py) are the same without the erasing term, and with queries and keys that are not normalised (arXiv
2405.21060):

    S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.model.convolution import at, begins, convolution, put
from jaxtune.model.families import ModelConfig
from jaxtune.model.families.recurrent import DeltaNet, Recurrent
from jaxtune.model.layers import ACTIVATIONS, rms_norm
from jaxtune.model.layout import constrain
from jaxtune.model.memory import Memory, Place
from jaxtune.model.weight import linear

CHUNK, BLOCK = 64, 512  # tokens


def delta_net(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, kv: Memory | None) -> tuple[jax.Array, Memory | None]:
    """The mixer of a linear layer: `out(norm(rule(convolution(in_qkv x))) * silu(in_z x))`, and the memory updated with these tokens."""
    assert config.delta is not None
    (B, T, _), d = x_BTD.shape, config.delta

    def whole(x: jax.Array, *shape: int) -> jax.Array:
        """Heads sharded over the mesh, a row's tokens on one device: the state passes through all of them."""
        x = x.reshape(B, T, *shape)
        return constrain(config.mesh, x, "rows", None, "heads", *(None,) * (x.ndim - 3))

    begins_BT = begins(place.queries, None if kv is None else place.keys)
    qkv_BTC, gate_BTC, b_BTH, a_BTH = _projections(d, w, x_BTD)
    qkv_BTC = whole(checkpoint_name(qkv_BTC, "attention"), d.channels)
    gate_BTHv = checkpoint_name(gate_BTC, "attention").reshape(B, T, d.value_heads, d.value_dim)
    tail, state = (None, None) if kv is None else (at(kv.tail, place.number), at(kv.state, place.number))
    conv_CW = w["conv"] if "conv" in w else jnp.concatenate([w[f"conv_{part}"] for part in "qkv"])
    mixed_BTC, tail = convolution(conv_CW[:, 0], qkv_BTC, begins_BT, tail)
    keys, values, width = (d.key_heads, d.key_dim), (d.value_heads, d.value_dim), d.key_heads * d.key_dim
    q, k, v = jnp.split(ACTIVATIONS[config.hidden_act](mixed_BTC), [width, 2 * width], axis=-1)
    q, k, v = (whole(x, heads, size) for x, heads, size in ((q, *keys), (k, *keys), (v, *values)))

    a_BTH, b_BTH = (whole(x.astype(jnp.float32), d.value_heads) for x in (a_BTH, b_BTH))
    g_BTH = -jnp.exp(w["a_log"].astype(jnp.float32)) * jax.nn.softplus(a_BTH + w["dt_bias"].astype(jnp.float32))
    mixed_BTHv, state = gated_delta_rule(q, k, v, g_BTH, d.most_written * jax.nn.sigmoid(b_BTH), begins_BT, state)
    if kv is not None:
        kv = kv._replace(tail=put(kv.tail, tail, place.number), state=put(kv.state, state, place.number))
    mixed_BTHv = rms_norm(mixed_BTHv, w["state_norm"], None, config.norm_eps if d.norm_eps is None else d.norm_eps).astype(jnp.float32)
    mixed_BTHv = (mixed_BTHv * ACTIVATIONS["silu"](gate_BTHv.astype(jnp.float32))).astype(x_BTD.dtype)
    return linear(w["out"], mixed_BTHv.reshape(B, T, -1), w.get("out_bias")), kv


def _projections(d: DeltaNet, w: Mapping, x_BTD: jax.Array) -> list[jax.Array]:
    """Queries, keys and values of all heads, the gate, and the inputs of writing and decay: from one matrix each, queries, keys and values
    from three (OLMo Hybrid), or all from two that are ordered by key head (Qwen 3 Next)."""

    def projected(name: str) -> jax.Array:
        return linear(w[name], x_BTD, w.get(f"{name}_bias"))

    if "in_q" in w:
        return [jnp.concatenate([projected(f"in_{part}") for part in "qkv"], axis=-1), *map(projected, ("in_z", "in_b", "in_a"))]
    if "in_qkvz" not in w:
        return [projected(name) for name in ("in_qkv", "in_z", "in_b", "in_a")]

    def apart(name: str, *sizes: int) -> list[jax.Array]:
        by_head = projected(name).reshape(*x_BTD.shape[:2], d.key_heads, -1)
        return [part.reshape(*x_BTD.shape[:2], -1) for part in jnp.split(by_head, list(itertools.accumulate(sizes)), axis=-1)]

    group = d.value_heads // d.key_heads
    *qkv, gate = apart("in_qkvz", d.key_dim, d.key_dim, group * d.value_dim)
    return [jnp.concatenate(qkv, axis=-1), gate, *apart("in_ba", group)]


# ---- the rule ----


def gated_delta_rule(
    q_BTKk: jax.Array, k_BTKk: jax.Array, v_BTHv: jax.Array, g_BTH: jax.Array, beta_BTH: jax.Array, begins_BT: jax.Array,
    state_BHkv: jax.Array | None = None, *, erases: bool = True,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`o [B, T, H, v]` in v's dtype and the state after the last token, float32 `[B, H, k, v]`, computed in float32.

    q, k: queries and keys of K heads, each shared by H / K consecutive value heads; both are normalised to length 1, queries then
    multiplied by k^-1/2. g: log of the decay, at most 0. beta: how much of a value is written, 0 to 1 (OLMo Hybrid: 2). begins: tokens
    before which the state is 0. state: that before the first token; None: 0. erases: False is Mamba-2's rule.
    """
    (B, T, K, k), (H, v) = k_BTKk.shape, v_BTHv.shape[2:]
    state = jnp.zeros((B, H, k, v), jnp.float32) if state_BHkv is None else state_BHkv.astype(jnp.float32)
    C = min(CHUNK, 1 << (T - 1).bit_length())
    chunks = -(-T // C)
    blocks = -(-chunks * C // BLOCK)
    size = -(-chunks // blocks)  # chunks per block

    def cut(x, heads):
        """`[blocks, chunks, B, K, H / K, C, ...]`; tokens after the last write nothing and forget nothing."""
        x = jnp.pad(x, [(0, blocks * size * C - T if n == 1 else 0) for n in range(x.ndim)])
        x = x.reshape(B, blocks, size, C, *heads, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2, 0, 4, 5, 3), range(6))

    keys, values = (K, 1), (K, H // K)
    parts = cut(q_BTKk, keys), cut(k_BTKk, keys), cut(v_BTHv, values), cut(g_BTH, values), cut(beta_BTH, values)
    found: Any = _rule(erases, *parts, cut(begins_BT[..., None], (1, 1)), state.reshape(B, K, H // K, k, v))
    out, state = found
    out = jnp.moveaxis(out, range(6), (1, 2, 0, 4, 5, 3)).reshape(B, -1, H, v)[:, :T]
    return out.astype(v_BTHv.dtype), state.reshape(B, H, k, v)


def products(r: Recurrent) -> float:
    """Multiplications of the rule for one token of a layer."""
    if r.state is None:
        return 0.0
    heads, key, value = r.state
    erasing = isinstance(r, DeltaNet)
    of_state, of_chunk = (2 + erasing) * key * value, (1 + erasing) * (key + value) + 10 * CHUNK * erasing
    return heads * (of_state + CHUNK * of_chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(erases, q, k, v, g, beta, begins, state):
    return _rule_fwd(erases, q, k, v, g, beta, begins, state)[0]


def _rule_fwd(erases, q, k, v, g, beta, begins, state):
    parts = q, k, v, g, beta, begins

    def block(state, part):
        after, out = _block(erases, state, part)
        return after, (out.astype(v.dtype), state)

    last, (out, states) = jax.lax.scan(block, state, parts)
    out, states, last = (checkpoint_name(x, "attention") for x in (out, states, last))
    return (out, last), (parts, states)


def _rule_bwd(erases, residuals, cotangents):
    (*parts, begins), states = residuals
    dout, dlast = cotangents

    def block(dstate, scanned):
        (*part, begins), state, dout = scanned
        _, pull = jax.vjp(lambda state, part: _block(erases, state, (*part, begins)), state, part)
        return pull((dstate, dout.astype(jnp.float32)))

    dstate, dparts = jax.lax.scan(block, dlast, ((*parts, begins), states, dout), reverse=True)
    return *dparts, None, dstate


_rule.defvjp(_rule_fwd, _rule_bwd)


def _block(erases, state, part):
    """The state after these chunks `[n, B, K, G, C, ...]`, and o; `begins [n, B, 1, 1, C]`. float32."""
    q, k, v, g, beta, begins = part
    q, k, v = (_unit(q) * q.shape[-1] ** -0.5, _unit(k), v) if erases else (q, k, v)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    place = jnp.arange(q.shape[-2])
    number = jnp.cumsum(begins, axis=-1)  # documents begun in the chunk: only tokens before the first one see the state that enters
    before = (number[..., :, None] == number[..., None, :]) & (place[:, None] >= place)
    g = jnp.cumsum(g, axis=-1)
    decay = jnp.exp(jnp.where(before, g[..., :, None] - g[..., None, :], -jnp.inf))
    entered = jnp.where(number == 0, jnp.exp(g), 0)[..., None]  # the part of the entering state that is left at a token
    left = jnp.where(number == number[..., -1:], jnp.exp(g[..., -1:] - g), 0)[..., None]  # the part of a token that is left at the end

    written, read = beta[..., None] * v, None
    if erases:
        solved = _inverse(beta[..., None] * _product(k, k.mT) * jnp.where(place[:, None] > place, decay, 0))
        written, read = _product(solved, written), _product(solved, beta[..., None] * entered * k)
    inside = _product(q, k.mT) * decay

    def chunk(state, part):
        written, read, inside, q, k, kept = part
        values = written if read is None else written - _product(read, state)
        return state * kept + _product(k.mT, values), _product(q, state) + _product(inside, values)

    return jax.lax.scan(chunk, state, (written, read, inside, q * entered, k * left, entered[..., -1:, :]))


def _unit(x: jax.Array) -> jax.Array:
    """Length 1, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _inverse(a: jax.Array) -> jax.Array:
    """`(1 + a)^-1` for strictly lower triangular matrices `[..., C, C]`, C a power of 2.

    By doubling: if X is the inverse of the diagonal blocks of size s, that for size 2 s is `X - X a X` with the part of a between two
    blocks.
    """
    place = jnp.arange(a.shape[-1])
    x = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    for level in range(a.shape[-1].bit_length() - 1):
        block = place >> level
        between = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        part = jnp.where(between, a, 0)
        x = x - (part if level == 0 else _product(_product(x, part), x))
    return x


def _inverse_fwd(a):
    x = _inverse(a)
    return x, x


def _inverse_bwd(x, dx):
    return (-_product(_product(x.mT, dx), x.mT),)


_inverse.defvjp(_inverse_fwd, _inverse_bwd)

"""One layer: attention and feed-forward around the residual stream. Optional parts are used if the tree has them."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxtune.model import virtual_tokens
from jaxtune.model.attention import attend, attend_cached
from jaxtune.model.convolution import short_convolution
from jaxtune.model.delta import delta_net
from jaxtune.model.families import ModelConfig
from jaxtune.model.families.base import Latent
from jaxtune.model.families.factors import Growth
from jaxtune.model.families.gpt2 import SHARDS
from jaxtune.model.families.recurrent import DeltaNet, Mamba, ShortConvolution
from jaxtune.model.layers import ACTIVATIONS, NORMS, above, scaled, xielu
from jaxtune.model.layout import constrain, each_part, partition, split
from jaxtune.model.mamba import mamba
from jaxtune.model.memory import Memory, Place
from jaxtune.model.moe import RouterSums, mixture
from jaxtune.model.rope import rotate
from jaxtune.model.weight import linear

MIXERS = {DeltaNet: delta_net, Mamba: mamba, ShortConvolution: short_convolution}  # of layers that carry a state
FED = frozenset(("down", "experts_down"))  # parameters of layers with a feed-forward part
RECOMPUTED = ("full", "offload", "groups")  # `remat` modes that compute a layer again in the backward pass
LATENT_EPS = 1e-6  # for the norms of latents: transformers' value, whatever rms_norm_eps is
CHUNK, PACKED_CHUNK = 1024, 4096  # tokens per device in the feed-forward part at a time, by how its matrices are stored


def block(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, kv: Memory | None):
    """One layer; `kv` is the cache's memory of all layers, or None. Returns x, kv and the router's sums (None without experts)."""

    def attend_to(x_BTD):
        x_BTD, mixed, after = norm(config, w, "attn_norm", x_BTD), None, kv
        if "out" in w:
            mixed, after = MIXERS[type(config.recurrent)](config, w, x_BTD, place, after)
        if "o" in w:
            attn, after = attention(config, w, x_BTD, place, after)
            mixed = attn if mixed is None else mixed + attn
        return mixed, after

    if config.remat in RECOMPUTED and kv is None:  # only what attention's backward pass starts from is kept for the rest of the layer
        kept = jax.checkpoint_policies.save_only_these_names("attention")
        attend_to = jax.checkpoint(attend_to, policy=kept)
    attended, sums = x_BTD, None
    if "o" in w or "out" in w:  # otherwise the layer is feed-forward only
        attn, kv = attend_to(x_BTD)
        attended = x_BTD + scaled(norm(config, w, "attn_post_norm", attn), config.residual_multiplier)
    if "laurel_left" in w:
        attended = _beside_attention(config, w, x_BTD, attended)
    if not FED.isdisjoint(w):
        fed, sums = _fed(config, w, x_BTD if config.parallel_residual else attended, place)
        attended = attended + fed
    x_BTD = attended
    if "layer_input" in w and config.streams is None:  # which add it to other streams
        x_BTD = x_BTD + input_network(config, w, x_BTD)
    if "layer_scale" in w:  # transformers does not train it
        x_BTD = x_BTD * jax.lax.stop_gradient(w["layer_scale"]).astype(x_BTD.dtype)
    return x_BTD, kv, sums


def _beside_attention(config: ModelConfig, w: Mapping, x_BTD: jax.Array, attended_BTD: jax.Array) -> jax.Array:
    """`(attended + x + norm(right(left x))) / sqrt(2)` with the normalised x (LAuReL, arXiv 2411.07501)."""
    x_BTD = norm(config, w, "attn_norm", x_BTD)
    low = norm(config, w, "laurel_norm", linear(w["laurel_right"], linear(w["laurel_left"], x_BTD)))
    return (attended_BTD + x_BTD + low) * jnp.asarray(2**-0.5, x_BTD.dtype)


def input_network(config: ModelConfig, w: Mapping, x_BTD: jax.Array) -> jax.Array:
    """What a layer's own input adds: `norm(projection (act(gate x) * input))`."""
    inner = ACTIVATIONS[config.hidden_act](linear(w["input_gate"], x_BTD)) * w["layer_input"]
    return norm(config, w, "input_post_norm", linear(w["input_projection"], inner))


def norm(config: ModelConfig, w: Mapping, name: str, x: jax.Array) -> jax.Array:
    """The norm of that name, or x itself if the tree has none."""
    if name == "mlp_norm" and config.shared_norm:
        name = "attn_norm"
    if name not in w and name not in config.bare_norms:
        return x
    scale = w[name] if name in w else jnp.ones((), x.dtype)
    return NORMS[config.norm](x, scale, w.get(f"{name}_bias"), config.norm_eps)


# ---- attention ----


def attention(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, kv: Memory | None):
    """Self-attention with grouped key/value heads and rotary positions."""
    m = config.multipliers
    q, k, v, gate = projections(config, w, scaled(x_BTD, m.attention_in))
    k = scaled(k, m.key)
    q = _turned(config, w, "q_norm", q, place)
    k, v = (w["shared_k"], w["shared_v"]) if "shared_k" in w else (_turned(config, w, "k_norm", k, place), _value_norm(config, v))
    q = _grown(config.query_growth, q, place)
    if "prefix" in w:
        k, v = virtual_tokens.put_in(w["prefix"], k, v)
    q = constrain(config.mesh, q, "rows", "tokens", "heads", None)
    k, v = (constrain(config.mesh, x, "rows", None, "heads", None) for x in (k, v))
    if kv is not None:
        kv = _kept(kv, k, v, place)
    if kv is None or k.shape[1] == place.keys.slots.shape[1]:  # tokens that fill the cache see nothing else
        mixed = _attend(config, q, k, v, w.get("sinks"), place, config.attention if kv is None else "xla")
    else:
        how = {"scale": config.attention_scale, "window": place.window, "cap": config.attention_softcap, "sinks_H": w.get("sinks")}
        mixed = attend_cached(q, kv.k[place.group], kv.v[place.group], place.number, place.queries, place.keys, **how)
    mixed = mixed if config.latent is None else mixed[..., : config.latent.value]
    mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
    return scaled(linear(w["o"], mixed.reshape(*x_BTD.shape[:2], -1), w.get("o_bias")), m.attention_out), kv


def _kept(kv: Memory, k_BTKh: jax.Array, v_BTKh: jax.Array, place: Place) -> Memory:
    """The memory with a layer's keys and values of these tokens."""
    at = (place.number, 0, 0, place.queries.slots[0, 0], 0)

    def put(all_layers: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        whole = jax.lax.dynamic_update_slice(all_layers[place.group], new.swapaxes(1, 2)[None], at)
        return (*all_layers[: place.group], whole, *all_layers[place.group + 1 :])

    # Behind a barrier: written again where it is read, XLA would need the cache as it was, and copy it for each layer.
    return jax.lax.optimization_barrier(kv._replace(k=put(kv.k, k_BTKh), v=put(kv.v, v_BTKh)))


def _grown(growth: Growth, q_BTHh: jax.Array, place: Place) -> jax.Array:
    """Queries scaled by their position; only for layers without positions, if the family says so."""
    if not growth.rate:
        return q_BTHh
    steps_BT = (place.queries.positions + growth.ahead) // growth.length
    growth_BT = 1 + growth.rate * jnp.log1p(steps_BT.astype(jnp.float32))
    growth_BT = jnp.where(growth.still & place.turns, 1.0, growth_BT)
    return (q_BTHh.astype(jnp.float32) * growth_BT[..., None, None]).astype(q_BTHh.dtype)


def keys_values(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values `[B, T, K, h]`, as attention takes them, from its input."""
    _, k, v, _ = projections(config, w, norm(config, w, "attn_norm", x_BTD))
    return _turned(config, w, "k_norm", k, place), _value_norm(config, v)


def _turned(config: ModelConfig, w: Mapping, name: str, x_BTHh: jax.Array, place: Place) -> jax.Array:
    """Queries or keys, normalised by `name` and rotated."""
    if name in config.bare_norms:
        turned = rotate(x_BTHh, place.cos, place.sin, config.interleaved)
        return jnp.where(place.turns, norm(config, {}, name, turned), turned)
    if not config.qk_norm_last:
        x_BTHh = _head_norm(config, w, name, x_BTHh)
    x_BTHh = rotate(x_BTHh, place.cos, place.sin, config.interleaved)
    return _head_norm(config, w, name, x_BTHh) if config.qk_norm_last else x_BTHh


def _value_norm(config: ModelConfig, v_BTKh: jax.Array) -> jax.Array:
    return norm(config, {}, "v_norm", v_BTKh) if "v_norm" in config.bare_norms else v_BTKh


def _attend(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, sinks_H, place: Place, form: str) -> jax.Array:
    """`attend`. On several devices, if a row's tokens are on more than one or a kernel is used, each device computes its own queries over
    the keys and values of the whole row: the compiler cannot partition a kernel."""

    def over(q, k, v, sinks_H, queries, keys, window):
        scale, cap, tile = config.attention_scale, config.attention_softcap, config.attention_tile
        return attend(q, k, v, queries, keys, scale=scale, window=window, cap=cap, form=form, tile=tile, sinks_H=sinks_H)

    mesh = config.mesh
    tokens = None if mesh is None else partition(mesh, q.shape[1:2], ("tokens",))[0]
    if mesh is None or mesh.size == 1 or (tokens is None and form == "xla"):
        return over(q, k, v, sinks_H, place.queries, place.keys, place.window)
    (rows,) = partition(mesh, q.shape[:1], ("rows",))
    heads = partition(mesh, (config.num_kv_heads,), ("heads",))[0]  # groups of queries stay with their keys
    mine, whole = PartitionSpec(rows, tokens, heads, None), PartitionSpec(rows, None, heads, None)
    of_keys = jax.tree.map(lambda x: PartitionSpec(rows, None, heads) if x.ndim == 3 else PartitionSpec(rows, None), place.keys)
    specs = (mine, whole, whole, PartitionSpec(heads), PartitionSpec(rows, tokens), of_keys, PartitionSpec())
    parts = each_part(over, mesh, specs, mine, frozenset(mesh.axis_names))
    return parts(q, k, v, sinks_H, place.queries, place.keys, place.window)


def projections(config: ModelConfig, w: Mapping, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Queries `[B, T, H, h]`, keys and values `[B, T, K, h]`, and the input of the result's gate: `[B, T, H, h]`, `[B, T, H, 1]` with one
    gate a head, or None.

    From three matrices; from one that stacks all queries, all keys, all values ("qkv"), or the queries of each key head, that head and its
    values ("qkv_by_head"), or the queries, values and keys of each shard ("qvk_by_shard"); or from latents. A gate comes with the queries,
    head by head ("q_and_gate"), or from a matrix of its own ("attn_gate").
    """
    if config.latent is not None:
        return *_from_latents(config, config.latent, w, x_BTD), None
    B, T, _ = x_BTD.shape
    H, K, h = config.num_heads, config.num_kv_heads, config.head_dim
    gate = None
    if "qkv_by_head" in w:
        joint = linear(w["qkv_by_head"], x_BTD, w.get("qkv_by_head_bias")).reshape(B, T, K, H // K + 2, h)
        parts = [joint[:, :, :, :-2], joint[:, :, :, -2], joint[:, :, :, -1]]
    elif "qvk_by_shard" in w:
        joint = linear(w["qvk_by_shard"], x_BTD).reshape(B, T, SHARDS, 3, -1)
        parts = [joint[:, :, :, part] for part in (0, 2, 1)]
    elif "qkv" in w:
        parts = jnp.split(linear(w["qkv"], x_BTD, w.get("qkv_bias")), [H * h, (H + K) * h], axis=-1)
    else:
        names = [name for name in ("q", "q_and_gate", "k", "v") if name in w]
        parts = [linear(w[name], x_BTD, w.get(f"{name}_bias")) for name in names]
        parts += parts[-1:] * (3 - len(parts))  # values equal to the keys; nothing for a layer that is given both
    if config.qkv_clip:
        parts = [jnp.clip(part, -config.qkv_clip, config.qkv_clip) for part in parts]
    if "q_and_gate" in w:
        parts[0], gate = jnp.split(parts[0].reshape(B, T, H, 2 * h), 2, axis=-1)
    if "attn_gate" in w:
        gate = linear(w["attn_gate"], x_BTD).reshape(B, T, H, -1)
    q, k, v = (part.reshape(B, T, -1, h) for part in parts)
    return q, k, v, gate if gate is None else checkpoint_name(gate, "attention")


def _from_latents(config: ModelConfig, latent: Latent, w: Mapping, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rotated part comes first in a head here, as in any other model; values are padded with zeros to a key's size."""

    def linear_of(name, x):
        return linear(w[name], x, w.get(f"{name}_bias"))

    def normed(name, x):
        return NORMS[config.norm](x, w[name], None, LATENT_EPS)

    def heads(x):
        return x.reshape(*x_BTD.shape[:2], config.num_heads, -1)

    q = heads(linear_of("q_b", normed("q_a_norm", linear_of("q_a", x_BTD))) if latent.q_rank else linear_of("q", x_BTD))
    low, turning = jnp.split(linear_of("kv_a", x_BTD), [latent.kv_rank], axis=-1)
    still, v = jnp.split(heads(linear_of("kv_b", normed("kv_a_norm", low))), [latent.still], axis=-1)
    turning = jnp.broadcast_to(turning[:, :, None], (*still.shape[:3], latent.turning))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, config.head_dim - latent.value)))
    return jnp.concatenate([q[..., latent.still :], q[..., : latent.still]], -1), jnp.concatenate([turning, still], -1), v


def _head_norm(config: ModelConfig, w: Mapping, name: str, x_BTHh: jax.Array) -> jax.Array:
    """Norm over as many numbers as the scale has: a head (Qwen 3; Cohere: each with its own scale), or all heads together (OLMo 2)."""
    if name not in w:
        return x_BTHh
    flat = x_BTHh.reshape(*x_BTHh.shape[:2], -1, w[name].shape[-1])
    return norm(config, w, name, flat).reshape(x_BTHh.shape)


# ---- feed-forward ----


def _fed(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place) -> tuple[jax.Array, RouterSums | None]:
    """What the feed-forward part adds to the residual stream; long rows in chunks of tokens, so that `[T, F]` never exists."""

    def whole(x_BTD):
        fed, sums = feed_forward(config, w, norm(config, w, "mlp_norm", x_BTD), place, x_BTD)
        return scaled(norm(config, w, "mlp_post_norm", fed), config.residual_multiplier), sums

    B, T, D = x_BTD.shape
    chunks = 1 if config.remat not in RECOMPUTED else _chunks(config, w, B * T)
    if chunks == 1:
        return whole(x_BTD)
    w = dict(w)  # cut out of the stack once, not for each chunk
    if not split(config.mesh, "data", "fsdp"):  # rows one after the other, so that chunks are cut out without a copy
        B, T = 1, B * T
    size = -(-T // chunks)
    parts = jnp.pad(x_BTD.reshape(B, T, D), ((0, 0), (0, size * chunks - T), (0, 0))).reshape(B, chunks, size, D).swapaxes(0, 1)
    # not computed twice: the backward pass does not need what the layer's own second forward pass would compute here
    fed = jax.lax.map(jax.checkpoint(lambda part: whole(part)[0], prevent_cse=False), parts)
    return fed.swapaxes(0, 1).reshape(B, -1, D)[:, :T].reshape(x_BTD.shape), None


def _chunks(config: ModelConfig, w: Mapping, tokens: int) -> int:
    """How many chunks a row's tokens are cut into: 1 if experts sort tokens, if a row is on several devices, and if dropout draws one mask
    for all tokens."""
    if "experts_down" in w or split(config.mesh, "sequence"):
        return 1
    names = ("gate", "up", "gate_up", "down")
    leaves = [leaf for name in names if name in w for leaf in jax.tree.leaves(w[name])]
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
        return 1
    rows = 1 if config.mesh is None else config.mesh.shape["data"] * config.mesh.shape["fsdp"]
    # each chunk dequantises packed matrices again: with 4096 tokens that is a tenth of the products' time, with 1024 nearly half
    packed = any(leaf.dtype in (jnp.uint8, jnp.int8) for leaf in leaves)
    return max(1, tokens // rows // (config.mlp_chunk or (PACKED_CHUNK if packed else CHUNK)))


def feed_forward(
    config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, entered_BTD: jax.Array
) -> tuple[jax.Array, RouterSums | None]:
    """`down(act(gate x) * up x)`, `down(act(up x))` without a gate, or a mixture of experts (possibly with a shared one for all tokens).

    entered  x before its norm: the input of Gemma 4's experts, beside a dense part of the layer, each with its own norms
    """
    if "experts_down" not in w:
        return _mlp(config, w, x_BTD), None
    segments, apart = place.queries.segments, "experts_norm" in w
    mixed, sums = mixture(config, w, entered_BTD if apart else x_BTD, (segments > 0) & (segments != virtual_tokens.SEGMENT))
    assert config.moe is not None
    sums = None if config.moe.aux_loss_coef is None else sums
    if apart:
        dense = norm(config, w, "mlp_own_post_norm", _mlp(config, w, x_BTD))
        return dense + norm(config, w, "experts_post_norm", mixed), sums
    if not config.moe.shared_intermediate_size:
        return mixed, sums
    shared = _mlp(config, w, x_BTD, "shared_")
    if "shared_router" in w:
        shared *= jax.nn.sigmoid(linear(w["shared_router"], x_BTD))
    return mixed + scaled(shared, config.moe.shared_scale), sums


def _mlp(config: ModelConfig, w: Mapping, x_BTD: jax.Array, prefix: str = "") -> jax.Array:
    """The feed-forward network whose parameters begin with `prefix`."""
    act = ACTIVATIONS.get(config.hidden_act) or functools.partial(
        xielu, **{name: w[f"act_{name}"] for name in ("alpha_p", "alpha_n", "beta", "eps")}
    )

    def project(name, x):
        return linear(w[prefix + name], x, w.get(f"{prefix}{name}_bias"))

    if f"{prefix}gate_up" in w:
        gate, up = jnp.split(project("gate_up", x_BTD), 2, axis=-1)
        inner = act(gate) * up
    elif f"{prefix}gate" in w:
        gate = project("gate", x_BTD)
        # One after the other, also backward, because otherwise their dequantised matrices would exist at the same time.
        gate, x_BTD = jax.lax.optimization_barrier((gate, x_BTD))
        gate = above(gate, w["gate_cutoff"]) if "gate_cutoff" in w else gate
        inner = act(scaled(gate, config.multipliers.gate)) * project("up", x_BTD)
    else:
        inner = act(project("up", x_BTD))
    return scaled(project("down", constrain(config.mesh, inner, "rows", "tokens", "mlp")), config.multipliers.down)

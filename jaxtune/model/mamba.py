"""Mamba-2 layers (arXiv 2405.21060): a convolution, a state that each token decays and adds to (model/delta.py), and a gated norm."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.model.convolution import at, begins, convolution, put
from jaxtune.model.delta import gated_delta_rule
from jaxtune.model.families import ModelConfig
from jaxtune.model.layers import ACTIVATIONS, scaled
from jaxtune.model.layout import constrain
from jaxtune.model.memory import Memory, Place
from jaxtune.model.weight import linear


def mamba(config: ModelConfig, w: Mapping, x_BTD: jax.Array, place: Place, kv: Memory | None) -> tuple[jax.Array, Memory | None]:
    """The mixer of such a layer, and the memory updated with these tokens.

    gate, u, dt = in_gudt x,    x, B, C = act(convolution(u)),    dt = softplus(dt + dt_bias)
    S_t = exp(-exp(a_log) dt_t) S_{t-1} + dt_t B_t x_t^T,    y_t = S_t^T C_t + skip x_t,    out(norm(y * silu(gate)))

    Falcon H1 has no norm there, or one before the gate.
    """
    assert config.mamba is not None
    (B, T, _), m = x_BTD.shape, config.mamba

    def whole(x: jax.Array, *shape: int) -> jax.Array:
        """Heads sharded over the mesh, a row's tokens on one device: the state passes through all of them."""
        x = x.reshape(B, T, *shape)
        return constrain(config.mesh, x, "rows", None, "heads", *(None,) * (x.ndim - 3))

    first_BT = begins(place.queries, None if kv is None else place.keys)
    of_group, by = m.groups * m.state_dim, config.multipliers
    joint_BTC = linear(w["in_gudt"], scaled(x_BTD, by.mamba_in), w.get("in_gudt_bias"))
    if set(by.mamba) != {1.0}:
        by_C = np.repeat(np.float32(by.mamba), [m.width, m.width, of_group, of_group, m.heads])
        joint_BTC = (joint_BTC.astype(jnp.float32) * by_C).astype(x_BTD.dtype)
    joint_BTC = checkpoint_name(joint_BTC, "attention")
    gate_BTC, u_BTC, dt_BTH = jnp.split(joint_BTC, [m.width, m.width + m.channels], axis=-1)
    tail, state = (None, None) if kv is None else (at(kv.tail, place.number), at(kv.state, place.number))
    mixed_BTC, tail = convolution(w["conv"][:, 0], whole(u_BTC, m.channels), first_BT, tail, w.get("conv_bias"))
    x, b, c = jnp.split(ACTIVATIONS[m.act](mixed_BTC), [m.width, m.width + of_group], axis=-1)
    x_BTHh = whole(x, m.heads, m.head_dim)
    b, c = (whole(part, m.groups, m.state_dim) for part in (b, c))

    a_H, bias_H, skip_H = (w[name].astype(jnp.float32) for name in ("a_log", "dt_bias", "skip"))
    dt_BTH = jnp.maximum(jax.nn.softplus(whole(dt_BTH.astype(jnp.float32), m.heads) + bias_H), m.least_step)
    y_BTHh, state = gated_delta_rule(c, b, x_BTHh, -jnp.exp(a_H) * dt_BTH, dt_BTH, first_BT, state, erases=False)
    if kv is not None:
        kv = kv._replace(tail=put(kv.tail, tail, place.number), state=put(kv.state, state, place.number))
    y_BTHh = y_BTHh.astype(jnp.float32) + skip_H[:, None] * x_BTHh.astype(jnp.float32)
    y_BTC, gate_BTC = y_BTHh.reshape(B, T, -1), ACTIVATIONS["silu"](gate_BTC.astype(jnp.float32))
    y_BTC = y_BTC if m.norm == "before" else y_BTC * gate_BTC
    if m.norm:
        y_BTGC = y_BTC.reshape(B, T, m.groups, -1)
        y_BTGC = y_BTGC * jax.lax.rsqrt(jnp.square(y_BTGC).mean(-1, keepdims=True) + config.norm_eps)
        y_BTC = y_BTGC.reshape(B, T, -1) * w["state_norm"].astype(jnp.float32)
    y_BTC = y_BTC * gate_BTC if m.norm == "before" else y_BTC
    return scaled(linear(w["out"], y_BTC.astype(x_BTD.dtype), w.get("out_bias")), by.mamba_out), kv

"""Mixture of experts (arXiv 1701.06538, 2401.04088): every token passes through its most likely experts, all experts in one ragged product.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune.model.families import ModelConfig, Moe
from jaxtune.model.layers import ACTIVATIONS, NORMS
from jaxtune.model.layout import ROWS, each_part, partition, split
from jaxtune.model.weight import grouped, linear


class RouterSums(NamedTuple):
    """Routing statistics, summed over tokens and layers, float32: add them up over micro-batches and layers, then apply
    `load_balancing_loss`."""

    assignments_E: jax.Array  # how often each expert was chosen
    probabilities_E: jax.Array  # the router's probability of each expert
    tokens: jax.Array  # [], the number of tokens (counted once per layer)


def load_balancing_loss(sums: RouterSums) -> jax.Array:
    """`E * sum_e f_e P_e`, float32 `[]`: f_e assignments and P_e probability per token (arXiv 2101.03961, eq. 4 to 6).

    Pooled over layers as in transformers. The minimum is `experts_per_token`, if all experts get equal shares. The loss adds
    `config.moe.aux_loss_coef` times this.
    """
    tokens = jnp.maximum(sums.tokens, 1.0)
    return sums.assignments_E.size * jnp.sum((sums.assignments_E / tokens) * (sums.probabilities_E / tokens))


def mixture(config: ModelConfig, w: Mapping, x_BTD: jax.Array, live_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
    """The feed-forward part of an expert layer, `[B, T, D]`, and the router's sums over `live` tokens (not padding).

    On a mesh each device sorts its own tokens and gathers the layer's experts: sorting all tokens would gather all of them on each device.
    """
    mesh, axes = config.mesh, (*ROWS, "sequence")
    if mesh is None or not split(mesh, *axes):
        return _mixture(config, w, x_BTD, live_BT)
    spec = partition(mesh, x_BTD.shape[:2], ("rows", "tokens"))
    own = tuple(name for part in spec if part for name in ((part,) if isinstance(part, str) else part))

    def part(w, x, live):
        mixed, sums = _mixture(config, w, x, live)
        return mixed, jax.lax.psum(sums, own) if own else sums

    weights = {name: w[name] for name in w if name.startswith(("router", "experts_", "latent_"))}
    parts = each_part(part, mesh, (PartitionSpec(), spec, spec), (spec, PartitionSpec()), frozenset(axes))
    return parts(weights, x_BTD, live_BT)


def _asked(config: ModelConfig, w: Mapping, x_ND: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inputs of the router and of the experts: x; for Gemma 4, whose x is not normalised yet, `norm(x) scale / sqrt(D)` and another
    norm of x."""
    if "router_scale" not in w:
        return x_ND, x_ND
    normed = NORMS[config.norm](x_ND, jnp.ones((), x_ND.dtype), None, config.norm_eps)
    scaled = normed * w["router_scale"].astype(x_ND.dtype) * jnp.asarray(config.hidden_size**-0.5, x_ND.dtype)
    return scaled, NORMS[config.norm](x_ND, w["experts_norm"], None, config.norm_eps)


def _routed(moe: Moe, w: Mapping, x_ND: jax.Array) -> tuple[jax.Array, ...]:
    """The router's probabilities `[N, E]`, the chosen experts' weights and numbers `[N, C]`, and the numbers of the most likely ones, which
    the load-balancing loss counts (as in transformers)."""
    x_ND = x_ND.astype(jnp.float32) if moe.float32 else x_ND
    logits_NE = linear(w["router" if "router" in w else "router_proj"], x_ND, w.get("router_bias")).astype(jnp.float32)
    probs_NE = jax.nn.softmax(logits_NE, axis=-1)
    if moe.near is not None:
        weights_NC, chosen_NC = _near(moe.near, logits_NE)
        return probs_NE, weights_NC, chosen_NC, chosen_NC
    scores_NE = choice_NE = jax.nn.sigmoid(logits_NE) if moe.sigmoid else probs_NE
    if "router_correction" in w:  # affects only the choice: balances the experts' load instead of a loss (arXiv 2408.15664)
        choice_NE = scores_NE + w["router_correction"].reshape(-1)
    if moe.groups[0] > 1:
        choice_NE = _within_groups(moe, choice_NE)
    if moe.sigmoid and choice_NE is scores_NE:  # sigmoids of large logits are all 1
        choice_NE = logits_NE
    weights_NC, chosen_NC = jax.lax.top_k(choice_NE, moe.experts_per_token)
    if choice_NE is not scores_NE:
        weights_NC = jnp.take_along_axis(scores_NE, chosen_NC, axis=-1)
    if moe.normalize:
        weights_NC = weights_NC / (weights_NC.sum(-1, keepdims=True) + moe.epsilon)
    if "router_expert_scale" in w:
        weights_NC = weights_NC * w["router_expert_scale"].astype(jnp.float32)[chosen_NC]
    counted_NC = jax.lax.top_k(probs_NE, moe.experts_per_token)[1] if "router_correction" in w else chosen_NC
    return probs_NE, weights_NC * moe.scale if moe.scale != 1.0 else weights_NC, chosen_NC, counted_NC


def _near(near: float, logits_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Phi 3.5's two experts and their weights `[N, 2]` (arXiv 2409.12136, without noise): the most likely of all, then of the others, each
    by a softmax over those whose logits are at most `2 near` of its own (or theirs, if larger) below it."""
    weights, chosen, left_NE = [], [], logits_NE
    for _ in range(2):
        best_N1 = left_NE.argmax(-1, keepdims=True)
        top_N1 = jax.lax.stop_gradient(jnp.take_along_axis(left_NE, best_N1, axis=-1))
        apart_NE = (top_N1 - logits_NE) / jnp.maximum(jnp.abs(logits_NE), top_N1)
        probs_NE = jax.nn.softmax(jnp.where(apart_NE > 2 * near, -jnp.inf, left_NE), axis=-1)
        weights.append(jnp.take_along_axis(probs_NE, best_N1, axis=-1))
        chosen.append(best_N1)
        left_NE = jnp.where(jnp.arange(logits_NE.shape[-1]) == best_N1, -jnp.inf, left_NE)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1)


def _within_groups(moe: Moe, choice_NE: jax.Array) -> jax.Array:
    """`choice_NE`, -inf outside the groups that a token may use: those with the largest score (DeepSeek-V2), or the largest sum of two
    (V3)."""
    groups, taken = moe.groups
    of_group = choice_NE.reshape(choice_NE.shape[0], groups, -1)
    score_NG = jax.lax.top_k(of_group, moe.judges)[0].sum(-1)
    open_NG = jax.nn.one_hot(jax.lax.top_k(score_NG, taken)[1], groups, dtype=bool).any(1)
    return jnp.where(open_NG[:, :, None], of_group, -jnp.inf).reshape(choice_NE.shape)


def _gated(config: ModelConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    if config.moe is None or config.moe.clamp is None:
        return ACTIVATIONS[config.hidden_act](gate) * up
    limit, alpha = config.moe.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(gate * alpha)


def _mixture(config: ModelConfig, w: Mapping, x_BTD: jax.Array, live_BT: jax.Array) -> tuple[jax.Array, RouterSums]:
    assert config.moe is not None
    E, chosen_of = config.moe.num_experts, config.moe.experts_per_token
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    asking_ND, x_ND = _asked(config, w, x_ND)
    x_ND = linear(w["latent_in"], x_ND, w.get("latent_in_bias")) if config.moe.latent_size else x_ND
    probs_NE, weights_NC, chosen_NC, counted_NC = _routed(config.moe, w, asking_ND)

    order = jnp.argsort(chosen_NC.reshape(-1), stable=True)  # (token, choice) pairs, sorted by expert
    sizes_E = jnp.bincount(chosen_NC.reshape(-1), length=E)
    rows = x_ND[order // chosen_of]

    def through(name: str, x: jax.Array) -> jax.Array:
        y, bias_EF = grouped(w[name], x, sizes_E), w.get(f"{name}_bias")
        return y if bias_EF is None else y + bias_EF.astype(y.dtype)[chosen_NC.reshape(-1)[order]]

    if config.moe.scales_input:
        rows = (rows.astype(jnp.float32) * weights_NC.reshape(-1)[order][:, None]).astype(rows.dtype)
        weights_NC = jnp.ones_like(weights_NC)
    up = through("experts_up", rows)
    inner = _gated(config, through("experts_gate", rows), up) if "experts_gate" in w else ACTIVATIONS[config.hidden_act](up)
    out = through("experts_down", inner)
    out_NCD = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(-1, chosen_of, out.shape[-1])
    mixed = jnp.sum(out_NCD.astype(jnp.float32) * weights_NC[..., None], axis=1).astype(x_BTD.dtype)

    live_N1 = live_BT.reshape(-1, 1).astype(jnp.float32)
    assignments_E = jnp.zeros(E, jnp.float32).at[counted_NC].add(jnp.broadcast_to(live_N1, counted_NC.shape))
    mixed = linear(w["latent_out"], mixed, w.get("latent_out_bias")) if config.moe.latent_size else mixed
    return mixed.reshape(x_BTD.shape), RouterSums(assignments_E, jnp.sum(probs_NE * live_N1, axis=0), live_N1.sum())

"""Losses over pairs of answers: one table with one row per loss.

    y_w, y_l   the chosen and the rejected answer; log p(y) is a sum over the answer's tokens, including its end token
    a, b       log-ratios to the reference: log p(y_w) - log p_ref(y_w), and the same for y_l
    d          s(a) - s(b), where s is a itself unless `f_divergence_type` says otherwise (`SCORES`)
    eps        label_smoothing: the probability that a label is wrong

As computed by TRL 1.16 (tests/oracle/test_preference.py), with one addition: `sigmoid` takes `label_smoothing`, which TRL ignores there.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid


class Pairs(NamedTuple):
    """n pairs, float32 `[n]` each: log-probabilities of whole answers, tokens in them, and 1 where there is a pair (0: padding)."""

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array
    ref_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array
    live: jax.Array

    @property
    def a(self) -> jax.Array:
        """Log-ratio of the chosen answer."""
        return self.chosen - self.ref_chosen

    @property
    def b(self) -> jax.Array:
        """Log-ratio of the rejected answer."""
        return self.rejected - self.ref_rejected


# ---- f-divergences (arXiv 2309.16240): f'(t) of t = p / p_ref, from log t ----


def _alpha_divergence(x: jax.Array, c: Any) -> jax.Array:
    power = c.f_alpha_divergence_coef - 1.0
    return x if abs(power) < 1e-6 else jnp.expm1(jnp.minimum(power * x, 80.0)) / power  # e^80 is about float32's largest


SCORES: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "reverse_kl": lambda x, c: x,
    "forward_kl": lambda x, c: -jnp.expm1(-x),
    "js_divergence": lambda x, c: math.log(2.0) + log_sigmoid(x),
    "alpha_divergence": _alpha_divergence,
}


def scores(p: Pairs, c: Any) -> tuple[jax.Array, jax.Array]:
    """`s(a), s(b)`."""
    score = SCORES[c.f_divergence_type]
    return score(p.a, c), score(p.b, c)


def _logit(p: Pairs, c: Any) -> jax.Array:
    chosen, rejected = scores(p, c)
    return c.beta * (chosen - rejected)


def _mean_gap(p: Pairs, c: Any) -> jax.Array:
    chosen, rejected = scores(p, c)
    return chosen / jnp.maximum(p.chosen_length, 1) - rejected / jnp.maximum(p.rejected_length, 1)


# ---- losses ----


def smoothed(logit: jax.Array, eps: float) -> jax.Array:
    """`-(1 - eps) log sigmoid(x) - eps log sigmoid(-x)`: cross-entropy with a label that is wrong with probability eps."""
    return -(1 - eps) * log_sigmoid(logit) - eps * log_sigmoid(-logit)


def _exo(p: Pairs, c: Any) -> jax.Array:
    """KL(softmax of the two scores || (1 - eps, eps)), arXiv 2402.00856 eq. 16."""
    x, eps = _logit(p, c), c.label_smoothing
    return sigmoid(x) * (log_sigmoid(x) - math.log1p(-eps)) + sigmoid(-x) * (log_sigmoid(-x) - math.log(eps))


def _robust(p: Pairs, c: Any) -> jax.Array:
    x, eps = _logit(p, c), c.label_smoothing
    return (-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps)


def _discopop(p: Pairs, c: Any) -> jax.Array:
    """`-(1 - m) log sigmoid(x) + m e^-x` with m = sigmoid(x / tau), arXiv 2406.08414 eq. 5; the product in one exponent: no overflow."""
    x = _logit(p, c)
    return -log_sigmoid(x) * sigmoid(-x / c.discopop_tau) + jnp.exp(log_sigmoid(x / c.discopop_tau) - x)


def _ranked(x: jax.Array, p: Pairs) -> jax.Array:
    """The values of the live pairs in ascending order, padding last; which pair a value came from is lost."""
    return jnp.sort(jnp.where(p.live > 0, x, jnp.inf))


def _optimal_transport(x: jax.Array, y: jax.Array, p: Pairs, c: Any) -> jax.Array:
    """Quantile against quantile over the micro-batch. Sorting the live pairs first removes the effect of padding."""
    first = jnp.arange(x.shape[0]) < p.live.sum()
    x, y = (jnp.where(first, _ranked(value, p), 0.0) for value in (x, y))
    loss = jnp.where(first, smoothed(c.beta * (x - y), c.label_smoothing), 0.0)
    return loss[jnp.argsort(jnp.argsort(-p.live, stable=True))]  # back to live positions


def _sft(p: Pairs, c: Any) -> jax.Array:
    """Mean over the chosen answers' tokens in the micro-batch, the same for every pair."""
    tokens = jnp.maximum((p.chosen_length * p.live).sum(), 1)
    return jnp.broadcast_to(-(p.chosen * p.live).sum() / tokens, p.live.shape)


LOSSES: dict[str, Callable[[Pairs, Any], jax.Array]] = {
    "sigmoid": lambda p, c: smoothed(_logit(p, c), c.label_smoothing),  # DPO, arXiv 2305.18290 eq. 7; with eps > 0 cDPO
    "hinge": lambda p, c: jax.nn.relu(1 - _logit(p, c)),  # SLiC, 2305.10425
    "ipo": lambda p, c: (_mean_gap(p, c) - 1 / (2 * c.beta)) ** 2,  # 2310.12036; divided by length, as its authors confirmed to TRL
    "exo_pair": _exo,
    "nca_pair": lambda p, c: -log_sigmoid(c.beta * p.a) - 0.5 * (log_sigmoid(-c.beta * p.a) + log_sigmoid(-c.beta * p.b)),  # 2402.05369
    "robust": _robust,  # 2403.00409
    "bco_pair": lambda p, c: -log_sigmoid(c.beta * p.a) - log_sigmoid(-c.beta * p.b),  # 2404.04656, without its reward shift
    "sppo_hard": lambda p, c: (p.a - 0.5 / c.beta) ** 2 + (p.b + 0.5 / c.beta) ** 2,  # 2405.00675
    "aot": lambda p, c: _optimal_transport(p.chosen - p.rejected, p.ref_chosen - p.ref_rejected, p, c),  # 2406.05882
    "aot_unpaired": lambda p, c: _optimal_transport(p.a, p.b, p, c),
    "apo_zero": lambda p, c: 1 - sigmoid(c.beta * p.a) + sigmoid(c.beta * p.b),  # 2408.06266 eq. 7: chosen beats the model
    "apo_down": lambda p, c: sigmoid(c.beta * p.a) + 1 - sigmoid(c.beta * (p.a - p.b)),  # eq. 8: the model beats chosen
    "discopop": _discopop,
    "sigmoid_norm": lambda p, c: -log_sigmoid(c.beta * _mean_gap(p, c)),  # divided by length, as in SimPO, with a reference
    "sft": _sft,
}


# ---- without a reference (CPO's trainer): p.chosen and p.rejected are sums, or means where BY_MEAN says so ----

BY_MEAN = ("ipo", "simpo")
REFERENCE_FREE: dict[str, Callable[[jax.Array, Any], jax.Array]] = {  # of x = log p(y_w) - log p(y_l)
    "sigmoid": lambda x, c: smoothed(c.beta * x, c.label_smoothing),  # CPO, 2401.08417
    "hinge": lambda x, c: jax.nn.relu(1 - c.beta * x),
    "ipo": lambda x, c: (x - 1 / (2 * c.beta)) ** 2,
    "simpo": lambda x, c: smoothed(c.beta * x - c.simpo_gamma, c.label_smoothing),  # 2405.14734 eq. 6
}


def log_odds_ratio(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """`log(odds(p_w) / odds(p_l))` with `odds(p) = p / (1 - p)`, from mean log-probabilities per token (ORPO, arXiv 2403.07691 eq. 4)."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: jax.Array) -> jax.Array:
    """`log(1 - e^x)` for x < 0; each branch is exact where it is used and harmless, in value and gradient, where it is not."""
    x = jnp.minimum(x, -1e-7)  # a memorised answer: odds of 10 million, not infinity
    near = x > -math.log(2.0)
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))

"""Random sampled answers, with PPO's losses and advantages per token: the shared input of the goldens, TRL's code and jaxtune."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import load_config
from jaxtune.objectives.advantages import ppo
from jaxtune.objectives.ppo import Acted, ppo_loss

N, T = 6, 9
CASES = {"ppo": {}, "tight": {"cliprange": 0.05, "cliprange_value": 0.05, "vf_coef": 1.0}, "policy_alone": {"vf_coef": 0.0}}
ADVANTAGES = {
    "k1": {}, "k3": {"kl_estimator": "k3"}, "discounted": {"gamma": 0.9, "lam": 0.5}, "no_kl": {"kl_coef": 0.0},
    "whitened": {"whiten_rewards": True, "kl_coef": 0.5}, "whole": {"kl_coef": 0.3},
}  # fmt: skip


def config(name):
    return load_config({"model": "none", "objective": "ppo"} | (CASES | ADVANTAGES)[name])


def given(name):
    """float64 `[answers, tokens]`: `logps`, `vpred` (which carry a gradient), `old`, `ref`, `values`, `advantages`, `returns`, `entropy`;
    `scores` of answers; bool: `mask` of tokens."""
    rng = np.random.default_rng(sum(map(ord, name)))
    lengths = np.full(N, T) if name == "whole" else np.append([1, T], rng.integers(1, T + 1, N - 2))
    logps, values = -rng.gamma(1.0, 1.0, (N, T)) - 0.02, rng.normal(0, 1, (N, T))
    return {
        "logps": logps, "old": logps + rng.normal(0, 0.3, (N, T)), "ref": logps + rng.normal(0, 0.5, (N, T)), "values": values,
        "vpred": values + rng.normal(0, 0.3, (N, T)), "advantages": rng.normal(0, 1, (N, T)), "returns": rng.normal(0, 1, (N, T)),
        "entropy": rng.gamma(1.0, 1.0, (N, T)), "scores": rng.normal(0, 1, N), "mask": np.arange(T) < lengths[:, None],
    }  # fmt: skip


def ours(name, arrays=None):
    """(mean loss, its gradient to `logps` and `vpred` `[2, answers, tokens]`, metrics) by jaxtune, in float32."""
    run, arrays = config(name), arrays or given(name)
    x = {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}

    def loss(moving):
        logps, vpred = moving
        made = ppo_loss(run, Acted(x["mask"], logps, x["entropy"], vpred, x["old"], x["values"], x["advantages"], x["returns"]))
        return made.total / made.weight, made.metrics

    moving = jnp.stack([x["logps"], x["vpred"]])
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(moving)
    return float(value), np.asarray(gradient), {key: float(total / weight) for key, (total, weight) in metrics.items()}


def advantages(name):
    """jaxtune's advantages and returns of a rollout, 0 beyond an answer's end."""
    run, arrays = config(name), given(name)
    ref = arrays["ref"] if run.kl_coef else None
    return ppo(run, arrays["scores"], arrays["mask"].sum(1), arrays["old"], ref, arrays["values"])

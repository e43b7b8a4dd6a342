"""PPO with a value head (arXiv 1707.06347; for language models 1909.08593, 2203.02155): learning from an answer token by token.

The learning signal of a token is its advantage over the value head's prediction (objectives/advantages.py), computed when the answer was
sampled. Policy and value share the model and, if one is trained, the adapter; only the value head is separate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import metric
from jaxtune.objectives.grpo import NOTHING, cooled
from jaxtune.objectives.logprobs import logprobs_of, trained_states
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.sft import balanced


class Acted(NamedTuple):
    """The tokens of sampled answers, all float32 `[B, N]`; `logp_BN` and `value_BN` carry a gradient.

    Attributes:
        mask_BN: 1 for a token of an answer.
        logp_BN, entropy_BN: of the token, and of the prediction (nats), under the policy.
        value_BN: the value head's prediction from this token on.
        old_BN, old_value_BN: the same two under the policy that sampled the answer.
        advantage_BN: of the token. return_BN: the target of its value.
    """

    mask_BN: jax.Array
    logp_BN: jax.Array
    entropy_BN: jax.Array
    value_BN: jax.Array
    old_BN: jax.Array
    old_value_BN: jax.Array
    advantage_BN: jax.Array
    return_BN: jax.Array


def ppo(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """PPO's clipped loss of policy and value, for a batch of sampled answers.

    With experts, `router_aux_loss_coef` times the load-balancing loss is added, as in objective sft.
    """
    model_config = cooled(config, model_config)
    states = trained_states(model_config, params, batch)
    tokens, rollout = logprobs_of(model_config, params, states), batch.rollout

    def at(x_BT: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BT, states.index_BN, axis=1)

    acted = Acted(
        mask_BN=(states.weights_BN != 0).astype(jnp.float32),
        logp_BN=tokens.logp_BN,
        entropy_BN=tokens.entropy_BN,
        value_BN=decoder.values(params, states.hidden_BND),
        old_BN=at(rollout.old_logps),
        old_value_BN=at(rollout.values),
        advantage_BN=at(rollout.advantages),
        return_BN=at(rollout.returns),
    )
    return balanced(config, model_config, ppo_loss(config, acted), tokens.aux)


def ppo_loss(config: Any, a: Acted) -> Loss:
    """The mean over tokens of `max(-A rho, -A clip(rho)) + vf_coef / 2 max((V - R)^2, (clip(V) - R)^2)`, and TRL's metrics.

    rho is p / p_old, clipped to `1 +- cliprange`; V is clipped to `V_old +- cliprange_value`.
    """
    apart = a.logp_BN - a.old_BN
    rho = jnp.exp(apart)
    losses = -a.advantage_BN * rho
    clipped = -a.advantage_BN * jnp.clip(rho, 1 - config.cliprange, 1 + config.cliprange)
    near = jnp.clip(a.value_BN, a.old_value_BN - config.cliprange_value, a.old_value_BN + config.cliprange_value)
    errors, clipped_errors = jnp.square(a.value_BN - a.return_BN), jnp.square(near - a.return_BN)
    policy, value = jnp.maximum(losses, clipped), 0.5 * jnp.maximum(errors, clipped_errors)
    total = ((policy + config.vf_coef * value) * a.mask_BN).sum()
    measured = {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/approxkl_avg": 0.5 * jnp.square(apart),
        "policy/clipfrac_avg": (clipped > losses).astype(jnp.float32),
        "policy/entropy_avg": a.entropy_BN,
        "val/clipfrac_avg": (clipped_errors > errors).astype(jnp.float32),
        "val/ratio": rho,
    }
    return Loss(total, jnp.maximum(a.mask_BN.sum(), NOTHING), {name: metric(x, a.mask_BN) for name, x in measured.items()})

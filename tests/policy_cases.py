"""Random sampled answers and every loss on them: the shared input of the goldens, TRL's own code and jaxtune.

An answer's tokens have TRL's layout, `[n, T]`, padded on the right; jaxtune gets them four per row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import load_config
from jaxtune.objectives.grpo import SampledAnswers, grpo_loss

N, T, TOGETHER = 8, 9, 4
ROLLOUT = 37  # trained tokens of the whole rollout, of which these answers are the first half
GRPO = {name: {"loss_type": name} for name in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")} | {
    "on_policy": {},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 0.5},
    "cispo_cap": {"loss_type": "cispo", "epsilon_high": 1.3},
    "delta": {"delta": 1.4},
    "kl": {"beta": 0.3},
    "kl_plain": {"beta": 0.3, "use_bias_correction_kl": False},
    "kl_delta": {"beta": 0.3, "delta": 1.1, "loss_type": "grpo"},
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "gspo_kl": {"importance_sampling_level": "sequence", "beta": 0.2},
    "luspo_sequence": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "cispo_sequence": {"importance_sampling_level": "sequence", "loss_type": "cispo", "epsilon_high": 1.05},
    "top_entropy": {"top_entropy_quantile": 0.3},
    "off_policy": {"off_policy_mask_threshold": 0.05, "loss_type": "grpo"},
    "sapo_temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    "vespo_rates": {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 0.5, "vespo_k_neg": 1.2, "vespo_lambda_neg": 0.7},
    "masked": {"loss_type": "grpo", "beta": 0.1},
    "masked_dr": {"loss_type": "dr_grpo"},
}
CASES = {name: {"objective": "grpo", "max_completion_length": 12} | keys for name, keys in GRPO.items()}
CASES |= {"rloo": {"objective": "rloo"}, "rloo_clip": {"objective": "rloo", "epsilon": 0.05, "epsilon_high": 0.4}}


def config(name):
    return load_config({"model": "none"} | CASES[name])


def given(name):
    """float64: `logps`, `old`, `ref`, `entropy` of tokens `[n, T]`, `advantages` of answers; bool: `mask` of tokens."""
    rng = np.random.default_rng(sum(map(ord, name)))
    lengths = rng.integers(1, T + 1, N)
    lengths[:2] = 1, T
    mask = np.arange(T)[None] < lengths[:, None]
    if name.startswith("masked"):  # a truncated answer, which is masked
        mask[2] = False
    logps = -rng.gamma(1.0, 1.0, (N, T)) - 0.02
    off = 0.0 if name == "on_policy" else 0.1 if name.startswith("rloo") else 0.3
    return {
        "logps": logps, "old": logps + rng.normal(0, 1, logps.shape) * off, "ref": logps + rng.normal(0, 0.5, logps.shape),
        "entropy": rng.gamma(1.0, 1.0, logps.shape), "advantages": rng.normal(0, 1, N), "mask": mask,
    }  # fmt: skip


def ours(name, arrays=None):
    """(mean loss, its gradient to `logps`, metrics) by jaxtune, in float32."""
    run, arrays = config(name), arrays or given(name)

    def rows(x):
        return jnp.asarray(x, jnp.float32).reshape(N // TOGETHER, -1)

    member = np.zeros((N // TOGETHER, TOGETHER, TOGETHER, T), bool)
    for answer in range(N):
        row, number = divmod(answer, TOGETHER)
        member[row, number, number] = arrays["mask"][answer]
    known = {
        "member_BSN": jnp.asarray(member.reshape(N // TOGETHER, TOGETHER, -1)), "live_BS": jnp.ones((N // TOGETHER, TOGETHER)),
        "advantage_BS": rows(arrays["advantages"]), "tokens_BS": jnp.full((N // TOGETHER, TOGETHER), ROLLOUT / (2 * N)),
        "entropy_BN": rows(arrays["entropy"]), "old_BN": None if name == "on_policy" else rows(arrays["old"]),
        "ref_BN": rows(arrays["ref"]) if run.objective == "grpo" and run.beta else None,
    }  # fmt: skip

    def loss(logps):
        made = grpo_loss(run, SampledAnswers(logp_BN=logps.reshape(N // TOGETHER, -1), **known))
        return made.total / made.weight, made.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(arrays["logps"], jnp.float32))
    return float(value), np.asarray(gradient), {key: float(total / weight) for key, (total, weight) in metrics.items() if weight > 0}


# ---- rewards to advantages ----

GROUPS = {
    "group": {}, "batch": {"scale_rewards": "batch"}, "none": {"scale_rewards": False}, "unjudged": {}, "equal": {},
    "weights": {"reward_weights": [0.2, 2.0]},
    "several": {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
    "rloo_rewards": {"objective": "rloo"}, "rloo_normalised": {"objective": "rloo", "normalize_advantages": True},
    "rloo_clipped": {"objective": "rloo", "reward_clip_range": [-0.5, 0.5]}, "rloo_unjudged": {"objective": "rloo"},
}  # fmt: skip
SIZE = 4


def group_config(name):
    return load_config({"model": "none", "objective": "grpo", "num_generations": SIZE, "max_completion_length": T} | GROUPS[name])


def group_rewards(name):
    """float64 `[12, 2]`, NaN where a reward gives no score."""
    rng = np.random.default_rng(sum(map(ord, name)))
    rewards = rng.normal(0, 1, (3 * SIZE, 2))
    if "unjudged" in name:
        rewards[1], rewards[3, 0], rewards[SIZE : 2 * SIZE - 1] = np.nan, np.nan, np.nan
    if name == "equal":
        rewards[:SIZE] = 0.7
    return rewards

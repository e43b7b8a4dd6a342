"""Random scores of texts, and every loss on them: the shared input of the goldens, TRL's and transformers' own code and jaxtune."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import load_config
from jaxtune.objectives.reward import classification_loss, reward_loss

N, L = 7, 3
CASES = {
    "reward": {"objective": "reward"},
    "reward_centred": {"objective": "reward", "center_rewards_coefficient": 0.05},
    "reward_margin": {"objective": "reward"},
    "reward_margin_centred": {"objective": "reward", "center_rewards_coefficient": 0.01},
    "single_label": {"objective": "classification", "num_labels": L},
    "multi_label": {"objective": "classification", "num_labels": L, "problem_type": "multi_label_classification"},
    "regression": {"objective": "classification", "num_labels": 1},
    "regression_several": {"objective": "classification", "num_labels": L, "problem_type": "regression"},
    "stepwise": {"objective": "stepwise_reward"},
}


def config(name):
    return load_config({"model": "none"} | CASES[name])


def given(name):
    """float64 `scores` and what the rows say: of n pairs, chosen ones first, `[2n, 1]` and `[n]`; of n texts `[n, L]` and labels."""
    rng = np.random.default_rng(sum(map(ord, name)))
    run = config(name)
    if run.objective == "reward":
        said = rng.gamma(2.0, 0.5, N) if "margin" in name else np.zeros(N)
        return {"scores": rng.normal(0, 1.5, (2 * N, 1)), "said": said}
    labels = run.num_labels or 2
    said = {
        "regression": rng.normal(0, 2, (N,) if labels == 1 else (N, labels)),
        "multi_label_classification": rng.integers(0, 2, (N, labels)).astype(float),
    }.get(run.problem_type, rng.integers(0, labels, N).astype(float))
    return {"scores": rng.normal(0, 1.5, (N, labels)), "said": said}


def ours(name, arrays=None):
    """(mean loss, its gradient to `scores`, metrics) by jaxtune, in float32: two rows of answers, the second with empty places."""
    run, arrays = config(name), arrays or given(name)
    pairs = run.objective == "reward"
    order = np.stack([np.arange(N), np.arange(N) + N], 1).reshape(-1) if pairs else np.arange(N)
    said = np.repeat(arrays["said"], 2) if pairs else arrays["said"]
    empty = 16 - len(order)

    def rows(x):
        return jnp.pad(x, [(0, empty)] + [(0, 0)] * (x.ndim - 1)).reshape(2, 8, *x.shape[1:])

    def loss(scores):
        live = rows(jnp.ones(len(order)))
        scores, wanted = rows(scores[order]), rows(jnp.asarray(said, jnp.float32))
        if pairs:
            made = reward_loss(run, scores[..., 0], live, wanted)
        else:
            made = classification_loss(run.problem_type or "single_label_classification", scores, live, wanted)
        return made.total / made.weight, made.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(arrays["scores"], jnp.float32))
    return float(value), np.asarray(gradient), {key: float(total / weight) for key, (total, weight) in metrics.items()}

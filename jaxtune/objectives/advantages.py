"""From rewards to advantages: how much better an answer is than others to the same prompt, or for each of its tokens (ppo) how much better
it went than expected.

Rewards are float64 `[answers, rewards]`, the answers to a prompt next to each other; NaN means that a reward does not score an answer. An
answer without any score is excluded from means and has advantage 0.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Advantages(NamedTuple):
    """For each answer its advantage and its reward (NaN: not scored), and the spread of the rewards it was compared with."""

    advantages: np.ndarray
    rewards: np.ndarray
    spread: np.ndarray


SMALL = 1e-4  # avoids division by zero in a group of equal rewards


def _mean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing: NaN
        return np.nanmean(x, axis=axis, keepdims=True)


def spread(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation with Bessel's correction, ignoring NaN; 0 for a single number."""
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    squares = np.nansum(np.square(x - _mean(x, axis)), axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def weighted(rewards_NF: np.ndarray, weights_F: np.ndarray) -> np.ndarray:
    """`sum_f w_f r_f` for each answer; NaN if no reward scores it."""
    return np.where(np.isnan(rewards_NF).all(1), np.nan, np.nansum(rewards_NF * weights_F, axis=1))


def grpo(config: Any, rewards_NF: np.ndarray, weights_F: np.ndarray, size: int, kl_N: np.ndarray | None = None) -> Advantages:
    """`(r - mean of the group) / (s + 1e-4)`; by `scale_rewards`, s is the spread of the group, of the whole batch, or absent (arXiv
    2402.03300).

    With `multi_objective_aggregation: normalize_then_sum` each reward is scaled in its group, and their weighted sum over the batch (GDPO,
    2601.05242).
    """
    if config.multi_objective_aggregation == "normalize_then_sum":
        grouped = rewards_NF.reshape(-1, size, rewards_NF.shape[1])
        scaled = (grouped - _mean(grouped, 1)) / (spread(grouped, 1) + SMALL)
        sums = weighted(scaled.reshape(rewards_NF.shape), weights_F)
        of_batch = np.broadcast_to(spread(sums), sums.shape)
        return Advantages(np.nan_to_num((sums - _mean(sums)) / (of_batch + SMALL)), weighted(rewards_NF, weights_F), of_batch)
    rewards = weighted(rewards_NF, weights_F)
    grouped = rewards.reshape(-1, size)
    by = spread(rewards)[None] if config.scale_rewards == "batch" else spread(grouped, 1)
    scale = 1.0 if config.scale_rewards == "none" else by + SMALL
    advantages = (grouped - _mean(grouped, 1)) / scale
    return Advantages(np.nan_to_num(advantages).reshape(-1), rewards, np.broadcast_to(by, grouped.shape).reshape(-1))


def rloo(config: Any, rewards_NF: np.ndarray, weights_F: np.ndarray, size: int, kl_N: np.ndarray | None = None) -> Advantages:
    """`r - mean of the other answers' r`, where r is the reward minus `beta` times the answer's log-ratio to the reference (arXiv
    2402.14740)."""
    rewards = weighted(rewards_NF, weights_F)
    judged = rewards
    if config.reward_clip_range is not None:
        judged = np.clip(judged, *config.reward_clip_range)
    if kl_N is not None:
        judged = judged - config.beta * kl_N
    grouped = judged.reshape(-1, size)
    others = (~np.isnan(grouped)).sum(1, keepdims=True) - 1
    rest = np.nansum(grouped, axis=1, keepdims=True) - grouped
    advantages = np.where(others > 0, grouped - rest / np.maximum(others, 1), np.nan)
    if config.normalize_advantages:
        advantages = (advantages - _mean(advantages)) / (spread(advantages) + SMALL)
    return Advantages(np.nan_to_num(advantages).reshape(-1), rewards, np.repeat(spread(grouped, 1).reshape(-1), size))


# objective: (config, rewards [answers, rewards], weights, answers per prompt, log-ratio to the reference) -> Advantages
ADVANTAGES: dict[str, Callable[..., Advantages]] = {"grpo": grpo, "rloo": rloo}


# ---- token by token ----


class TokenAdvantages(NamedTuple):
    """For each token its advantage and its return, float64 `[answers, tokens]`, 0 beyond an answer's end; and TRL's metrics."""

    advantages: np.ndarray
    returns: np.ndarray
    metrics: dict[str, float]


def whiten(x: np.ndarray, there: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """`(x - mean) / sqrt(var + 1e-8)` over the masked positions, 0 elsewhere; without `shift_mean` the mean is added back."""
    mean, count = x[there].mean(), np.count_nonzero(there)
    variance = np.square(x[there] - mean).sum() / max(count - 1, 1)
    return np.where(there, (x - mean) / np.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean), 0.0)


def ppo(
    config: Any, scores_N: np.ndarray, lengths_N: np.ndarray, old_NT: np.ndarray, ref_NT: np.ndarray | None, values_NT: np.ndarray
) -> TokenAdvantages:
    """Generalised advantage estimation (arXiv 1506.02438). The reward of a token is `-kl_coef` times its KL to the reference (1909.08593),
    plus the answer's score at its last token.

    `A_t = d_t + gamma lam A_t+1`, `d_t = r_t + gamma V_t+1 - V_t`, with V = 0 after the last token; the return is `A + V`, and advantages
    are whitened over all tokens of the rollout. For log-ratios `x = log p_ref / p` the KL is `-x` (`kl_estimator` k1) or `e^x - 1 - x`
    (k3). All float64, `scores_N [answers]`, the others `[answers, tokens]`.
    """
    N, T = old_NT.shape
    there = np.arange(T) < lengths_N[:, None]
    x = np.zeros(old_NT.shape) if ref_NT is None else np.where(there, ref_NT - old_NT, 0.0)
    kl = -x if config.kl_estimator == "k1" else np.exp(x) - 1 - x
    rewards = -config.kl_coef * kl
    of_kl = float(rewards.sum(1).mean())
    rewards[np.arange(N), lengths_N - 1] += scores_N
    if config.whiten_rewards:
        rewards = whiten(rewards, there, shift_mean=False)
    values = np.where(there, values_NT, 0.0)
    after, advantages = np.append(values[:, 1:], np.zeros((N, 1)), axis=1), np.zeros_like(values)
    deltas, last = rewards + config.gamma * after - values, np.zeros(N)
    for t in reversed(range(T)):
        advantages[:, t] = last = deltas[:, t] + config.gamma * config.lam * last
    returns = advantages + values
    metrics = {
        "objective/kl": float(kl.sum(1).mean()), "objective/entropy": float(-np.where(there, old_NT, 0.0).sum(1).mean()),
        "objective/non_score_reward": of_kl, "objective/scores": float(scores_N.mean()), "objective/rlhf_reward": of_kl + scores_N.mean(),
    }  # fmt: skip
    if (variance := returns[there].var()) > 0:
        metrics["val/var_explained"] = float(1 - (returns - values)[there].var() / variance)
    return TokenAdvantages(whiten(advantages, there), returns, metrics)

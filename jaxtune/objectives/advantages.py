"""From the rewards of several answers to one prompt to what each of them is told: how much better it was than the others.

Rewards come as numbers, float64 `[answers, rewards]`, the answers to a prompt side by side; NaN is a reward that does not judge an
answer. An answer that none of them judges has no part in means, and the advantage 0.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Advantages(NamedTuple):
    """Of each answer its advantage and its reward (NaN: not judged), and the spread of the rewards it was compared with."""

    advantages: np.ndarray
    rewards: np.ndarray
    spread: np.ndarray


SMALL = 1e-4  # keeps a group of equal rewards from dividing by nothing


def _mean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing: NaN
        return np.nanmean(x, axis=axis, keepdims=True)


def spread(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation with Bessel's correction, NaN left out; 0 for a single number."""
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    squares = np.nansum(np.square(x - _mean(x, axis)), axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def weighted(rewards_NF: np.ndarray, weights_F: np.ndarray) -> np.ndarray:
    """`sum_f w_f r_f` of each answer; NaN where no reward judges it."""
    return np.where(np.isnan(rewards_NF).all(1), np.nan, np.nansum(rewards_NF * weights_F, axis=1))


def grpo(config: Any, rewards_NF: np.ndarray, weights_F: np.ndarray, size: int, kl_N: np.ndarray | None = None) -> Advantages:
    """`(r - mean of the group) / (s + 1e-4)`, s by `scale_rewards`: of the group, of the whole batch, or none (arXiv 2402.03300).

    With `multi_objective_aggregation: normalize_then_sum` each reward is scaled in its group, and their weighted sum over the batch
    (GDPO, 2601.05242).
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
    """`r - mean of the other answers' r`, r the reward less `beta` times the answer's log-ratio to the reference (arXiv 2402.14740)."""
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


# objective: (config, rewards [answers, rewards], weights, answers to a prompt, log-ratio to the reference) -> Advantages
ADVANTAGES: dict[str, Callable[..., Advantages]] = {"grpo": grpo, "rloo": rloo}

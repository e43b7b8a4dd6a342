"""The keys of objectives that sample answers and learn from their rewards (grpo, rloo, ppo): defaults, and invalid combinations."""

import math
import re
from typing import TYPE_CHECKING, Any

from jaxtune.errors import ConfigError

if TYPE_CHECKING:
    from jaxtune.config.schema import Config

GROUPED = ("grpo", "rloo")  # which compare an answer with others to its prompt
POLICY = (*GROUPED, "ppo")
GENERATIONS = {"grpo": 8, "rloo": 2, "ppo": 1}
LEAST_GENERATIONS = dict.fromkeys(GROUPED, 2) | {"ppo": 1}
TEMPERATURE = {"ppo": 0.7}
AT_LEAST = {
    "num_generations_eval": 1, "steps_per_generation": 1, "num_iterations": 1, "max_completion_length": 1, "epsilon": 0, "top_k": 0,
    "beta": 0, "num_ppo_epochs": 1, "num_mini_batches": 1, "kl_coef": 0, "vf_coef": 0, "gamma": 0, "lam": 0,
}  # fmt: skip
ABOVE = dict.fromkeys(("temperature", "top_p", "repetition_penalty", "delta", "off_policy_mask_threshold", "top_entropy_quantile"), 0)
ABOVE |= dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg", "cliprange", "cliprange_value", "missing_eos_penalty"), 0)
AT_MOST = {"top_p": 1, "min_p": 1, "top_entropy_quantile": 1, "gamma": 1, "lam": 1}


def resolve(config: "Config") -> dict[str, Any]:
    """Values for defaults of None."""
    out: dict[str, Any] = {}
    generations = config.num_generations or GENERATIONS[config.objective]
    defaults = {"num_generations": generations, "num_generations_eval": generations, "max_completion_length": 512}
    if config.objective in GROUPED:
        defaults |= {"epsilon_high": config.epsilon, "steps_per_generation": config.gradient_accumulation_steps}
    out |= {key: value for key, value in defaults.items() if getattr(config, key) is None}
    if isinstance(config.scale_rewards, bool):
        out["scale_rewards"] = "group" if config.scale_rewards else "none"
    if config.metric_for_best_model in ("eval_loss", "loss"):  # which says nothing about how good the answers are
        out["metric_for_best_model"] = "eval_reward"
    return out


def step_shape(config: "Config") -> tuple[int, int, int]:
    """Micro-batches per step, answers in each per device, and the number of steps that one rollout is split into.

    For ppo a rollout has the answers of `gradient_accumulation_steps` micro-batches, as in TRL, whose mini-batches are parts of it.
    """
    micro_batches, each = config.gradient_accumulation_steps, config.per_device_train_batch_size
    if config.objective != "ppo":
        return micro_batches, each, config.steps_per_generation // micro_batches
    common = math.gcd(micro_batches, config.num_mini_batches)
    return micro_batches // common, each * common // config.num_mini_batches, config.num_mini_batches


def least_batch(config: "Config", devices: int) -> int:
    """The smallest `per_device_train_batch_size` for which a rollout is whole groups of answers and whole steps; others must be multiples.
    """
    if config.objective not in POLICY:
        return 1
    micro_batches = config.gradient_accumulation_steps
    times = devices * (micro_batches if config.objective == "ppo" else config.steps_per_generation)
    groups = config.num_generations // math.gcd(config.num_generations, times)
    steps = config.num_mini_batches // math.gcd(config.num_mini_batches, micro_batches) if config.objective == "ppo" else 1
    return math.lcm(groups, steps)


def steps_per_rollout(config: "Config") -> int:
    """Optimiser steps that learn from one rollout."""
    return step_shape(config)[2] * (config.num_ppo_epochs if config.objective == "ppo" else config.num_iterations)


def kl_weight(config: "Config") -> float:
    """The weight of the KL to the reference model, in the loss or in the reward; 0: no KL."""
    return config.kl_coef if config.objective == "ppo" else config.beta or 0.0


def check(config: "Config") -> None:
    """Raise ConfigError for the first problem found."""
    for table, wrong, words in (
        (AT_LEAST, lambda value, bound: value < bound, "at least"),
        (ABOVE, lambda value, bound: value <= bound, "above"),
        (AT_MOST, lambda value, bound: value > bound, "at most"),
    ):
        for key, bound in table.items():
            value = getattr(config, key)
            if value is not None and (wrong(value, bound) or not math.isfinite(value)):
                raise ConfigError(f"{key} is {value:g}, but has to be {words} {bound}.")
    if config.num_generations < (least := LEAST_GENERATIONS[config.objective]):
        raise ConfigError(f"num_generations is {config.num_generations}, but has to be at least {least}.")
    if config.loss_type == ("cispo",) and config.epsilon_high <= config.epsilon < 1:
        raise ConfigError(
            f"loss_type cispo caps the ratio itself at epsilon_high, and {config.epsilon_high:g} would scale every gradient down; write "
            "epsilon_high: 5.0."
        )
    _shares(config)
    _rewards(config)
    if config.sync_ref_model and not kl_weight(config):
        key = "kl_coef" if config.objective == "ppo" else "beta"
        raise ConfigError(f"sync_ref_model moves the reference model, which {key} 0 does without; leave it out, or write {key} above 0.")
    if config.evaluate.metric:
        raise ConfigError(
            f"evaluate.metric is of answers that rows hold; objective {config.objective} measures data.eval by its own rewards "
            "(eval_reward). Leave it out, and see jaxtune evaluate for the result."
        )


def _shares(config: "Config") -> None:
    """Check that a rollout can be split into whole steps."""
    micro_batches, each = config.gradient_accumulation_steps, config.per_device_train_batch_size
    if config.objective == "ppo":
        if micro_batches * each % config.num_mini_batches:
            raise ConfigError(
                f"num_mini_batches is {config.num_mini_batches}, but has to divide the answers of a drawing on a device, "
                f"per_device_train_batch_size * gradient_accumulation_steps = {each} * {micro_batches}."
            )
    elif config.steps_per_generation % micro_batches:
        raise ConfigError(
            f"steps_per_generation is {config.steps_per_generation}, but has to be a multiple of gradient_accumulation_steps "
            f"({micro_batches}): answers are drawn for whole steps."
        )


def _rewards(config: "Config") -> None:
    count = len(config.reward_funcs) + len(config.reward_model)
    if config.reward_weights is not None and count and len(config.reward_weights) != count:
        raise ConfigError(f"reward_weights has {len(config.reward_weights)} numbers for {count} rewards; write one for each.")
    bounds = config.reward_clip_range
    if bounds is not None and (len(bounds) != 2 or bounds[0] >= bounds[1]):
        raise ConfigError(f"reward_clip_range is {list(bounds)}, but has to be [LOWEST, HIGHEST].")
    if config.reward_pattern is not None:
        try:
            re.compile(config.reward_pattern)
        except re.error as error:
            raise ConfigError(f"reward_pattern {config.reward_pattern!r} is no regular expression: {error}.") from None
    if "format" in config.reward_funcs and config.reward_pattern is None:
        raise ConfigError("reward_funcs: format needs reward_pattern, the regular expression that the whole answer has to match.")

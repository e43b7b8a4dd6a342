"""Known failures of preference and policy tuning, detected in a run's own log."""

import math
from collections.abc import Sequence
from typing import Any

WITH_REFERENCE = ("dpo", "kto")
WINDOW = 5  # log rows per window
FALLEN = 0.1  # share of an answer's log-probability
LONGER = 1.25  # times as long
NO_SIGNAL, CUT_OFF, CLIPPED = 0.9, 0.8, 0.3  # shares of groups, of answers, of tokens
FAR = 2.0  # nats
BLIND = -0.5  # share of the variance of returns
AT_START = dict.fromkeys(("sigmoid", "sigmoid_norm", "robust"), math.log(2)) | {"kto": 0.5}  # the loss of a model that equals its reference
BY_LENGTH = ("ipo", "sigmoid_norm", "simpo", "orpo")  # losses of means over tokens, not of sums


def symptoms(config: Any, log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """`{name: what is seen, and what to do}` from the rows of metrics.jsonl so far (ignoring those of evaluations).

    The first and the last window of `WINDOW` rows are compared, so nothing is reported before there are two of them.
    """
    rows = [row for row in log if "loss" in row]
    if (config.loss_type is None and config.objective != "ppo") or len(rows) < 2 * WINDOW:
        return {}
    first, last = _means(rows[:WINDOW]), _means(rows[-WINDOW:])
    found = {
        "both_fall": _both_fall(config, first, last),
        "margin_without_accuracy": _margin_without_accuracy(first, last),
        "stuck": _stuck(config, rows[-2 * WINDOW :]),
        "length": _length(config, last),
        "no_signal": _no_signal(config, last),
        "cut_off": _cut_off(config, last),
        "far": _far(config, last),
        "blind": _blind(last),
    }
    return {name: said for name, said in found.items() if said}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of every metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _no_signal(config: Any, last: dict) -> str | None:
    """Groups whose answers all have the same reward have no advantages."""
    share = last.get("frac_reward_zero_std")
    if share is None or share < NO_SIGNAL:
        return None
    return (
        f"in {share:.0%} of the groups all answers have the same reward ({last.get('reward', 0.0):.3g} on average), so nothing is learnt "
        "from them. Use easier or harder prompts, a finer-grained reward, more num_generations, a higher temperature"
    )


def _cut_off(config: Any, last: dict) -> str | None:
    share = last.get("completions/clipped_ratio")
    if share is None or share < CUT_OFF:
        return None
    return (
        f"{share:.0%} of the answers are cut off at max_completion_length ({config.max_completion_length}) before they end. Raise it, ask "
        "for short answers, reward them (soft_overlong_punishment), or leave them out (mask_truncated_completions: true)"
    )


def _far(config: Any, last: dict) -> str | None:
    kl, clipped = last.get("kl"), last.get("clip_ratio/region_mean", last.get("policy/clipfrac_avg", 0.0))
    if (kl is None or kl < FAR or "reward" not in last) and clipped < CLIPPED:
        return None
    found = f"{clipped:.0%} of the ratios are clipped" if clipped >= CLIPPED else f"the KL to the reference is {kl:.2g} nats a token"
    times, weight = ("num_ppo_epochs", "kl_coef") if config.objective == "ppo" else ("num_iterations", "beta")
    return f"{found}: the policy changes fast. Lower learning_rate or {times}, or raise {weight}"


def _blind(last: dict) -> str | None:
    """A value head whose error is larger than the variance of the returns."""
    explained = last.get("val/var_explained")
    if explained is None or explained > BLIND:
        return None
    return (
        f"the value head predicts worse than the mean of the returns (val/var_explained {explained:.2g}), so that advantages are mostly "
        "noise. Raise vf_coef, cliprange_value or num_ppo_epochs, or sample more answers at a time"
    )


def _both_fall(config: Any, first: dict, last: dict) -> str | None:
    """Compared with the reference's log-probabilities of the same answers; without a reference, with those of the first rows."""
    fallen = {}
    for side in ("chosen", "rejected"):
        logps, reward = last.get(f"logps/{side}"), last.get(f"rewards/{side}")
        if logps is None or reward is None:
            return None
        start = logps - reward / config.beta if config.objective in WITH_REFERENCE else first.get(f"logps/{side}", logps)
        fallen[side] = (start - logps) / max(abs(start), 1e-9)
    if min(fallen.values()) < FALLEN:
        return None
    return (
        f"the log-probabilities of chosen and rejected answers both fall, by {fallen['chosen']:.0%} and {fallen['rejected']:.0%}: the "
        "model unlearns good answers with the bad ones. Lower learning_rate, raise beta, or add the chosen answers' likelihood "
        "(dpo: loss_type: [sigmoid, sft] with loss_weights: [1.0, 0.2]; simpo: cpo_alpha)"
    )


def _margin_without_accuracy(first: dict, last: dict) -> str | None:
    margin, accuracy = last.get("rewards/margins"), last.get("rewards/accuracies")
    if margin is None or accuracy is None or accuracy > 0.55 or margin < max(0.1, 2 * first.get("rewards/margins", 0.0)):
        return None
    return (
        f"the margin of rewards has grown to {margin:.2g}, but only {accuracy:.0%} of the pairs are ranked correctly: a few pairs make the "
        "margin. Look at the rows (labels the wrong way round, equal answers), lower learning_rate, or take a bounded loss (ipo, hinge)"
    )


def _stuck(config: Any, rows: Sequence[dict[str, Any]]) -> str | None:
    start = AT_START.get(config.loss_type[0]) if config.objective in WITH_REFERENCE and len(config.loss_type) == 1 else None
    if start is None or any(row["loss"] is None or abs(row["loss"] - start) > 0.005 for row in rows):
        return None
    return (
        f"the loss stays at {start:.3f}, where it is for a model that equals its reference: nothing is learnt. Raise learning_rate (an "
        f"adapter takes about ten times that of full tuning), or beta ({config.beta:g})"
    )


def _length(config: Any, last: dict) -> str | None:
    chosen, rejected = last.get("lengths/chosen"), last.get("lengths/rejected")
    by_length = config.ld_alpha is not None or set(config.loss_type or ()) <= set(BY_LENGTH)
    if chosen is None or rejected is None or chosen < LONGER * rejected or by_length:
        return None
    return (
        f"chosen answers are longer than rejected ones, {chosen:.0f} tokens against {rejected:.0f}, and the loss is of sums over tokens: "
        "the model may learn to write more. Take a loss of means (simpo, loss_type: sigmoid_norm), ld_alpha: 0.5 (dpo), or balance the rows"
    )

"""Learning from pairs of answers: DPO with the losses of pairwise.py, ORPO, CPO, SimPO.

A batch's loss is the mean over its pairs, however they are arranged in rows, micro-batches and devices. As in TRL, three things are
computed per micro-batch instead, and so depend (slightly) on how a batch is split: `aot` and `aot_unpaired` sort the micro-batch's pairs,
and the mean over tokens in `sft`, ORPO and CPO is over the tokens of the micro-batch. Devices of one mesh share a micro-batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import AnswerLogprobs, answer_logprobs, metric, reference_logps
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.pairwise import BY_MEAN, LOSSES, REFERENCE_FREE, Pairs, log_odds_ratio


def split_pairs(x_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chosen and rejected of all pairs, `[n]` each: odd and even numbers."""
    by_pair = x_BS.reshape(-1, 2)
    return by_pair[:, 0], by_pair[:, 1]


def dpo(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`sum_k w_k loss_k` (`loss_type`, `loss_weights`; objectives/pairwise.py), summed over pairs, and the number of pairs.

    `use_weighting` (WPO, arXiv 2406.11827 eq. 2) multiplies each pair by `exp(mean(log p - log sum_v p_v^2))` of both answers: how likely
    they are relative to what the policy itself would say.
    """
    out = answer_logprobs(config, model_config, params, batch)
    return dpo_loss(config, out, reference_logps(config, model_config, base, batch))


def dpo_loss(config: Any, out: AnswerLogprobs, ref_BS: jax.Array) -> Loss:
    """DPO's loss and metrics from log-probabilities."""
    pairs = Pairs(*split_pairs(out.logp_BS), *split_pairs(ref_BS), *split_pairs(out.length_BS), live=_live(out))
    weights = config.loss_weights or (1.0,) * len(config.loss_type)
    losses = sum(weight * LOSSES[name](pairs, config) for name, weight in zip(config.loss_type, weights, strict=True))
    if config.use_weighting:
        likeness_BS = jnp.exp(out.mean(out.tokens.logp_BN - out.tokens.collision_BN))
        losses *= jax.lax.stop_gradient(likeness_BS.reshape(-1, 2).prod(-1))
    metrics = _metrics(out, pairs.live, (pairs.chosen, pairs.rejected), (config.beta * pairs.a, config.beta * pairs.b))
    return Loss((losses * pairs.live).sum(), pairs.live.sum(), metrics)


def orpo(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`NLL(prompt, y_w) - beta log sigmoid(log odds ratio)` (arXiv 2403.07691 eq. 6): means over tokens and over pairs."""
    return orpo_loss(config, answer_logprobs(config, model_config, params, batch))


def orpo_loss(config: Any, out: AnswerLogprobs) -> Loss:
    """ORPO's loss and metrics from log-probabilities."""
    live, (chosen, rejected) = _live(out), split_pairs(out.mean(out.tokens.logp_BN))
    rejected_BN = out.member_BSN[:, 1::2].any(1)
    told_BN = (out.tokens.weights_BN != 0) & ~rejected_BN  # the prompts are trained with the chosen answers
    odds = log_odds_ratio(jnp.where(live > 0, chosen, -1.0), jnp.where(live > 0, rejected, -1.0))
    losses = _nll(out, told_BN) - config.beta * jax.nn.log_sigmoid(odds)
    metrics = _metrics(out, live, (chosen, rejected), (config.beta * chosen, config.beta * rejected))
    metrics |= {"nll_loss": metric(-out.tokens.logp_BN, told_BN.astype(jnp.float32)), "log_odds_chosen": metric(odds, live)}
    metrics |= {"log_odds_ratio": metric(jax.nn.log_sigmoid(odds), live)}
    return Loss((losses * live).sum(), live.sum(), metrics)


def cpo(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`loss(log p(y_w) - log p(y_l)) + cpo_alpha NLL(y_w)`: CPO (arXiv 2401.08417), and SimPO (2405.14734), which averages over tokens."""
    return cpo_loss(config, answer_logprobs(config, model_config, params, batch))


def cpo_loss(config: Any, out: AnswerLogprobs) -> Loss:
    """CPO's loss and metrics from log-probabilities."""
    (name,) = config.loss_type
    live, (chosen, rejected) = _live(out), split_pairs(out.mean(out.tokens.logp_BN) if name in BY_MEAN else out.logp_BS)
    losses = REFERENCE_FREE[name](chosen - rejected, config)
    metrics = _metrics(out, live, (chosen, rejected), (config.beta * chosen, config.beta * rejected))
    if config.cpo_alpha:
        chosen_BN = out.member_BSN[:, ::2].any(1)
        losses += config.cpo_alpha * _nll(out, chosen_BN)
        metrics |= {"nll_loss": metric(-out.tokens.logp_BN, chosen_BN.astype(jnp.float32))}
    return Loss((losses * live).sum(), live.sum(), metrics)


def _live(out: AnswerLogprobs) -> jax.Array:
    """1 for each existing pair, `[n]`."""
    return (out.length_BS[:, ::2] > 0).astype(jnp.float32).reshape(-1)


def _nll(out: AnswerLogprobs, where_BN: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the micro-batch's tokens at these positions."""
    return -jnp.where(where_BN, out.tokens.logp_BN, 0.0).sum() / jnp.maximum(where_BN.sum(), 1)


Both = tuple[jax.Array, jax.Array]  # of the chosen and of the rejected answers


def _metrics(out: AnswerLogprobs, live: jax.Array, logps: Both, rewards: Both) -> dict[str, tuple[jax.Array, jax.Array]]:
    """TRL's metrics. `rewards/...` are implicit: beta times the log-ratio (or log-probability)."""
    chosen, rejected = rewards
    chosen_BN, rejected_BN = (out.member_BSN[:, side::2].any(1).astype(jnp.float32) for side in range(2))
    return {
        "rewards/chosen": metric(chosen, live),
        "rewards/rejected": metric(rejected, live),
        "rewards/accuracies": metric((chosen > rejected).astype(jnp.float32), live),
        "rewards/margins": metric(chosen - rejected, live),
        "logps/chosen": metric(logps[0], live),
        "logps/rejected": metric(logps[1], live),
        "logits/chosen": metric(out.tokens.mean_logit_BN, chosen_BN),
        "logits/rejected": metric(out.tokens.mean_logit_BN, rejected_BN),
        "lengths/chosen": metric(split_pairs(out.length_BS)[0], live),
        "lengths/rejected": metric(split_pairs(out.length_BS)[1], live),
        "mean_token_accuracy": metric(out.tokens.correct_BN, chosen_BN),
        "entropy": metric(out.tokens.entropy_BN, out.member_BSN.any(1).astype(jnp.float32)),
    }

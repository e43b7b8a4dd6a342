"""Reward models and classifiers: a few scores of a text, read at its last token."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import metric
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.preference import split_pairs


def answer_scores(model_config: ModelConfig, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Scores of each answer, float32 `[B, S, num_labels]`, at its last token, and 1 where there is an answer `[B, S]`.

    For a whole text this is the last token except padding, which may be the EOS token (`ModelConfig.pad_token_id`): an answer that consists
    of nothing else is scored at the end of its prompt, as in transformers.
    """
    out = decoder.hidden(model_config, params, batch.tokens, batch.positions, batch.segments, parents_BT=batch.parents)
    numbers_BT, S, T = batch.answers.numbers, batch.answers.values.shape[1], batch.tokens.shape[1]
    its_BST = numbers_BT[:, None, :] == jnp.arange(1, S + 1)[None, :, None]
    counted_BST = its_BST
    if model_config.labels_of == "sequence" and model_config.pad_token_id is not None:
        counted_BST = its_BST & (batch.tokens != model_config.pad_token_id)[:, None, :]
    last_BS = jnp.where(counted_BST, jnp.arange(T), -1).max(-1)
    first_BS = its_BST.argmax(-1)
    before_BS = jnp.maximum(first_BS - 1, 0) if batch.before is None else jnp.take_along_axis(batch.before, first_BS, axis=1)
    place_BS = jnp.where(last_BS < 0, before_BS, last_BS)
    hidden_BSD = jnp.take_along_axis(out.hidden_BTD, place_BS[..., None], axis=1)
    return decoder.scores(model_config, params, hidden_BSD), its_BST.any(-1).astype(jnp.float32)


# ---- pairs: Bradley-Terry ----


def reward(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2`, over pairs.

    The margin is the row's own (arXiv 2307.09288 eq. 2; by default 0); c is `center_rewards_coefficient` (2312.09244), which keeps rewards,
    whose differences alone are learnt, around 0.
    """
    scores_BSL, live_BS = answer_scores(model_config, params, batch)
    return reward_loss(config, scores_BSL[..., 0], live_BS, batch.answers.values)


def reward_loss(config: Any, scores_BS: jax.Array, live_BS: jax.Array, margins_BS: jax.Array) -> Loss:
    """The loss and TRL's metrics from the alternating scores of chosen and rejected answers."""
    (chosen, rejected), (live, _), (margin, _) = split_pairs(scores_BS), split_pairs(live_BS), split_pairs(margins_BS)
    losses = -jax.nn.log_sigmoid(chosen - rejected - margin)
    if config.center_rewards_coefficient is not None:
        losses += config.center_rewards_coefficient * (chosen + rejected) ** 2
    any_ = (live_BS.sum() > 0).astype(jnp.float32)
    lowest, highest = (jnp.where(live_BS > 0, scores_BS, fill) for fill in (jnp.inf, -jnp.inf))
    metrics = {
        "accuracy": metric((chosen > rejected).astype(jnp.float32), live),
        "margin": metric(chosen - rejected, live),
        "min_reward": metric(jnp.where(any_ > 0, lowest.min(), 0.0), any_),
        "mean_reward": metric(scores_BS, live_BS),
        "max_reward": metric(jnp.where(any_ > 0, highest.max(), 0.0), any_),
    }
    return Loss((losses * live).sum(), live.sum(), metrics)


# ---- classes and numbers ----


def _classes(scores_BSL: jax.Array, wanted_BS: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    wanted = wanted_BS.astype(jnp.int32)
    logp = jax.nn.log_softmax(scores_BSL, axis=-1)
    return -jnp.take_along_axis(logp, wanted[..., None], axis=-1)[..., 0], {"accuracy": scores_BSL.argmax(-1) == wanted}


def _numbers(scores_BSL: jax.Array, wanted: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    error = scores_BSL - wanted.reshape(scores_BSL.shape)
    return jnp.square(error).mean(-1), {"mean_absolute_error": jnp.abs(error).mean(-1)}


def _several(scores_BSL: jax.Array, wanted_BSL: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Binary cross-entropy of each label, and the shares of correct labels and of entirely correct sets."""
    wanted = wanted_BSL.reshape(scores_BSL.shape)
    losses = -(wanted * jax.nn.log_sigmoid(scores_BSL) + (1 - wanted) * jax.nn.log_sigmoid(-scores_BSL))
    right = (scores_BSL > 0) == (wanted > 0.5)
    return losses.mean(-1), {"accuracy": right.astype(jnp.float32).mean(-1), "exact_match": right.all(-1)}


# transformers' problem types: (scores [B, S, L], the row's values [B, S] or [B, S, L]) -> losses and metrics [B, S]
PROBLEMS = {"single_label_classification": _classes, "regression": _numbers, "multi_label_classification": _several}


def classification(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """Cross-entropy of classes, squared error of numbers, or binary cross-entropy of independent labels: `problem_type`."""
    return classification_loss(config.problem_type, *answer_scores(model_config, params, batch), batch.answers.values)


def stepwise_reward(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """Cross-entropy of each step being wrong (0) or right (1), at its separator (arXiv 2211.14275, 2305.20050)."""
    return classification_loss("single_label_classification", *answer_scores(model_config, params, batch), batch.answers.values)


def classification_loss(problem: str, scores_BSL: jax.Array, live_BS: jax.Array, wanted: jax.Array) -> Loss:
    """The loss and metrics from scores, summed over texts or steps."""
    losses_BS, measured = PROBLEMS[problem](scores_BSL, wanted)
    metrics = {name: metric(value.astype(jnp.float32), live_BS) for name, value in measured.items()}
    return Loss((losses_BS * live_BS).sum(), live_BS.sum(), metrics)

"""From tokens to whole answers: sums per answer, and the same under the reference model."""

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.config.objectives import ON_TOKENS
from jaxtune.data.batch import Batch
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.rope import BY_LENGTH
from jaxtune.objectives.logprobs import TokenLogprobs, token_logprobs

log = logging.getLogger("jaxtune")
REFERENCE = "reference"  # in `base`: the reference model's tree, if it is not the base itself


class AnswerLogprobs(NamedTuple):
    """For each row's answers: their log-probability, float32 `[B, S]`, their number of trained tokens, and the token-level data they
    consist of."""

    logp_BS: jax.Array
    length_BS: jax.Array
    member_BSN: jax.Array
    tokens: TokenLogprobs

    def mean(self, x_BN: jax.Array) -> jax.Array:
        """The mean of a number over the tokens of each answer, `[B, S]`."""
        return _sum(self.member_BSN, x_BN) / jnp.maximum(self.length_BS, 1)


def _sum(member_BSN: jax.Array, x_BN: jax.Array) -> jax.Array:
    return jnp.where(member_BSN, x_BN[:, None, :], 0.0).sum(-1)


def members(batch: Batch, index_BN: jax.Array, weights_BN: jax.Array) -> jax.Array:
    """bool `[B, S, N]`: whether a trained token belongs to an answer."""
    numbers_BN = jnp.take_along_axis(batch.answers.numbers, index_BN, axis=1)
    answers_S = jnp.arange(1, batch.answers.values.shape[1] + 1)
    return (numbers_BN[:, None, :] == answers_S[None, :, None]) & (weights_BN != 0)[:, None, :]


def answer_logprobs(config: Any, model_config: ModelConfig, params: dict, batch: Batch) -> AnswerLogprobs:
    """`log p(answer | prompt)`, the sum over the answer's trained tokens.

    With `ld_alpha` (arXiv 2409.06411), the tokens of a pair's longer answer beyond the length of the shorter one have this weight.
    """
    tokens = token_logprobs(model_config, params, batch)
    return sum_answers(batch, tokens, config.ld_alpha)


def sum_answers(batch: Batch, tokens: TokenLogprobs, ld_alpha: float | None = None) -> AnswerLogprobs:
    """The same from token log-probabilities."""
    member_BSN = members(batch, tokens.index_BN, tokens.weights_BN)
    length_BS = member_BSN.sum(-1).astype(jnp.float32)
    if ld_alpha is None:
        return AnswerLogprobs(_sum(member_BSN, tokens.logp_BN), length_BS, member_BSN, tokens)
    by_pair = length_BS.reshape(length_BS.shape[0], -1, 2)
    shorter_BS = jnp.broadcast_to(by_pair.min(-1, keepdims=True), by_pair.shape).reshape(length_BS.shape)
    tail_BSN = member_BSN & (jnp.cumsum(member_BSN, axis=-1) > shorter_BS[..., None])
    logp_BS = _sum(member_BSN & ~tail_BSN, tokens.logp_BN) + ld_alpha * _sum(tail_BSN, tokens.logp_BN)
    return AnswerLogprobs(logp_BS, length_BS, member_BSN, tokens)


def reference_logps(config: Any, model_config: ModelConfig, base: dict, batch: Batch) -> jax.Array:
    """`log p(answer | prompt)` under the reference model, `[B, S]`: as computed beforehand, or by `base[REFERENCE]`, or by the base itself.
    """
    if batch.answers.ref_logps is not None:
        return batch.answers.ref_logps
    reference = base.get(REFERENCE, base)
    return jax.lax.stop_gradient(answer_logprobs(config, model_config, reference, batch).logp_BS)


def unshared(config: Any, model_config: ModelConfig) -> Any:
    """The run's config with one prompt per answer (`data.shared_prompts: false`) if the model's layers carry a state, which cannot continue
    from another segment; otherwise, and without answers, unchanged."""
    if config.objective in ON_TOKENS or not (model_config.carries_state and config.data.shared_prompts):
        return config
    log.info("data.shared_prompts: false, since layers of this model carry a state through each text: answers have prompts of their own")
    return config.replace(data=dataclasses.replace(config.data, shared_prompts=False))


def check_shared_prompts(model_config: ModelConfig, longest: int) -> None:
    """Raise ConfigError if a prompt cannot be computed once for several answers, because the rotary embedding depends on the length of the
    whole text.

    longest: tokens of the longest prompt with one answer. Up to the length of the model's first training, such an embedding is fixed.
    """
    for rope in model_config.ropes:
        if rope.kind in BY_LENGTH and longest > rope.original_max:
            raise ConfigError(
                f"data.shared_prompts: the longest prompt and answer have {longest} tokens, and beyond {rope.original_max} this model's "
                f"positions ({rope.kind}) turn by the length of the text, so that each answer has a prompt of its own; write "
                "data.shared_prompts: false"
            )


def metric(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A weighted mean as its two sums, without gradient."""
    return jax.lax.stop_gradient((x * weight).sum()), weight.sum()

"""GRPO and its relatives, and RLOO: learning from several answers to one prompt, each with a reward.

The learning signal of an answer is its advantage (objectives/advantages.py). The policy that sampled it, if it differs from this step's
policy, is represented by its log-probabilities (`Batch.rollout.old_logps`), the reference model of a KL term by its own, or by its tree.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import REFERENCE, members, metric
from jaxtune.objectives.logprobs import TokenLogprobs, token_logprobs
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.sft import balanced

NOTHING = 1e-9  # the weight of a batch without answers


class SampledAnswers(NamedTuple):
    """Sampled answers with their data per token or per answer. A padded token belongs to no answer.

    Attributes:
        logp_BN: float32, `log p(token | earlier tokens)` under the policy; the only one with a gradient.
        entropy_BN: of the prediction (nats).
        member_BSN: bool, whether a token belongs to an answer.
        live_BS: 1 if there is an answer, even one whose tokens are all masked (`mask_truncated_completions`).
        advantage_BS: how much better the answer is than others to its prompt.
        tokens_BS: tokens per answer, averaged over the whole rollout and repeated for each of its answers (dapo's weight).
        old_BN: log-probabilities under the policy that sampled the answer; None: this policy.
        ref_BN: under the reference model; None: there is no KL term.
    """

    logp_BN: jax.Array
    entropy_BN: jax.Array
    member_BSN: jax.Array
    live_BS: jax.Array
    advantage_BS: jax.Array
    tokens_BS: jax.Array
    old_BN: jax.Array | None = None
    ref_BN: jax.Array | None = None

    @property
    def mask_BN(self) -> jax.Array:
        """1 for each token of an answer."""
        return self.member_BSN.any(1).astype(jnp.float32)

    @property
    def length_BS(self) -> jax.Array:
        """Tokens of each answer."""
        return self.member_BSN.sum(-1).astype(jnp.float32)

    def total(self, x_BN: jax.Array) -> jax.Array:
        """The sum of a number over the tokens of each answer, `[B, S]`."""
        return jnp.where(self.member_BSN, x_BN[:, None, :], 0.0).sum(-1)

    def spread(self, x_BS: jax.Array) -> jax.Array:
        """A per-answer number at each of its tokens, `[B, N]`."""
        return jnp.where(self.member_BSN, x_BS[..., None], 0.0).sum(1)


def grpo(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """GRPO (arXiv 2402.03300 eq. 3) with its `loss_type`, and RLOO (2402.14740), for a batch of sampled answers.

    With experts, `router_aux_loss_coef` times the load-balancing loss is added, as in objective sft.
    """
    tokens = logps_of(config, model_config, params, batch)
    return balanced(config, model_config, grpo_loss(config, sampled_answers(config, model_config, base, batch, tokens)), tokens.aux)


def cooled(config: Any, model_config: ModelConfig) -> ModelConfig:
    """The model whose distribution answers are sampled from: its logits are divided by `temperature`, after any soft cap."""
    t = config.temperature
    return replace(model_config, logits_scaling=model_config.logits_scaling * t, logits_softcap=model_config.logits_softcap / t)


def logps_of(config: Any, model_config: ModelConfig, params: dict, batch: Batch) -> TokenLogprobs:
    """Log-probabilities under the distribution that answers are sampled from."""
    return token_logprobs(cooled(config, model_config), params, batch)


def reference_logps_of(config: Any, model_config: ModelConfig, base: dict, batch: Batch) -> jax.Array:
    """The same for the reference model, `[B, N]`, without gradient."""
    return jax.lax.stop_gradient(logps_of(config, model_config, base.get(REFERENCE, base), batch).logp_BN)


def sampled_answers(config: Any, model_config: ModelConfig, base: dict, batch: Batch, tokens: TokenLogprobs) -> SampledAnswers:
    """The batch's answers under a policy's log-probabilities; values computed before the step are taken from the batch."""
    rollout, S = batch.rollout, batch.answers.values.shape[1]
    at = lambda x_BT: None if x_BT is None else jnp.take_along_axis(x_BT, tokens.index_BN, axis=1)  # noqa: E731
    ref_BN = None
    if has_kl_term(config):
        known_BN = at(rollout.ref_logps)
        ref_BN = reference_logps_of(config, model_config, base, batch) if known_BN is None else known_BN
    return SampledAnswers(
        logp_BN=tokens.logp_BN,
        entropy_BN=tokens.entropy_BN,
        member_BSN=members(batch, tokens.index_BN, tokens.weights_BN),
        live_BS=(batch.answers.numbers[:, None, :] == jnp.arange(1, S + 1)[None, :, None]).any(-1).astype(jnp.float32),
        advantage_BS=batch.answers.values,
        tokens_BS=rollout.tokens,
        old_BN=at(rollout.old_logps),
        ref_BN=ref_BN,
    )


def has_kl_term(config: Any) -> bool:
    """Whether the loss compares with a reference model: GRPO's does with a beta; RLOO's KL is part of the reward."""
    return config.objective == "grpo" and config.beta != 0


# ---- the loss of a token ----


class Ratios(NamedTuple):
    """The ingredients of the losses; `[B, N]`, where a per-answer number is the same at each of its tokens."""

    rho: jax.Array  # p / p_old, of the token or of its answer (importance_sampling_level)
    capped: jax.Array  # the same, at most `delta`
    advantage: jax.Array
    logp: jax.Array
    phi: jax.Array | None  # vespo's weight of the answer


def _clipped(r: Ratios, c: Any) -> jax.Array:
    """`-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)`, the first rho at most `delta` (PPO, arXiv 1707.06347; 2412.19437)."""
    return -jnp.minimum(r.capped * r.advantage, jnp.clip(r.rho, 1 - c.epsilon, 1 + c.epsilon_high) * r.advantage)


def _cispo(r: Ratios, c: Any) -> jax.Array:
    """`-stop_gradient(min(rho, epsilon_high)) A log p` (MiniMax-M1, arXiv 2506.13585); epsilon_high is the cap itself."""
    return -jax.lax.stop_gradient(jnp.minimum(r.rho, c.epsilon_high)) * r.advantage * r.logp


def _sapo(r: Ratios, c: Any) -> jax.Array:
    """`-4/t sigmoid(t (rho - 1)) A`, t by the sign of A (arXiv 2511.20347)."""
    t = jnp.where(r.advantage > 0, c.sapo_temperature_pos, c.sapo_temperature_neg)
    return -4 / t * jax.nn.sigmoid(t * (r.rho - 1)) * r.advantage


def _vespo(r: Ratios, c: Any) -> jax.Array:
    """`-phi(w) A log p`, w the answer's ratio (arXiv 2602.10693); phi without gradient."""
    assert r.phi is not None
    return -r.phi * r.advantage * r.logp


def _phi(d: SampledAnswers, log_ratio_BN: jax.Array, c: Any) -> jax.Array:
    """`phi(w) = e^lambda w^k e^(-lambda w)` of each answer, with k and lambda by the sign of its advantage."""
    log_w = jnp.clip(d.total(jnp.clip(log_ratio_BN, -20.0, 20.0)), jnp.log(1e-8), 20.0)
    good = d.advantage_BS >= 0
    k = jnp.where(good, c.vespo_k_pos, c.vespo_k_neg)
    rate = jnp.maximum(jnp.where(good, c.vespo_lambda_pos, c.vespo_lambda_neg), 1e-4)
    return jax.lax.stop_gradient(jnp.exp(rate + k * log_w - rate * jnp.exp(log_w)))


# ---- from tokens to a sum and its weight ----


def _by_answer(d: SampledAnswers, x_BN: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """The mean over answers of the mean over an answer's tokens."""
    return (d.total(x_BN) / jnp.maximum(d.length_BS, 1)).sum(), d.live_BS.sum()


def _by_sum(d: SampledAnswers, x_BN: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """The mean over answers of the sum over an answer's tokens."""
    return d.total(x_BN).sum(), d.live_BS.sum()


def _by_micro_batch(d: SampledAnswers, x_BN: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """The mean over the tokens of the micro-batch; every micro-batch counts the same (as in TRL)."""
    return (x_BN * d.mask_BN).sum() / jnp.maximum(d.mask_BN.sum(), 1), jnp.ones(())


def _by_token(d: SampledAnswers, x_BN: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """The mean over the tokens of the whole rollout (with several steps per rollout, each step has the same share)."""
    return (x_BN * d.mask_BN).sum(), (d.live_BS * d.tokens_BS).sum()


def _by_longest(d: SampledAnswers, x_BN: jax.Array, c: Any) -> tuple[jax.Array, jax.Array]:
    """The sum over tokens divided by `max_completion_length` per answer (Dr. GRPO, arXiv 2503.20783)."""
    return (x_BN * d.mask_BN).sum(), d.live_BS.sum() * c.max_completion_length


Reduction = Callable[[SampledAnswers, jax.Array, Any], tuple[jax.Array, jax.Array]]
# loss_type: the loss of a token, and how tokens are averaged
LOSSES: dict[str, tuple[Callable[[Ratios, Any], jax.Array], Reduction]] = {
    "dapo": (_clipped, _by_token),  # arXiv 2503.14476
    "grpo": (_clipped, _by_answer),  # 2402.03300
    "bnpo": (_clipped, _by_micro_batch),
    "dr_grpo": (_clipped, _by_longest),  # 2503.20783
    "luspo": (_clipped, _by_sum),  # 2602.05261
    "cispo": (_cispo, _by_token),
    "sapo": (_sapo, _by_answer),
    "vespo": (_vespo, _by_token),
    "rloo": (_clipped, _by_answer),  # 2402.14740
}


def grpo_loss(config: Any, d: SampledAnswers) -> Loss:
    """The loss and TRL's metrics from log-probabilities.

    A token's loss is that of its `loss_type` plus `beta rho (e^x - 1 - x)`, x = log p_ref / p; without `use_bias_correction_kl` the KL term
    has no rho, as in the paper. `importance_sampling_level`: rho of the token, or of its answer, `exp(mean log-ratio)` (GSPO, arXiv
    2507.18071); RLOO's is `exp(sum of log-ratios)`.
    """
    (name,) = config.loss_type
    loss_of, reduce = LOSSES[name]
    old_BN = jax.lax.stop_gradient(d.logp_BN) if d.old_BN is None else d.old_BN
    log_ratio = d.logp_BN - old_BN
    level = "answer" if name == "rloo" else config.importance_sampling_level
    if level != "token":
        log_rho_BS = d.total(log_ratio) / (1 if level == "answer" else jnp.maximum(d.length_BS, 1))
        rho = jnp.exp(d.spread(log_rho_BS))
    else:
        rho = jnp.exp(log_ratio)
    capped = rho if config.delta is None else jnp.minimum(rho, config.delta)
    phi = d.spread(_phi(d, log_ratio, config)) if name == "vespo" else None
    ratios = Ratios(rho, capped, d.spread(d.advantage_BS), d.logp_BN, phi)
    losses = loss_of(ratios, config)
    if config.off_policy_mask_threshold is not None:
        losses *= d.spread(_on_policy(d, log_ratio, config.off_policy_mask_threshold))
    if config.top_entropy_quantile < 1:
        losses *= _uncertain(d, 1 - config.top_entropy_quantile)
    metrics = {"entropy": metric(d.entropy_BN, d.mask_BN)}
    if d.ref_BN is not None:
        x = d.ref_BN - d.logp_BN
        kl = (jnp.exp(x) - x - 1) * (rho if config.use_bias_correction_kl else 1)
        losses += config.beta * kl
        metrics["kl"] = metric(kl, d.mask_BN)
    total, weight = reduce(d, losses, config)
    weight = jnp.maximum(weight, NOTHING)  # a step whose prompts have run out has no answers and learns nothing
    return Loss(total, weight, metrics | _clipping(config, name, level, d, ratios))


def _on_policy(d: SampledAnswers, log_ratio_BN: jax.Array, threshold: float) -> jax.Array:
    """1 for answers with a positive advantage, or whose policy is still close to the one that sampled them (DeepSeek-V3.2, arXiv
    2512.02556)."""
    gone_BS = -d.total(jax.lax.stop_gradient(log_ratio_BN)) / jnp.maximum(d.length_BS, 1)
    return ((d.advantage_BS >= 0) | (gone_BS <= threshold)).astype(jnp.float32)


def _uncertain(d: SampledAnswers, quantile: float) -> jax.Array:
    """1 for tokens whose prediction has an entropy at or above that quantile of the micro-batch's (arXiv 2506.01939)."""
    there = d.mask_BN > 0
    # "higher" takes the tokens that the quantile itself does, but for its rounding: that may lie above equal entropies on both sides of it,
    # which the first tokens of all answers to a prompt have
    least = jnp.nanquantile(jnp.where(there, d.entropy_BN, jnp.nan), quantile, method="higher")
    return (there & (d.entropy_BN >= least)).astype(jnp.float32)


def _clipping(config: Any, name: str, level: str, d: SampledAnswers, r: Ratios) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Shares of tokens (of answers, if rho is per answer) whose gradient clipping removes."""
    if name == "vespo" and r.phi is not None:
        return {"vespo/phi_seq_mean": _share(d, "answer", r.phi)}
    if name == "cispo":
        return {"cispo_clip_ratio": _share(d, level, (r.rho > config.epsilon_high) & (r.advantage > 0))}
    if name == "sapo":
        return {}
    low = (r.capped < 1 - config.epsilon) & (r.advantage < 0)
    high = (r.capped > 1 + config.epsilon_high) & (r.advantage > 0)
    metrics = {f"clip_ratio/{side}_mean": _share(d, level, x) for side, x in (("low", low), ("high", high), ("region", low | high))}
    some_BS = d.length_BS > 0
    of = lambda x: d.total(x.astype(jnp.float32)) / jnp.maximum(d.length_BS, 1)  # noqa: E731
    there = some_BS.any().astype(jnp.float32)
    least, most = jnp.where(some_BS, of(low), 1.0).min(), jnp.where(some_BS, of(high), 0.0).max()
    return metrics | {"clip_ratio/low_min": metric(least, there), "clip_ratio/high_max": metric(most, there)}


def _share(d: SampledAnswers, level: str, x_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    if level == "token":
        return metric(x_BN.astype(jnp.float32), d.mask_BN)
    return metric(d.total(x_BN.astype(jnp.float32)) / jnp.maximum(d.length_BS, 1), (d.length_BS > 0).astype(jnp.float32))

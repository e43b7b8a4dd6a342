"""KTO: learning from single answers, each labelled good or bad."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from jaxtune.data.batch import Batch
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import AnswerLogprobs, answer_logprobs, metric, reference_logps
from jaxtune.objectives.loss import Loss


def kto(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """KTO (arXiv 2402.01306 eq. 7): `w_d (1 - sigmoid(beta (a - KL)))` for a good answer, `w_u (1 - sigmoid(beta (KL - a)))` for a bad one.

    a is the answer's log-ratio to the reference. KL, a constant for the gradient, is `max(0, mean a')` over the micro-batch, where a' is
    the log-ratio of an answer combined with another prompt (data/units.py, `Mismatched`). It is averaged over all devices of a mesh, and
    each micro-batch of an accumulated step has its own, as in TRL. `apo_zero_unpaired` (2408.06266) has no KL and needs no such answers.
    """
    out = answer_logprobs(config, model_config, params, batch)
    return kto_loss(config, out, reference_logps(config, model_config, base, batch), batch.answers.values)


def kto_loss(config: Any, out: AnswerLogprobs, ref_BS: jax.Array, good_BS: jax.Array) -> Loss:
    """KTO's loss and metrics from log-probabilities; with KL, answers are numbered (own, other), (own, other), ..."""
    ratio_BS, live_BS, kl = out.logp_BS - ref_BS, (out.length_BS > 0).astype(jnp.float32), jnp.zeros(())
    logp_BS, member_BSN = out.logp_BS, out.member_BSN
    if config.loss_type == ("kto",):
        other, there = ratio_BS[:, 1::2], live_BS[:, 1::2]
        kl = jax.lax.stop_gradient(jnp.maximum((other * there).sum() / jnp.maximum(there.sum(), 1), 0.0))
        ratio_BS, live_BS, good_BS, logp_BS, member_BSN = (x[:, ::2] for x in (ratio_BS, live_BS, good_BS, logp_BS, member_BSN))
    losses = jnp.where(
        good_BS > 0,
        config.desirable_weight * (1 - sigmoid(config.beta * (ratio_BS - kl))),
        config.undesirable_weight * (1 - sigmoid(config.beta * (kl - ratio_BS))),
    )
    good, bad = live_BS * (good_BS > 0), live_BS * (good_BS == 0)
    rewards = {name: metric(config.beta * ratio_BS, where) for name, where in (("chosen", good), ("rejected", bad))}
    tokens = {name: (member_BSN & (where > 0)[..., None]).any(1) for name, where in (("chosen", good), ("rejected", bad))}
    margin = rewards["chosen"][0] / jnp.maximum(good.sum(), 1) - rewards["rejected"][0] / jnp.maximum(bad.sum(), 1)
    metrics = {f"rewards/{name}": sums for name, sums in rewards.items()}
    metrics |= {f"logits/{name}": metric(out.tokens.mean_logit_BN, where.astype(jnp.float32)) for name, where in tokens.items()}
    metrics |= {
        "rewards/margins": metric(margin, ((good.sum() > 0) & (bad.sum() > 0)).astype(jnp.float32)),
        "logps/chosen": metric(logp_BS, good),
        "logps/rejected": metric(logp_BS, bad),
        "kl": metric(kl, jnp.ones(())),
        "entropy": metric(out.tokens.entropy_BN, member_BSN.any(1).astype(jnp.float32)),
    }
    return Loss((losses * live_BS).sum(), live_BS.sum(), metrics)

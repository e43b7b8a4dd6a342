"""Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.model.moe import RouterSums, load_balancing_loss
from jaxtune.objectives.logprobs import token_logprobs
from jaxtune.objectives.loss import Loss


def sft(config, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`-sum(w log p)` over trained tokens and `sum(w)`; with `neftune_noise_alpha` and a key, noisy embeddings (arXiv 2310.05914).

    `loss_type: dft` (2508.05629): `-sum(w p log p)`, the first p a constant for the gradient.

    With experts, `router_aux_loss_coef` times the load-balancing loss is added. It is a product of means over the micro-batch, as in
    transformers, so it is the only part that depends on how a batch is split into micro-batches.
    """
    embeds_BTD = None
    if config.neftune_noise_alpha and key is not None:
        embeds_BTD = decoder.embed(model_config, params, batch.tokens)
        longest = (batch.segments > 0).sum(axis=-1).max()  # of the batch, as in transformers: the padding of the data says nothing
        bound = config.neftune_noise_alpha / jnp.sqrt(jnp.maximum(longest, 1) * embeds_BTD.shape[-1]).astype(embeds_BTD.dtype)
        embeds_BTD += jax.random.uniform(key, embeds_BTD.shape, embeds_BTD.dtype, -bound, bound)
    out = token_logprobs(model_config, params, batch, embeds_BTD)
    count = (out.weights_BN != 0).astype(jnp.float32).sum()
    metrics = {"mean_token_accuracy": (out.correct_BN.sum(), count), "entropy": (out.entropy_BN.sum(), count)}
    trust_BN = jax.lax.stop_gradient(jnp.exp(out.logp_BN)) if config.loss_type == ("dft",) else 1.0
    loss = Loss(-(out.logp_BN * trust_BN * out.weights_BN).sum(), out.weights_BN.sum(), metrics)
    return balanced(config, model_config, loss, out.aux)


def balanced(config, model_config: ModelConfig, loss: Loss, aux: RouterSums | None) -> Loss:
    """The loss plus `router_aux_loss_coef` (None: config.json's) times the loss of the routers, whose statistics are `aux`."""
    if aux is None or model_config.moe is None:
        return loss
    coef = model_config.moe.aux_loss_coef if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    of_routers = load_balancing_loss(aux) * loss.weight
    metrics = loss.metrics | {"aux_loss": (of_routers, loss.weight)}
    return Loss(loss.total + (coef or 0.0) * of_routers, loss.weight, metrics)

"""Knowledge distillation: fit the student's distribution of each trained token to the teacher's."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.objectives.answers import metric
from jaxtune.objectives.logprobs import by_chunks, chunk_logits, target_statistics, trained_states
from jaxtune.objectives.loss import Loss
from jaxtune.objectives.sft import balanced

TEACHER = "teacher"  # in `base`: the `Teacher`


class Teacher(struct.PyTreeNode):
    """The frozen teacher: its tree and its config."""

    params: dict
    config: ModelConfig = struct.field(pytree_node=False)


def distill(config: Any, model_config: ModelConfig, params: dict, base: dict, batch: Batch, key: jax.Array | None = None) -> Loss:
    """`sum(w (kd_ratio D - (1 - kd_ratio) log p))` over trained tokens and `sum(w)`, where D is `divergence` with `beta` and `temperature`.

    Logits of teacher and student exist for one chunk of trained tokens at a time. `base[TEACHER]` gets no gradient.
    """
    teacher: Teacher = jax.lax.stop_gradient(base[TEACHER])
    their_config = dataclasses.replace(teacher.config, mesh=model_config.mesh)
    theirs = trained_states(their_config, teacher.params, batch)
    own = trained_states(model_config, params, batch)
    rule = functools.partial(_statistics, config.beta, config.temperature, config.kd_ratio, their_config)
    beside, their_head = (own.targets_BN, theirs.hidden_BND), decoder.output_head(teacher.params)
    loss_BN, *measured = by_chunks(model_config, rule, decoder.output_head(params), own.hidden_BND, own.weights_BN, beside, their_head)
    live = (own.weights_BN != 0).astype(jnp.float32)
    names = ("kd_loss", "class_loss", "teacher_agreement", "mean_token_accuracy", "entropy")
    metrics = {name: metric(x, live) for name, x in zip(names, measured, strict=True)}
    return balanced(config, model_config, Loss((loss_BN * own.weights_BN).sum(), own.weights_BN.sum(), metrics), own.aux)


def divergence(beta: float, temperature: float, student_V: jax.Array, teacher_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The generalised Jensen-Shannon divergence of logits `[..., V]` and its derivative by the student's (arXiv 2306.13649 eq. 1).

    With `p = softmax(teacher / temperature)`, `q = softmax(student / temperature)` and `m = beta p + (1 - beta) q`: `beta KL(p || m) + (1 -
    beta) KL(q || m)`; for beta 0 it is `KL(p || q)`, for beta 1 `KL(q || p)`, as in TRL's `generalized_jsd_loss`.
    """
    log_q, log_p = (jax.nn.log_softmax(x / temperature) for x in (student_V, teacher_V))
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1), (q - p) / temperature
    log_m = log_p if beta == 1 else jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    of_student = (1 if beta == 1 else 1 - beta) * (log_q - log_m)
    mean = (q * of_student).sum(-1, keepdims=True)
    return mean[..., 0] + beta * (p * (log_p - log_m)).sum(-1), q * (of_student - mean) / temperature


def _statistics(beta: float, temperature: float, kd_ratio: float, their_config: ModelConfig, logits, beside, their_head):
    """The loss, divergence, negative log-likelihood, agreement, accuracy, entropy and the loss's derivative by the logits, for one chunk.

    If embeddings are padded to different widths, the tokens that both have are compared.
    """
    targets, their_hidden = beside
    theirs = chunk_logits(their_config, their_head, their_hidden)
    both = min(logits.shape[-1], theirs.shape[-1])
    own, theirs = logits[..., :both], theirs[..., :both]
    apart, dapart = divergence(beta, temperature, own, theirs)
    logp, entropy, correct, *_, dlogp = target_statistics(logits, targets)
    likeliest = (own >= own.max(-1, keepdims=True)) & (theirs >= theirs.max(-1, keepdims=True))
    loss, dlogits = kd_ratio * apart, kd_ratio * jnp.pad(dapart, ((0, 0), (0, 0), (0, logits.shape[-1] - both)))
    if kd_ratio < 1:
        loss, dlogits = loss - (1 - kd_ratio) * logp, dlogits - (1 - kd_ratio) * dlogp
    return loss, apart, -logp, likeliest.any(-1).astype(jnp.float32), correct, entropy, dlogits

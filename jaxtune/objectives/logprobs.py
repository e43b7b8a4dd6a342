"""Log-probabilities of the trained tokens, the one primitive of every objective. Never a full `[B, T, V]`.

Logits exist for one chunk of trained tokens at a time. Instead of logits, the forward pass keeps the derivative of each token's
log-probability by its hidden state (`[B, N, D]`), so the backward pass of a frozen head is one multiplication.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain
from jaxtune.model.moe import RouterSums


class TokenLogprobs(NamedTuple):
    """For each row's trained tokens, padded to N: log-probability, weight (0: padding), entropy of the prediction (nats), whether the token
    was the most likely one, and its position in the row; `collision_BN` is `log sum_v p(v)^2`, the log-probability that two draws from the
    prediction agree; `mean_logit_BN` is the logits' mean over the vocabulary. Only `logp_BN` carries a gradient."""

    logp_BN: jax.Array
    weights_BN: jax.Array
    entropy_BN: jax.Array
    correct_BN: jax.Array
    index_BN: jax.Array
    collision_BN: jax.Array
    mean_logit_BN: jax.Array
    aux: RouterSums | None = None  # where the routers sent the tokens (None without experts)


class TrainedStates(NamedTuple):
    """For each row's trained tokens, padded to N: the hidden state that predicts it, the token, its weight (0: padding), its position."""

    hidden_BND: jax.Array
    targets_BN: jax.Array
    weights_BN: jax.Array
    index_BN: jax.Array
    aux: RouterSums | None = None


def trained_states(config: ModelConfig, params: dict, batch: Batch, embeds_BTD: jax.Array | None = None) -> TrainedStates:
    """Every token with non-zero weight, as the decoder predicts it; N is `batch.capacity` (or T)."""
    hidden_BTD, _, aux = decoder.hidden(
        config, params, batch.tokens, batch.positions, batch.segments, embeds_BTD=embeds_BTD, parents_BT=batch.parents
    )
    N = batch.capacity or batch.tokens.shape[1]
    trained_BT = batch.weights != 0
    index_BN = jnp.argsort(~trained_BT, axis=1, stable=True)[:, :N]  # trained tokens first, in order
    targets_BN, weights_BN = (jnp.take_along_axis(x, index_BN, axis=1) for x in (batch.tokens, batch.weights))
    # the state that predicts a token is that of the token before it
    before_BN = jnp.maximum(index_BN - 1, 0) if batch.before is None else jnp.take_along_axis(batch.before, index_BN, axis=1)
    hidden_BND = jnp.take_along_axis(hidden_BTD, before_BN[..., None], axis=1)
    return TrainedStates(hidden_BND, targets_BN, weights_BN, index_BN, aux)


def token_logprobs(config: ModelConfig, params: dict, batch: Batch, embeds_BTD: jax.Array | None = None) -> TokenLogprobs:
    """`log p(token | earlier tokens)` of every token with non-zero weight, float32 `[B, N]`; N is `batch.capacity` (or T)."""
    return logprobs_of(config, params, trained_states(config, params, batch, embeds_BTD))


def logprobs_of(config: ModelConfig, params: dict, out: TrainedStates) -> TokenLogprobs:
    """The same from existing states."""
    logp, *of_prediction = by_chunks(config, target_statistics, decoder.output_head(params), out.hidden_BND, out.targets_BN)
    live = (out.weights_BN != 0).astype(jnp.float32)
    entropy, correct, collision, mean_logit = (x * live for x in of_prediction)
    return TokenLogprobs(logp * live, out.weights_BN, entropy, correct, out.index_BN, collision, mean_logit, out.aux)


def target_statistics(logits, targets, fixed=None):
    """logp, entropy, correct, collision, mean logit, and the derivative of logp by the logits, for one chunk."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - top
    unscaled = jnp.exp(shifted)
    total = unscaled.sum(-1, keepdims=True)
    logz = jnp.log(total)
    target = jnp.take_along_axis(shifted, targets[..., None], axis=-1)
    entropy = (logz - (unscaled * shifted).sum(-1, keepdims=True) / total)[..., 0]
    correct = (target >= 0).astype(jnp.float32)[..., 0]  # argmax would be another, slow pass
    collision = jnp.log(jnp.square(unscaled).sum(-1) / jnp.square(total[..., 0]))
    mean = (shifted.mean(-1, keepdims=True) + top)[..., 0]
    dlogits = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype) - unscaled / total
    return (target - logz)[..., 0], entropy, correct, collision, mean, dlogits


# ---- chunk by chunk ----


def by_chunks(config: ModelConfig, statistics: Callable, head: dict, hidden_BND: jax.Array, beside: Any, fixed: Any = None):
    """Numbers of the predictions `[B, N]`, `config.logits_chunk` tokens at a time.

    `statistics(logits, beside, fixed) -> (first, *others, dlogits)` for one chunk: only `first` carries a gradient, to the hidden states
    and the head, and `dlogits` is its derivative by the logits. `beside`: arrays `[B, N, ...]` split like the states; `fixed`: whole.
    """
    B, N = hidden_BND.shape[:2]
    size = min(N, max(1, config.logits_chunk // B))  # chunks run along N, so that rows may be on different devices
    pad = -N % size

    def cut(x_BN: jax.Array) -> jax.Array:
        rest = x_BN.shape[2:]
        return jnp.pad(x_BN, ((0, 0), (0, pad), *((0, 0) for _ in rest))).reshape(B, -1, size, *rest).swapaxes(0, 1)

    out: tuple[jax.Array, ...] = _chunked(config, statistics, head, cut(hidden_BND), jax.tree.map(cut, beside), fixed)  # type: ignore
    return tuple(x.swapaxes(0, 1).reshape(B, N + pad)[:, :N] for x in out)


def chunk_logits(config: ModelConfig, head: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits of one chunk of states."""
    hidden = constrain(config.mesh, hidden, "rows", None, None)
    return decoder.logits(config, head, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(config, statistics, head, hidden, beside, fixed):
    def chunk(args):
        h, y = args
        return statistics(chunk_logits(config, head, h), y, fixed)[:-1]

    return jax.lax.map(chunk, (hidden, beside))


def _chunked_fwd(config, statistics, head, hidden, beside, fixed):
    head_perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(head))
    head, hidden, beside, fixed = jax.tree.map(lambda primal: primal.value, (head, hidden, beside, fixed))

    def chunk(args):
        h, y = args
        logits, pull = jax.vjp(lambda h: chunk_logits(config, head, h), h)
        *out, dlogits = statistics(logits, y, fixed)
        return tuple(out), pull(dlogits)[0]

    out, dhidden = jax.lax.map(chunk, (hidden, beside))
    return out, (dhidden, (head, hidden, beside, fixed) if head_perturbed else None)


def _chunked_bwd(config, statistics, residuals, cotangents):
    dhidden, recompute = residuals
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    dhead = None
    if recompute is not None:
        head, hidden, beside, fixed = recompute
        leaves, tree = jax.tree.flatten(head)
        moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]  # not the key of an adapter's dropout

        def of(floats):
            floats = iter(floats)
            return tree.unflatten([next(floats) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)])

        def chunk(total, args):
            h, y, g = args
            logits, pull = jax.vjp(lambda floats: chunk_logits(config, of(floats), h), floats)
            (dfloats,) = pull(statistics(logits, y, fixed)[-1] * g[..., None])
            return jax.tree.map(jnp.add, total, dfloats), None

        floats = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        dfloats, _ = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, floats), (hidden, beside, g))
        dfloats = iter(dfloats)
        dhead = tree.unflatten([next(dfloats) if moves else None for moves in moving])
    return dhead, (dhidden * g[..., None]).astype(dhidden.dtype), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)

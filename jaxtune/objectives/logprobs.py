"""Log-probabilities of the trained tokens, the one primitive under every objective. Never a full `[B, T, V]`.

Logits exist for one chunk of trained tokens at a time. The forward pass keeps, instead of logits, the derivative of each token's
log-probability to its hidden state (`[B, N, D]`), so that the backward pass of a frozen head is one multiplication.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.model import decoder
from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain
from jaxtune.model.moe import RouterSums


class TokenLogprobs(NamedTuple):
    """Of each row's trained tokens, padded to N: log-probability, weight (0: padding), entropy of the prediction (nats), whether
    the token was the likeliest, and where it stands in the row; `collision_BN` is `log sum_v p(v)^2`, the log-probability that
    two draws from the prediction agree; `mean_logit_BN` the logits' mean over the vocabulary. Only `logp_BN` carries a gradient."""

    logp_BN: jax.Array
    weights_BN: jax.Array
    entropy_BN: jax.Array
    correct_BN: jax.Array
    index_BN: jax.Array
    collision_BN: jax.Array
    mean_logit_BN: jax.Array
    aux: RouterSums | None = None  # where the routers sent the tokens (None without experts)


def token_logprobs(config: ModelConfig, params: dict, batch: Batch, embeds_BTD: jax.Array | None = None) -> TokenLogprobs:
    """`log p(token | earlier tokens)` of every token whose weight is not 0, float32 `[B, N]`; N is `batch.capacity` (or T)."""
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
    logp, *of_prediction = head_logprobs(config, decoder.output_head(params), hidden_BND, targets_BN)
    live = (weights_BN != 0).astype(jnp.float32)
    entropy, correct, collision, mean_logit = (x * live for x in of_prediction)
    return TokenLogprobs(logp * live, weights_BN, entropy, correct, index_BN, collision, mean_logit, aux)


def head_logprobs(config: ModelConfig, head: dict, hidden_BND: jax.Array, targets_BN: jax.Array):
    """`(logp, entropy, correct, collision, mean logit)`, float32 `[B, N]`, of targets, `config.logits_chunk` tokens at a time."""
    B, N, D = hidden_BND.shape
    size = min(N, max(1, config.logits_chunk // B))  # chunks run along N, so that rows may lie on different devices
    pad = -N % size
    hidden = jnp.pad(hidden_BND, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, size, D).swapaxes(0, 1)
    targets = jnp.pad(targets_BN, ((0, 0), (0, pad))).reshape(B, -1, size).swapaxes(0, 1)
    out: tuple[jax.Array, ...] = _chunked(config, head, hidden, targets)  # type: ignore[assignment]
    return tuple(x.swapaxes(0, 1).reshape(B, N + pad)[:, :N] for x in out)


def _logits(config, head, hidden):
    hidden = constrain(config.mesh, hidden, "rows", None, None)
    return decoder.logits(config, head, hidden)


def _statistics(config, head, hidden, targets):
    """logp, entropy, correct, collision, mean logit, and the logits' derivative of logp, of one chunk."""
    logits = _logits(config, head, hidden)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - top
    unscaled = jnp.exp(shifted)
    total = unscaled.sum(-1, keepdims=True)
    logz = jnp.log(total)
    target = jnp.take_along_axis(shifted, targets[..., None], axis=-1)
    entropy = (logz - (unscaled * shifted).sum(-1, keepdims=True) / total)[..., 0]
    correct = (target >= 0).astype(jnp.float32)[..., 0]  # argmax would be one more, slow pass
    collision = jnp.log(jnp.square(unscaled).sum(-1) / jnp.square(total[..., 0]))
    mean = (shifted.mean(-1, keepdims=True) + top)[..., 0]
    dlogits = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype) - unscaled / total
    return (target - logz)[..., 0], entropy, correct, collision, mean, dlogits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(config, head, hidden, targets):
    return jax.lax.map(lambda chunk: _statistics(config, head, *chunk)[:-1], (hidden, targets))


def _chunked_fwd(config, head, hidden, targets):
    head_perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(head))
    head, hidden, targets = jax.tree.map(lambda primal: primal.value, (head, hidden, targets))

    def chunk(args):
        h, y = args
        *out, dlogits = _statistics(config, head, h, y)
        _, pull = jax.vjp(lambda h: _logits(config, head, h), h)
        return tuple(out), pull(dlogits)[0]

    out, dhidden = jax.lax.map(chunk, (hidden, targets))
    return out, (dhidden, (head, hidden, targets) if head_perturbed else None)


def _chunked_bwd(config, residuals, cotangents):
    dhidden, recompute = residuals
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    dhead = None
    if recompute is not None:
        head, hidden, targets = recompute
        leaves, tree = jax.tree.flatten(head)
        moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]  # not the key of an adapter's dropout

        def of(floats):
            floats = iter(floats)
            return tree.unflatten([next(floats) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)])

        def chunk(total, args):
            h, y, g = args
            _, pull = jax.vjp(lambda floats: _logits(config, of(floats), h), floats)
            (dfloats,) = pull(_statistics(config, head, h, y)[-1] * g[..., None])
            return jax.tree.map(jnp.add, total, dfloats), None

        floats = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        dfloats, _ = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, floats), (hidden, targets, g))
        dfloats = iter(dfloats)
        dhead = tree.unflatten([next(dfloats) if moves else None for moves in moving])
    return dhead, (dhidden * g[..., None]).astype(dhidden.dtype), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)

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
from jaxtune.model.layout import constrain, parts
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
    logp, *of_prediction = by_chunks(config, target_statistics, decoder.output_head(params), out.hidden_BND, out.weights_BN, out.targets_BN)
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


def by_chunks(
    config: ModelConfig, statistics: Callable, head: dict, hidden_BND: jax.Array, live_BN: jax.Array, beside: Any, fixed: Any = None
) -> tuple[jax.Array, ...]:
    """Numbers of the predictions that are live (not 0), `[B, N]`, for `config.logits_chunk` of them at a time; the others mean nothing.

    `statistics(logits, beside, fixed) -> (first, *others, dlogits)` for one chunk: only `first` carries a gradient, to the hidden states
    and the head, and `dlogits` is its derivative by the logits. `beside`: arrays `[B, N, ...]` split like the states; `fixed`: whole.

    A chunk is filled with live predictions of all rows (on a mesh, with equally many of each device's rows), so the products are as many as
    these need, whatever N is. The cotangent of `first` has to be 0 where nothing is live.
    """
    B, N = live_BN.shape
    G = parts(config.mesh, B, "rows")
    hidden_GMD, live_GM, beside_GM = jax.tree.map(lambda x: x.reshape(G, B // G * N, *x.shape[2:]), (hidden_BND, live_BN != 0, beside))
    size = 2 * max(1, min(-(-live_GM.shape[1] // 2), config.logits_chunk // G // 2))
    chunks = _chunks(live_GM, size)
    out: tuple[jax.Array, ...] = _chunked(config, statistics, size, head, hidden_GMD, beside_GM, chunks, fixed)  # type: ignore
    return tuple(x.reshape(B, N) for x in out)


class _Chunks(NamedTuple):
    """The order in which predictions are taken (M: none), each one's place in it, and the number of chunks with live ones."""

    order_GP: jax.Array
    place_GM: jax.Array
    number: jax.Array

    def take(self, x_GM: Any, start: jax.Array | int, size: int) -> Any:
        """`size` of each array, in order, as two rows: `[2 G, size / 2, ...]`.

        One row of logits, `[1, size, V]`, takes a CPU twice the time, because XLA computes the product within the softmax's fusion.
        """
        index_GS = jax.lax.dynamic_slice_in_dim(self.order_GP, start, size, axis=1)
        return jax.tree.map(lambda x: _along(x, index_GS).reshape(-1, size // 2, *x.shape[2:]), x_GM)

    def back(self, x_GP: jax.Array) -> jax.Array:
        """`[G, M, ...]` of what was computed in order."""
        return _along(x_GP, self.place_GM)


def _chunks(live_GM: jax.Array, size: int) -> _Chunks:
    """Live predictions first, in chunks of `size`."""
    M = live_GM.shape[1]
    order_GM = jnp.argsort(~live_GM, axis=1, stable=True)
    order_GP = jnp.pad(order_GM, ((0, 0), (0, -M % size)), constant_values=M)
    return _Chunks(order_GP, jnp.argsort(order_GM, axis=1), -(-live_GM.sum(1).max() // size))


def _along(x_GM: jax.Array, index_GS: jax.Array) -> jax.Array:
    """Elements of each group; 0 where the index is past the end."""
    index_GS = index_GS.reshape(*index_GS.shape, *(1,) * (x_GM.ndim - 2))
    return jnp.take_along_axis(x_GM, index_GS, axis=1, mode="fill", fill_value=0)


def _each_chunk(chunks: _Chunks, size: int, function: Callable, inputs_GM: Any) -> Any:
    """`function` of each chunk, in order, `[G, P, ...]`; 0 where no chunk is computed."""
    shapes = jax.eval_shape(function, chunks.take(inputs_GM, 0, size))
    G, P = chunks.order_GP.shape
    empty = jax.tree.map(lambda x: jnp.zeros((G, P, *x.shape[2:]), x.dtype), shapes)

    def one(i, filled):
        out = function(chunks.take(inputs_GM, i * size, size))
        out = jax.tree.map(lambda x: x.reshape(G, size, *x.shape[2:]), out)
        return jax.tree.map(lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, i * size, axis=1), filled, out)

    return jax.lax.fori_loop(0, chunks.number, one, empty)


def chunk_logits(config: ModelConfig, head: dict, hidden: jax.Array) -> jax.Array:
    """float32 logits of one chunk of states."""
    hidden = constrain(config.mesh, hidden, "rows", None, None)
    return decoder.logits(config, head, hidden)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(config, statistics, size, head, hidden, beside, chunks, fixed):
    def chunk(args):
        h, y = args
        return statistics(chunk_logits(config, head, h), y, fixed)[:-1]

    return jax.tree.map(chunks.back, _each_chunk(chunks, size, chunk, (hidden, beside)))


def _chunked_fwd(config, statistics, size, head, hidden, beside, chunks, fixed):
    head_perturbed = any(leaf.perturbed for leaf in jax.tree.leaves(head))
    head, hidden, beside, chunks, fixed = jax.tree.map(lambda primal: primal.value, (head, hidden, beside, chunks, fixed))

    def chunk(args):
        h, y = args
        logits, pull = jax.vjp(lambda h: chunk_logits(config, head, h), h)
        *out, dlogits = statistics(logits, y, fixed)
        return tuple(out), pull(dlogits)[0]

    out, dhidden = _each_chunk(chunks, size, chunk, (hidden, beside))
    return jax.tree.map(chunks.back, out), (dhidden, chunks, (head, hidden, beside, fixed) if head_perturbed else None)


def _chunked_bwd(config, statistics, size, residuals, cotangents):
    dhidden, chunks, recompute = residuals
    g = cotangents[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    dhead = None
    if recompute is not None:
        head, hidden, beside, fixed = recompute
        leaves, tree = jax.tree.flatten(head)
        moving = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]  # not the key of an adapter's dropout

        def of(floats):
            floats = iter(floats)
            return tree.unflatten([next(floats) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True)])

        def add_chunk(i, total):
            h, y, g_GS = chunks.take((hidden, beside, g), i * size, size)
            logits, pull = jax.vjp(lambda floats: chunk_logits(config, of(floats), h), floats)
            (dfloats,) = pull(statistics(logits, y, fixed)[-1] * g_GS[..., None])
            return jax.tree.map(jnp.add, total, dfloats)

        floats = [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        dfloats = iter(jax.lax.fori_loop(0, chunks.number, add_chunk, jax.tree.map(jnp.zeros_like, floats)))
        dhead = tree.unflatten([next(dfloats) if moves else None for moves in moving])
    return dhead, (chunks.back(dhidden) * g[..., None]).astype(dhidden.dtype), None, None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd, symbolic_zeros=True)

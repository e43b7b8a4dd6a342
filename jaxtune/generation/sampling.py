"""From logits to a token: the filters of transformers' `generate`, in its order and with its meaning, as pure functions.

Repetition penalty, then temperature, top-k, top-p, min-p, then one draw. Filters map float32 logits `[B, V]` to logits, with -inf for what
they remove. None of them sorts: the tokens to keep are found by bisection over the logits' bits, which is exact and costs a tenth of
sorting the vocabulary on a CPU.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import ConfigError


class Sampling(struct.PyTreeNode):
    """How a token is chosen. `None` leaves a filter out of the compiled program; a number can change without compiling again.

    temperature         None: the most likely token (greedy); the other filters cannot change the choice then, and are left out
    top_k               keep the k most likely tokens
    top_p               keep the most likely tokens that together reach this probability
    min_p               keep the tokens at least this fraction as likely as the most likely one
    repetition_penalty  divide the logit (multiply, if negative) of every token that already occurs in the prompt or the answer

    In a batch each is a column `[B, 1]` (`of_rows`), and a temperature of 0 is greedy.
    """

    temperature: float | jax.Array | np.ndarray | None = None
    top_k: float | jax.Array | np.ndarray | None = None
    top_p: float | jax.Array | np.ndarray | None = None
    min_p: float | jax.Array | np.ndarray | None = None
    repetition_penalty: float | jax.Array | np.ndarray | None = None

    @classmethod
    def create(cls, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> "Sampling":
        """From the numbers users write, where 0, 0, 1, 0 and 1 mean "off"; ConfigError for a number outside its range."""
        _check("temperature", temperature, temperature >= 0, "0 (greedy) or more, for example 0.7")
        _check("top_k", top_k, top_k >= 0 and top_k == int(top_k), "0 (off) or a whole number of tokens, for example 50")
        _check("top_p", top_p, 0 < top_p <= 1, "above 0 and up to 1 (off), for example 0.9")
        _check("min_p", min_p, 0 <= min_p <= 1, "from 0 (off) to 1, for example 0.05")
        _check("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0, where 1 is off, for example 1.1")
        penalty = None if repetition_penalty == 1 else float(repetition_penalty)
        if temperature == 0:
            return cls(repetition_penalty=penalty)
        return cls(float(temperature), int(top_k) or None, None if top_p == 1 else float(top_p), float(min_p) or None, penalty)

    @classmethod
    def of_rows(cls, each: Sequence["Sampling"]) -> "Sampling":
        """The settings of a batch whose rows have one each: columns, float32 `[B, 1]`. What no row uses stays out of the program."""

        def column(name: str, off: float) -> np.ndarray | None:
            values = [getattr(one, name) for one in each]
            if all(value is None for value in values):
                return None
            return np.asarray([[off if value is None else value] for value in values], np.float32)

        return cls(**{name: column(name, off) for name, off in _OFF.items()})


# Neutral values: a sum of probabilities may round to 1 before the last token, so 1 would not be neutral for top_p.
_OFF = {"temperature": 0.0, "top_k": np.inf, "top_p": np.inf, "min_p": 0.0, "repetition_penalty": 1.0}


def _check(name: str, value, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {wanted}")


def filtered(sampling: Sampling, logits_BV: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """Logits of the distribution to sample from. `seen_BV` (bool: tokens so far) is needed for the repetition penalty only."""
    if sampling.repetition_penalty is not None:
        assert seen_BV is not None
        logits_BV = repetition_penalty(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature is not None:
        logits_BV = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1)
    if sampling.top_k is not None:
        logits_BV = top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BV = top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BV = min_p(logits_BV, sampling.min_p)
    return logits_BV


def choose(sampling: Sampling, logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """One token per row, int32 `[B]`: the most likely one, or a draw with the row's own key (so no row depends on another)."""
    logits_BV = filtered(sampling, logits_BV, seen_BV)
    if sampling.temperature is not None:
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        logits_BV = logits_BV + jnp.where(sampling.temperature > 0, noise_BV, 0)
    # Not argmax, which XLA does not vectorise on CPUs; the first of equals wins in both.
    return jax.lax.top_k(logits_BV, 1)[1][:, 0]


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty) -> jax.Array:
    """`l / penalty` for positive and `l * penalty` for negative logits of the tokens in `seen_BV` (CTRL, arXiv 1909.05858)."""
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def top_k(logits_BV: jax.Array, k) -> jax.Array:
    """Keep the `k` largest logits, and ties of the smallest of them."""
    return _keep_heaviest(logits_BV, jnp.ones_like(logits_BV), k)


def top_p(logits_BV: jax.Array, p) -> jax.Array:
    """Nucleus sampling (arXiv 1904.09751): keep a token if the more likely ones together have a probability below `p`. Ties stay together.
    """
    return _keep_heaviest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def min_p(logits_BV: jax.Array, p) -> jax.Array:
    """Keep a token if its probability is at least `p` times the largest one (arXiv 2407.01082)."""
    probs_BV = jax.nn.softmax(logits_BV, axis=-1)
    return jnp.where(probs_BV < p * probs_BV.max(-1, keepdims=True), -jnp.inf, logits_BV)


def _keep_heaviest(logits_BV: jax.Array, weights_BV: jax.Array, limit) -> jax.Array:
    """Keep a token if all larger logits together weigh less than `limit`; the largest is always kept.

    The weight of the larger logits decreases as a logit grows, so there is a smallest logit to keep, found bit by bit.
    """
    bits = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the same order as the floats

    def halve(_, bounds):
        low, high = bounds  # at `high` the weight above is below the limit; at `low` it is not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = jnp.where(rank > middle, weights_BV, 0).sum(-1, keepdims=True) < limit
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full((logits_BV.shape[0], 1), jnp.iinfo(jnp.int32).min, jnp.int32)
    _, smallest = jax.lax.fori_loop(0, 32, halve, (low, rank.max(-1, keepdims=True)))
    return jnp.where(rank >= smallest, logits_BV, -jnp.inf)

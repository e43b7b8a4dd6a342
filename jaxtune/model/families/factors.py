"""Factors of a layer's parts, as given in config.json."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Growth(NamedTuple):
    """A query at position p is multiplied by `1 + rate ln(1 + floor((p + ahead) / length))`, an attention temperature (arXiv 2501.19399).
    """

    rate: float = 0.0
    length: int = 1
    ahead: int = 0
    still: bool = False  # only in layers without rotation


class Alibi(NamedTuple):
    """Attention with linear biases (arXiv 2108.12409): head i adds `scale slopes[i] p` to the scores of the key at position p. `rounded`:
    all but the scale in bfloat16, as in Falcon."""

    slopes: tuple[float, ...]
    scale: float = 1.0
    rounded: bool = False

    def bias(self, positions_BS: jax.Array) -> jax.Array:
        """float32 `[B, S, H]`."""

        def kept(x):  # a conversion to bfloat16 and back would be optimised away
            return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if self.rounded else x

        return kept(kept(positions_BS[..., None].astype(jnp.float32)) * kept(jnp.asarray(self.slopes, jnp.float32))) * self.scale


class Multipliers(NamedTuple):
    """Factors of the inputs and outputs of a layer's parts (Falcon H1; arXiv 2203.03466)."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    mamba_in: float = 1.0
    mamba: tuple[float, ...] = (1.0,) * 5  # of gate, input, writing, reading, time step
    mamba_out: float = 1.0
    gate: float = 1.0
    down: float = 1.0


class Streams(NamedTuple):
    """Residual streams side by side (model/streams.py): how many, which of them a layer's parts see, and whether that one is scaled for the
    layer's own input."""

    count: int
    active: int
    scaled: bool

"""What a layer is given beside its input: where it works, and what layers keep of the tokens before."""

from typing import NamedTuple

import jax

from jaxtune.model.attention import Keys


class Place(NamedTuple):
    """Where a layer works: its rotation, its window, the tokens' places, its slice of the memory; whether it turns queries and keys."""

    cos: jax.Array
    sin: jax.Array
    window: jax.Array
    queries: Keys
    keys: Keys
    number: jax.Array
    group: int = 0  # of `ModelConfig.memories`
    turns: jax.Array | bool = True


class Memory(NamedTuple):
    """What is kept of the tokens so far: by attention layers their keys and values, `[L, B, S, K, h]` for each of
    `ModelConfig.memories`; by those of `ModelConfig.recurrent` what the convolution looks back at, `[L, B, W - 1, C]`, and perhaps a state,
    float32 `[L, B, H, k, v]`. None where there is none."""

    k: tuple[jax.Array, ...] = ()
    v: tuple[jax.Array, ...] = ()
    state: jax.Array | None = None
    tail: jax.Array | None = None

"""A layer's settings besides its input, and what layers keep of the previous tokens."""

from typing import NamedTuple

import jax

from jaxtune.model.attention_mask import Keys


class Place(NamedTuple):
    """A layer's settings: its rotation, its window, the tokens' places, its slice of the memory; whether it rotates queries and keys."""

    cos: jax.Array
    sin: jax.Array
    window: jax.Array
    queries: Keys
    keys: Keys
    number: jax.Array
    group: int = 0  # of `ModelConfig.memories`
    turns: jax.Array | bool = True


class Memory(NamedTuple):
    """What is kept of the tokens so far: for attention layers their keys and values, `[L, B, K, S, h]` for each of `ModelConfig.memories`;
    for those of `ModelConfig.recurrent` the last tokens of the convolution, `[L, B, W - 1, C]`, and possibly a state, float32 `[L, B, H, k,
    v]`. None for nothing."""

    k: tuple[jax.Array, ...] = ()
    v: tuple[jax.Array, ...] = ()
    state: jax.Array | None = None
    tail: jax.Array | None = None

"""Rows of a table by token, as from transformers' embedding layer."""

import jax
import jax.numpy as jnp

from jaxtune.model.families import ModelConfig
from jaxtune.model.layout import constrain
from jaxtune.model.weight import Matrix, rows


def lookup(config: ModelConfig, table: Matrix, tokens_BT: jax.Array, scale: float) -> jax.Array:
    """`scale` times the tokens' rows, `[B, T, width]` in the compute dtype; padding gets no gradient."""
    x = rows(table, tokens_BT, config.dtype)
    if config.padding_idx is not None:
        x = jnp.where((tokens_BT == config.padding_idx)[..., None], jax.lax.stop_gradient(x), x)
    x = constrain(config.mesh, x, "groups", "tokens", "width")  # rows are then gathered by an exchange
    return x if scale == 1.0 else x * jnp.asarray(scale, config.dtype)  # rounded first, as in Gemma

"""What layers get besides the residual stream: their own inputs, and keys and values of an earlier layer (Gemma 3n and 4).

Both are leaves of a layer's tree beside its weights, `[layers of the stack, ...]`, so that stacks, their backward passes and gradients need
no special case. A layer whose keys and values others use is a separate stack: they are computed from its input before it runs, and given to
it too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.model.embedding import lookup
from jaxtune.model.families import ModelConfig
from jaxtune.model.layer import Shared, cut, made_before
from jaxtune.model.layers import NORMS
from jaxtune.model.layout import constrain
from jaxtune.model.weight import linear


class Given:
    """What the layers of one forward pass are given."""

    def __init__(self, config: ModelConfig, params: dict, tokens_BT: jax.Array, x_BTD: jax.Array):
        self.config, self.kv = config, {}
        self.inputs_LBTP = inputs(config, params, tokens_BT, x_BTD) if config.layer_inputs[1] else None

    def to(self, stack: int, weights: dict, x_BTD: jax.Array, shared: Shared) -> dict:
        """A stack's weights together with what its layers are given; `x_BTD` is the input of the first stack of its pattern."""
        layers, given = self.config.stacks[stack], {}
        if self.inputs_LBTP is not None:
            given["layer_input"] = self.inputs_LBTP[np.asarray(layers)]
        source = self.config.kv_source(layers[0])
        if source not in self.config.kv_sources:
            return weights | given
        if source == layers[0]:
            self.kv[source] = made_before(self.config, stack, weights, x_BTD, shared)
        for name, x in zip(("given_k", "given_v"), self.kv[source], strict=True):
            given[name] = jnp.broadcast_to(constrain(self.config.mesh, x, "rows", None, "heads", None), (len(layers), *x.shape))
        return weights | given


def inputs(config: ModelConfig, params: dict, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """`(norm(projection x / sqrt(D)) + sqrt(P) embedding) / sqrt(2)`, `[L, B, T, P]`: P numbers per token and layer."""
    w, (L, P) = params["layer_inputs"], (config.num_layers, config.layer_inputs[1])
    own = constrain(config.mesh, lookup(config, w["embed"], tokens_BT, P**0.5), "rows", "tokens", None)
    projection = jax.tree.map(lambda leaf: cut(leaf, jnp.zeros((), jnp.int32)), w["projection"])
    made = (linear(projection, x_BTD) * jnp.asarray(config.hidden_size**-0.5, config.dtype)).reshape(*tokens_BT.shape, L, P)
    made = NORMS[config.norm](made, w["norm"], None, config.norm_eps)
    both = (made + own.reshape(made.shape)) * jnp.asarray(2**-0.5, config.dtype)
    return constrain(config.mesh, jnp.moveaxis(both, 2, 0), None, "rows", "tokens", None)

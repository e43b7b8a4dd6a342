"""What layers read besides the residual stream: per-layer inputs, cutoffs, and keys and values of an earlier layer (Gemma 3n and 4).

They are leaves of a layer's tree beside its weights, `[layers of the stack, ...]`, so that stacks, their backward passes and gradients need
no special case. A layer whose keys and values others use is a separate stack: they are computed from its input before it runs, and it
reads them too.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.model.embedding import lookup
from jaxtune.model.families import ModelConfig
from jaxtune.model.layer import Shared, made_before
from jaxtune.model.layers import NORMS
from jaxtune.model.layout import constrain
from jaxtune.model.weight import alone, linear


class LayerInputs:
    """The extra inputs of the layers of one forward pass."""

    def __init__(self, config: ModelConfig, params: dict, tokens_BT: jax.Array, x_BTD: jax.Array):
        self.config, self.kv = config, {}
        self.inputs_LBTP = per_layer_inputs(config, params, tokens_BT, x_BTD) if config.layer_inputs[1] else None

    def added_to(self, weights: dict, stack: int, x_BTD: jax.Array, shared: Shared) -> dict:
        """A stack's weights together with the extra inputs of its layers; `x_BTD` is the input of the first stack of its pattern."""
        layers, extra = self.config.stacks[stack], {}
        if self.inputs_LBTP is not None:
            extra["layer_input"] = self.inputs_LBTP[np.asarray(layers)]
        if self.config.cutoff(layers[0]) is not None:
            extra["gate_cutoff"] = jnp.asarray([self.config.cutoff(layer) for layer in layers], jnp.float32)
        source = self.config.kv_source(layers[0])
        if source not in self.config.kv_sources:
            return weights | extra
        if source == layers[0]:
            self.kv[source] = made_before(self.config, stack, weights, x_BTD, shared)
        for name, x in zip(("shared_k", "shared_v"), self.kv[source], strict=True):
            extra[name] = jnp.broadcast_to(constrain(self.config.mesh, x, "rows", None, "heads", None), (len(layers), *x.shape))
        return weights | extra


def per_layer_inputs(config: ModelConfig, params: dict, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """`(norm(projection x / sqrt(D)) + sqrt(P) embedding) / sqrt(2)`, `[L, B, T, P]`: P numbers per token and layer."""
    w, (L, P) = params["layer_inputs"], (config.num_layers, config.layer_inputs[1])
    known = jnp.where(tokens_BT < config.layer_inputs[0], tokens_BT, 0)  # the vocabulary of these may be smaller
    own = constrain(config.mesh, lookup(config, w["embed"], known, P**0.5), "rows", "tokens", None)
    projected = linear(alone(w["projection"]), x_BTD) * jnp.asarray(config.hidden_size**-0.5, config.dtype)
    projected = projected.reshape(*tokens_BT.shape, L, P)
    projected = NORMS[config.norm](projected, w["norm"], None, config.norm_eps)
    both = (projected + own.reshape(projected.shape)) * jnp.asarray(2**-0.5, config.dtype)
    return constrain(config.mesh, jnp.moveaxis(both, 2, 0), None, "rows", "tokens", None)

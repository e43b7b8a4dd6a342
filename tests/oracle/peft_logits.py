"""Logits of one folder by transformers and by jaxtune, for the tests of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxtune import peft
from jaxtune.convert.load import load
from jaxtune.model.decoder import forward

TOKENS = np.asarray([[5, 9, 33, 2, 71, 8, 40], [1, 3, 3, 60, 4, 9, 12]], np.int64)
jitted = jax.jit(forward, static_argnums=0)


def theirs(folder):
    """The folder's model in torch, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def ours(folder, adapter_of):
    """Logits of TOKENS by the folder's model with `adapter_of(model)`."""
    model = load(folder)
    params = peft.compose(model.params, adapter_of(model))
    return np.asarray(jitted(model.config, params, jnp.asarray(TOKENS, jnp.int32)))

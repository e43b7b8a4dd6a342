"""What a step needs by cause, from shapes: bytes of one device, floating-point operations."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import Config
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec
from jaxtune.reference import WITH_REFERENCE, beforehand
from jaxtune.tree import flatten


def per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def by_cause(config: Config, model_config: ModelConfig, state, base, batch, peak: int) -> dict[str, int]:
    """Bytes of one device by cause; see `Plan.bytes`."""
    leaves = flatten(base)
    scales = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    packed = sum(per_device(leaf.codes) for leaf in scales.values())
    _, rows, length = batch.tokens.sharding.shard_shape(batch.tokens.shape)
    itemsize = jnp.dtype(model_config.dtype).itemsize
    layers = 1 if model_config.remat == "offload" else model_config.num_layers  # the other inputs are in the host's memory
    residual = layers * rows * length * model_config.hidden_size * itemsize
    causes = {
        "weights": per_device(base) - sum(per_device(leaf) for leaf in scales.values()) + packed,
        "scales": sum(per_device(leaf) for leaf in scales.values()) - packed,
        "trainable": per_device(state.trainable),
        "optimizer": per_device(state.opt_state),
        "batch": per_device(batch),
    }
    left = peak - sum(causes.values())
    estimates = {
        "gradients": sum(x.size * 4 for x in jax.tree.leaves(state.trainable)) if config.method != "full" else per_device(state.trainable),
        "activations": residual,
        "logits": 0 if model_config.num_labels else min(rows * length, model_config.logits_chunk) * model_config.vocab_size * 4,
    }
    for name, size in estimates.items():
        causes[name] = max(0, min(size, left))
        left -= causes[name]
    return causes | {"other": max(0, left)}


def flops(config: Config, model_config: ModelConfig, length: int) -> float:
    """FLOPs of the matrix products of one data-parallel device's step of rows of `length`: forward, backward, what remat repeats.

    A frozen matrix takes two products a token (forward, and the gradient of its input), a trained one three; remat one more.
    """
    rows = spec(model_config)
    tokens = config.gradient_accumulation_steps * config.per_device_train_batch_size * length
    active = 0
    for row in rows.values():
        if row.is_matrix:
            active += math.prod(row.shape)
        elif row.is_experts and model_config.moe:
            active += math.prod(row.shape) * model_config.moe.experts_per_token / model_config.moe.num_experts
    head = (model_config.num_labels or model_config.vocab_size) * model_config.hidden_size
    full = config.method == "full"
    passes = 3 if full else 2
    again = 0 if config.gradient_checkpointing is False else 1
    attention = model_config.num_layers * model_config.num_heads * model_config.head_dim * length  # the causal half
    reference = config.objective in WITH_REFERENCE and not beforehand(config)  # one more forward pass
    return 2.0 * tokens * (active * (passes + again + reference) + head * (passes + full + reference) + attention * (3 + again + reference))

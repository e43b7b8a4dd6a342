"""Parameter-efficient methods: what is trained, and how it is put into the frozen tree.

`METHODS` has one row per method. `compose(base, trainable)` is the only way to use a trained part; `merge` makes plain arrays of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxtune.errors import ConfigError
from jaxtune.model.weight import dense, is_weight
from jaxtune.peft import lora
from jaxtune.peft.combine import Mixed, compose_rows
from jaxtune.tree import flatten, unflatten


class Method(NamedTuple):
    """`init(key, model_config, base, config) -> trainable`; `quantized`: whether the base may be packed, and is by default."""

    init: Callable
    quantization: str | None = None
    summary: str = ""


def _init_full(key, model_config, base, config):
    if any(is_weight(leaf) for leaf in flatten(base).values()):
        raise ConfigError(
            f"method full trains the weights themselves, and those of {config.model} are packed; write method: qlora, or give the model "
            "that they were packed from"
        )
    return base


def _init_lora(key, model_config, base, config):
    return lora.init(key, model_config, base, config.lora)


METHODS = {
    "full": Method(_init_full, summary="every parameter"),
    "lora": Method(_init_lora, summary="low-rank pairs beside frozen matrices"),
    "qlora": Method(_init_lora, quantization="nf4-dq", summary="LoRA over a 4-bit base"),
}


def init_adapter(key: jax.Array, model, config) -> lora.Adapter:
    """A fresh adapter for `model` (a `jaxtune.Model`), by a `LoraConfig`; it changes nothing until it is trained."""
    return lora.init(key, model.config, model.params, config)


def compose(base: dict, trainable, key: jax.Array | None = None) -> dict:
    """The parameter tree to compute with: `base` with an adapter's leaves in place, or a fully trained tree as it is.

    O(1): swaps leaves, computes nothing; call it inside jit. `key` switches dropout on.
    """
    if trainable is None:
        return base
    if isinstance(trainable, lora.Adapter):
        return lora.compose(base, trainable, key)
    if isinstance(trainable, Mixed):
        return compose_rows(base, trainable)
    return trainable


def merge(base: dict, trainable=None, dtype=None) -> dict:
    """Plain arrays: adapters multiplied in, packed matrices dequantised, in `dtype` (by default the embedding's)."""
    own = flatten(base)
    dtype = dtype or dense(base["embed"]).dtype
    saved = trainable.saved if isinstance(trainable, lora.Adapter) else {}

    def plain(path: str, leaf):
        if is_weight(leaf):
            return dense(leaf, dtype)
        return leaf.astype(own.get(path, own["embed"]).dtype) if path in saved else leaf  # what is trained whole is so in float32

    return unflatten({path: plain(path, leaf) for path, leaf in flatten(compose(base, trainable)).items()})

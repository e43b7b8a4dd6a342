"""(IA)3 (arXiv 2205.05638): one learned number for each input or output of a matrix."""

import dataclasses
from typing import Any

import jax

from jaxtune.config import IA3Config
from jaxtune.errors import ConfigError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import Row
from jaxtune.model.weight import Matrix, Weight, dense, linear
from jaxtune.peft.adapter import Adapter, Kind, Part, ones
from jaxtune.peft.sites import named, names

# PEFT's modules by model type, and which of them are scaled at their input
QVD, KVD = (("q_proj", "v_proj", "down_proj"), ("down_proj",)), (("k_proj", "v_proj", "down_proj"), ("down_proj",))
DEFAULTS = dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), QVD) | dict.fromkeys(("llama", "mistral"), KVD) | {
    "mixtral": (("k_proj", "v_proj"), ()),  # w2, which PEFT also names, no longer exists in transformers
    "falcon": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
}  # fmt: skip


class ScaledOut(Weight):
    """`diag(scale) W`."""

    base: Matrix
    scale: jax.Array  # [out, 1]

    def apply(self, x: jax.Array) -> jax.Array:
        """`scale * W x`."""
        return linear(self.base, x) * self.scale[:, 0].astype(x.dtype)

    def dense(self, dtype) -> jax.Array:
        """The matrix itself."""
        return (dense(self.base, self.scale.dtype) * self.scale).astype(dtype)


class ScaledIn(Weight):
    """`W diag(scale)`."""

    base: Matrix
    scale: jax.Array  # [1, in]

    def apply(self, x: jax.Array) -> jax.Array:
        """`W (scale * x)`."""
        return linear(self.base, x * self.scale[0].astype(x.dtype))

    def dense(self, dtype) -> jax.Array:
        """The matrix itself."""
        return (dense(self.base, self.scale.dtype) * self.scale).astype(dtype)


class IA3Kind(Kind):
    """The bias is scaled with the output, as in PEFT."""

    config = IA3Config
    peft_type = "IA3"
    neutral = {"scale": 1.0}
    changes_bias = True
    ignored = frozenset({"init_ia3_weights"})

    def settle(self, model_config: ModelConfig, config: IA3Config) -> IA3Config:
        if config.target_modules is None:
            if model_config.model_type not in DEFAULTS:
                raise ConfigError(
                    f"ia3: PEFT has no default modules for {model_config.model_type}; write ia3.target_modules, and of them those that are "
                    "scaled where x enters as ia3.feedforward_modules"
                )
            targets, inner = DEFAULTS[model_config.model_type]
            config = dataclasses.replace(
                config, target_modules=targets, feedforward_modules=config.feedforward_modules or inner)
        targets, inner = config.target_modules, config.feedforward_modules
        if isinstance(targets, tuple) and isinstance(inner, tuple) and (odd := sorted(set(inner) - set(targets))):
            raise ConfigError(f"ia3.feedforward_modules names {', '.join(odd)}, which ia3.target_modules does not; add it there")
        return config

    def parts(self, config: IA3Config, path: str, row: Row, rank: int) -> dict[str, Part]:
        out, width = row.shape[-2:]
        inside = {_is_inner(config, name) for name in names(path, row)}
        if len(inside) > 1:
            raise ConfigError(f"ia3.feedforward_modules names {names(path, row)[0]} in some layers only; name it in all, or in none")
        if inside == {True}:
            return {"scale": Part((1, width), (None, "in"), "ia3_l", ones)}
        return {"scale": Part((out, 1), ("out", None), "ia3_l", ones)}

    def leaf(self, adapter: Adapter, base: Matrix, parts: dict[str, jax.Array], scale: jax.Array, key: jax.Array | None) -> Matrix:
        return ScaledIn(base, parts["scale"]) if parts["scale"].shape[-2] == 1 else ScaledOut(base, parts["scale"])

    def bias(self, adapter: Adapter, own: jax.Array | None, parts: dict[str, jax.Array], scale: jax.Array) -> jax.Array | None:
        if own is None or parts["scale"].shape[-2] == 1:
            return own
        return own.astype(parts["scale"].dtype) * parts["scale"][..., 0]


def _is_inner(config: IA3Config, name: str) -> bool:
    return named(name, config.feedforward_modules or ()) is not None


KIND: Any = IA3Kind()

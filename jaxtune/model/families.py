"""What a model is: `ModelConfig`, and how each Hugging Face `model_type` says it in its config.json.

A family is one function `config.json dict -> ModelConfig` in `FAMILIES` and one entry in `spec.NAMES`. Optional parts of a block
(biases, query/key norms, post-norms, fused projections) are rows of the row table: the decoder uses what is there.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.rope import Rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything `spec` and `forward` need to know about a model; hashable, so that it can be a static argument of jit."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_scale: float
    ropes: tuple[Rope, ...]
    layer_ropes: tuple[int, ...]  # index into `ropes` per layer; -1: no rotation (NoPE)
    layer_windows: tuple[int, ...]  # sliding window per layer, the token itself included; 0: full attention
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    initializer_range: float = 0.02
    # how to compute it, not what it is
    dtype: str = "float32"  # of activations and products
    remat: str = "none"  # none | full | dots: what the backward pass recomputes of each layer
    hf_json: str = dataclasses.field(default="", compare=False, repr=False)  # config.json as it was read, for writing it again

    @property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Layer numbers of each stack: consecutive layers with the same rows, scanned together."""
        return (tuple(range(self.num_layers)),)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a config.json dict; `ModelError` for a family or a switch we do not implement."""
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if key not in hf]
    if missing:
        raise ModelError(f"config.json of a {model_type} model lacks {', '.join(missing)}")
    return dataclasses.replace(FAMILIES[model_type](hf), hf_json=json.dumps(hf))


def _common(hf: Mapping[str, Any], **changes) -> dict[str, Any]:
    """The fields nearly all families spell alike."""
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    fields = dict(
        model_type=hf["model_type"],
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        hidden_act=hf.get("hidden_act", "silu"),
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        attention_scale=head_dim**-0.5,
        ropes=(Rope.from_hf(hf, head_dim),),
        layer_ropes=(0,) * layers,
        layer_windows=(0,) * layers,
        initializer_range=hf.get("initializer_range", 0.02),
    )
    return fields | changes


def _llama(hf: Mapping[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(hf, qkv_bias=bias, out_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False))))


def _mistral(hf: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(**_common(hf, layer_windows=(hf.get("sliding_window") or 0,) * hf["num_hidden_layers"]))


FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {"llama": _llama, "mistral": _mistral}

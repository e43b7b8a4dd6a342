"""Granite with windows: attention sinks, windows in three of four layers, a rotary base for each layer; dense, or Granite's mixture."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.kinds import whole_rope
from jaxtune.model.families.llama import GRANITE, every_fourth, granite_config
from jaxtune.model.families.moe import GRANITEMOESHARED, granite_experts, granitemoe_config
from jaxtune.model.families.parts import Rows, attention, mlp, norm
from jaxtune.model.rope import Rope
from jaxtune.model.row import Row


def _ropes(hf: dict[str, Any]) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """A scheme for each base of `layer_rope_theta`, and the scheme of each layer; a base of 0 is none."""
    size, layers, thetas = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"], hf["num_hidden_layers"], hf["layer_rope_theta"]
    if thetas is None:
        return (whole_rope(hf, size),), (0,) * layers
    if len(thetas) != layers or not all(isinstance(theta, int | float) and theta >= 0 for theta in thetas):
        raise ModelError(f"layer_rope_theta={thetas!r} has to be a number for each of num_hidden_layers={layers}, 0 for no rotation")
    said = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    bases = sorted({theta for theta in thetas if theta})
    ropes = tuple(whole_rope(hf | dict(rope_scaling={**said, "rope_theta": theta}), size) for theta in bases)
    return ropes, tuple(bases.index(theta) if theta else -1 for theta in thetas)


def _windowed(hf: dict[str, Any]) -> dict[str, Any]:
    """What both have more than Granite's."""
    ropes, of_layers = _ropes(hf)
    return dict(ropes=ropes, layer_ropes=of_layers, layer_windows=every_fourth(hf))


def _attending(c: ModelConfig) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield "sinks", Row((c.num_heads,), ("heads",), "zeros", "self_attn.sinks", "attn_sinks.weight")
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")


def _granite_swa(hf: dict[str, Any]) -> ModelConfig:
    return granite_config(hf, **_windowed(hf))


def _granite_swa_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _attending(c)
    yield from mlp(c)


_MORE = dict(head_dim=None, sliding_window=128, layer_types=None, layer_rope_theta=None)
GRANITE_SWA = Family(
    _granite_swa,
    _granite_swa_layer,
    GRANITE.defaults
    | _MORE
    | dict(num_key_value_heads=4, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True),
)


# ---- the mixture ----


def _granitemoe_swa(hf: dict[str, Any]) -> ModelConfig:
    return granitemoe_config(hf, **_windowed(hf))


def _granitemoe_swa_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _attending(c)
    yield from granite_experts(c, "router", "experts.gate_up_proj", "experts.down_proj")


GRANITEMOE_SWA = GRANITEMOESHARED._replace(
    config=_granitemoe_swa, layer=_granitemoe_swa_layer, defaults=GRANITEMOESHARED.defaults | _MORE
)

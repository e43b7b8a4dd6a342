"""Qwen 3.5 (text): three of four layers are Gated DeltaNet (model/delta.py), every fourth full attention with an output gate."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import DeltaNet, Family, ModelConfig, check_layer_types, common
from jaxtune.model.families.parts import Rows, attention, linear, mlp, norm, query_key_norms
from jaxtune.model.row import Row

LINEAR, FULL = "linear_attention", "full_attention"


def _kinds(hf: dict[str, Any]) -> list[str]:
    """The kind of each layer; where none are listed, every `full_attention_interval`-th is full attention."""
    layers = range(hf["num_hidden_layers"])
    kinds = hf.get("layer_types") or [FULL if (i + 1) % hf["full_attention_interval"] == 0 else LINEAR for i in layers]
    check_layer_types(hf, kinds, LINEAR, FULL)
    if FULL not in kinds:
        raise ModelError(f"layer_types: a model without a {FULL} layer is not implemented for {hf['model_type']}")
    return kinds


def delta_net(hf: dict[str, Any]) -> DeltaNet | None:
    """What config.json says of the linear layers; None where there are none."""
    keys, values = hf["linear_num_key_heads"], hf["linear_num_value_heads"]
    if values % keys:
        raise ModelError(f"linear_num_value_heads={values} is not a multiple of linear_num_key_heads={keys}")
    layers = tuple(i for i, kind in enumerate(_kinds(hf)) if kind == LINEAR)
    own = DeltaNet(keys, values, hf["linear_key_head_dim"], hf["linear_value_head_dim"], hf["linear_conv_kernel_dim"], layers)
    return own if layers else None


def _qwen3_5(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf["attention_bias"])
    # rotary positions of images and text in one (mrope): text alone has the same number in each of the three, so it is plain rotation
    return common(hf, partial=True, norm="rms_offset", qkv_bias=bias, out_bias=bias, delta=delta_net(hf))


def linear_attention(c: ModelConfig, d: DeltaNet) -> Rows:
    """Projections, the convolution `[channels, 1, W]`, decay, the gated norm and the way out."""
    values, width = d.value_heads * d.value_dim, c.hidden_size
    yield from linear("in_qkv", d.channels, width, ("heads", "embed"), "linear_attn.in_proj_qkv", "attn_qkv")
    yield from linear("in_z", values, width, ("heads", "embed"), "linear_attn.in_proj_z", "attn_gate")
    yield from linear("in_b", d.value_heads, width, ("heads", "embed"), "linear_attn.in_proj_b", "ssm_beta")
    yield from linear("in_a", d.value_heads, width, ("heads", "embed"), "linear_attn.in_proj_a", "ssm_alpha")
    channels = (d.channels, 1, d.kernel), ("heads", None, None)
    yield "conv", Row(*channels, "normal", "linear_attn.conv1d.weight", "ssm_conv1d.weight")
    yield "dt_bias", Row((d.value_heads,), ("heads",), "ones", "linear_attn.dt_bias", "ssm_dt.bias")
    yield "a_log", Row((d.value_heads,), ("heads",), "zeros", "linear_attn.A_log", "ssm_a")
    yield "state_norm", Row((d.value_dim,), (None,), "ones", "linear_attn.norm.weight", "ssm_norm.weight")
    yield from linear("out", width, values, ("embed", "heads"), "linear_attn.out_proj", "ssm_out")


def gated_attention(c: ModelConfig) -> Rows:
    """Attention whose queries' projection holds the gate of its result too, head by head."""
    yield from attention(c, gated=True)
    yield from query_key_norms(c, c.head_dim, c.head_dim)


def mixer(c: ModelConfig, layer: int) -> Rows:
    """A layer's norm and what mixes its tokens."""
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from linear_attention(c, c.delta) if c.delta and layer in c.delta.layers else gated_attention(c)


def _qwen3_5_layer(c: ModelConfig, layer: int) -> Rows:
    yield from mixer(c, layer)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "post_attention_norm")
    yield from mlp(c)


DEFAULTS = dict(
    num_key_value_heads=4,
    head_dim=256,
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    partial_rotary_factor=0.25,
    full_attention_interval=4,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
)
QWEN3_5 = Family(_qwen3_5, _qwen3_5_layer, DEFAULTS)

"""Qwen 3.5 (text) and Qwen 3 Next: three of four layers are Gated DeltaNet (model/delta.py), every fourth is full attention with an output
gate; dense, or with a mixture of experts in each layer."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import check_layer_types
from jaxtune.model.families.moe import moe_of, qwen_fed, sparse_layers
from jaxtune.model.families.parts import Rows, attention, linear, norm, query_key_norms
from jaxtune.model.families.recurrent import DeltaNet
from jaxtune.model.row import Row

LINEAR, FULL = "linear_attention", "full_attention"


def _kinds(hf: dict[str, Any]) -> list[str]:
    """The kind of each layer; by default every `full_attention_interval`-th is full attention."""
    layers = range(hf["num_hidden_layers"])
    kinds = hf.get("layer_types") or [FULL if (i + 1) % hf["full_attention_interval"] == 0 else LINEAR for i in layers]
    check_layer_types(hf, kinds, LINEAR, FULL)
    if FULL not in kinds:
        raise ModelError(f"layer_types: a model without a {FULL} layer is not implemented for {hf['model_type']}")
    return kinds


def delta_net(hf: dict[str, Any]) -> DeltaNet | None:
    """config.json's description of the linear layers; None if there are none."""
    keys, values = hf["linear_num_key_heads"], hf["linear_num_value_heads"]
    if values % keys:
        raise ModelError(f"linear_num_value_heads={values} is not a multiple of linear_num_key_heads={keys}")
    layers = tuple(i for i, kind in enumerate(_kinds(hf)) if kind == LINEAR)
    own = DeltaNet(keys, values, hf["linear_key_head_dim"], hf["linear_value_head_dim"], hf["linear_conv_kernel_dim"], layers)
    return own if layers else None


def _qwen3_5(hf: dict[str, Any], **changes) -> ModelConfig:
    bias = bool(hf["attention_bias"])
    # rotary positions for images and text together (mrope): text has the same number in all three, so it is plain rotation
    return common(hf, partial=True, norm="rms_offset", qkv_bias=bias, out_bias=bias, delta=delta_net(hf), **changes)


def linear_attention(c: ModelConfig, d: DeltaNet, by_head: bool = False) -> Rows:
    """Projections, the convolution `[channels, 1, W]`, decay, the gated norm and the output projection; `by_head`: the projections are two
    matrices, ordered by key head."""
    values, width, wide = d.value_heads * d.value_dim, c.hidden_size, ("heads", "embed")
    if by_head:
        yield from linear("in_qkvz", d.channels + values, width, wide, "linear_attn.in_proj_qkvz", "ssm_in")
        yield from linear("in_ba", 2 * d.value_heads, width, wide, "linear_attn.in_proj_ba", "ssm_ba")
    else:
        yield from linear("in_qkv", d.channels, width, wide, "linear_attn.in_proj_qkv", "attn_qkv")
        yield from linear("in_z", values, width, wide, "linear_attn.in_proj_z", "attn_gate")
        yield from linear("in_b", d.value_heads, width, wide, "linear_attn.in_proj_b", "ssm_beta")
        yield from linear("in_a", d.value_heads, width, wide, "linear_attn.in_proj_a", "ssm_alpha")
    channels = (d.channels, 1, d.kernel), ("heads", None, None)
    yield "conv", Row(*channels, "normal", "linear_attn.conv1d.weight", "ssm_conv1d.weight")
    yield "dt_bias", Row((d.value_heads,), ("heads",), "ones", "linear_attn.dt_bias", "ssm_dt.bias")
    yield "a_log", Row((d.value_heads,), ("heads",), "zeros", "linear_attn.A_log", "ssm_a")
    yield "state_norm", Row((d.value_dim,), (None,), "ones", "linear_attn.norm.weight", "ssm_norm.weight")
    yield from linear("out", width, values, ("embed", "heads"), "linear_attn.out_proj", "ssm_out")


def gated_attention(c: ModelConfig) -> Rows:
    """Attention whose query projection also contains the result's gate, head by head."""
    yield from attention(c, gated=True)
    yield from query_key_norms(c, c.head_dim, c.head_dim)


def _layer(c: ModelConfig, layer: int, by_head: bool = False) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from linear_attention(c, c.delta, by_head) if c.delta and layer in c.delta.layers else gated_attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "post_attention_norm")
    yield from qwen_fed(c, layer)


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
QWEN3_5 = Family(_qwen3_5, _layer, DEFAULTS)


# ---- with experts, and one that all tokens share ----


def _qwen3_5_moe(hf: dict[str, Any], layers: list[int] | None = None, normalize: bool = True) -> ModelConfig:
    inner, shared = hf["moe_intermediate_size"], hf["shared_expert_intermediate_size"]
    layers = list(range(hf["num_hidden_layers"])) if layers is None else layers
    moe = moe_of(hf, hf["num_experts"], inner, layers, normalize, shared_intermediate_size=shared)
    return _qwen3_5({"intermediate_size": inner, **hf}, moe=moe)


def _qwen3_next(hf: dict[str, Any]) -> ModelConfig:
    return _qwen3_5_moe(hf, sparse_layers(hf, hf["num_experts"]), bool(hf["norm_topk_prob"]))


_MOE = DEFAULTS | dict(
    num_key_value_heads=2,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_experts_per_tok=8,
    num_experts=256,
    router_aux_loss_coef=0.001,
)
QWEN3_5_MOE = Family(
    _qwen3_5_moe, _layer, _MOE, required=tuple(key for key in Family._field_defaults["required"] if key != "intermediate_size")
)
QWEN3_NEXT = Family(
    _qwen3_next,
    lambda c, layer: _layer(c, layer, by_head=True),
    _MOE | dict(num_experts_per_tok=10, num_experts=512, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=None),
    ignored=r"mtp\..*",
)

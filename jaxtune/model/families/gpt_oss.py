"""GPT-OSS: attention sinks, windows in every other layer, YaRN, biases everywhere, experts with a clamped gate."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import windows_by_period
from jaxtune.model.families.llama import DEFAULTS
from jaxtune.model.families.moe import moe_of
from jaxtune.model.families.parts import Rows, attention, linear, norm
from jaxtune.model.row import Part, Row

YARN = dict(rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096)


def _gpt_oss(hf: dict[str, Any]) -> ModelConfig:
    layers, bias = range(hf["num_hidden_layers"]), bool(hf["attention_bias"])
    if not hf.get("rope_scaling") and hf.get("rope_parameters") is None:
        hf = hf | {"rope_scaling": YARN}
    number = hf.get("num_experts") or hf["num_local_experts"]
    clamp = float(hf["swiglu_limit"]), float(hf["swiglu_alpha"])
    moe = moe_of(hf, number, hf["intermediate_size"], list(layers), normalize=True, clamp=clamp)
    return common(hf, norm="rms_float32", qkv_bias=bias, out_bias=bias, layer_windows=windows_by_period(hf, 2), moe=moe)


def _gpt_oss_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield "sinks", Row((c.num_heads,), ("heads",), "normal", "self_attn.sinks", "attn_sinks.weight")
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "post_attention_norm")
    yield from _experts(c)


def _experts(c: ModelConfig) -> Rows:
    """In a file, each layer's experts are one tensor `[E, in, out]`, with gate and up interleaved."""
    assert c.moe is not None
    E, width, inner = c.moe.num_experts, c.hidden_size, c.moe.intermediate_size
    yield from linear("router", E, width, ("experts", "embed"), "mlp.router", "ffn_gate_inp", bias=True)
    for number, name in enumerate(("gate", "up")):
        part, gguf = Part(number, 2, alternating=True), f"ffn_{name}_exps"
        hf, axes = "mlp.experts.gate_up_proj", ("experts", "mlp", "embed")
        yield f"experts_{name}", Row((E, inner, width), axes, "normal", hf, f"{gguf}.weight", transposed=True, part=part)
        yield f"experts_{name}_bias", Row((E, inner), axes[:2], "zeros", f"{hf}_bias", f"{gguf}.bias", part=part)
    hf, axes = "mlp.experts.down_proj", ("experts", "embed", "mlp")
    yield "experts_down", Row((E, width, inner), axes, "normal", hf, "ffn_down_exps.weight", transposed=True, part=Part())
    yield "experts_down_bias", Row((E, width), axes[:2], "zeros", f"{hf}_bias", "ffn_down_exps.bias")


GPT_OSS = Family(
    _gpt_oss,
    _gpt_oss_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        attention_bias=True,
        sliding_window=128,
        num_local_experts=128,
        num_experts_per_tok=4,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        router_aux_loss_coef=0.001,
    ),
    moe=("mlp.router", "mlp.experts"),
)

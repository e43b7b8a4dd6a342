"""GLM 4: half of a head rotates, neighbouring dimensions together, gate and up in one matrix; from 0414 on (glm4) norms on both sides of a
block."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.parts import Rows, attention, fused_mlp, norm

DEFAULTS = dict(
    num_key_value_heads=2,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-7,
    tie_word_embeddings=False,
    attention_bias=True,
    partial_rotary_factor=0.5,
    pad_token_id=151329,
)


def _glm(hf: dict[str, Any]) -> ModelConfig:
    return common(hf, partial=True, interleaved=True, qkv_bias=bool(hf["attention_bias"]))


def _glm_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from fused_mlp(c)


def _glm4_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _glm_layer(c, layer)
    yield from norm(c, "attn_post_norm", "post_self_attn_layernorm", "post_attention_norm")
    yield from norm(c, "mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm")


GLM = Family(_glm, _glm_layer, DEFAULTS)
GLM4 = Family(_glm, _glm4_layer, DEFAULTS)

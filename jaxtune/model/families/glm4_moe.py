"""GLM 4.5 and 4.7, dots.llm1, Solar Open: DeepSeek V3's experts with other attention (GLM 4.7 Flash: the same attention)."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.deepseek import DEEPSEEK_V3, dense_or_experts, experts_of, latent_config
from jaxtune.model.families.kinds import windows
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.moe import sparse_by_type
from jaxtune.model.families.parts import Rows, attention, norm, query_key_norms

# ---- GLM 4.5: grouped queries, half of a head turns ----


def _glm4_moe(hf: dict[str, Any]) -> ModelConfig:
    moe = experts_of(hf, normalize=bool(hf["norm_topk_prob"]), sigmoid=True)
    return common(hf, partial=True, qkv_bias=bool(hf["attention_bias"]), qk_norm=bool(hf["use_qk_norm"]), moe=moe)


def _glm4_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    if c.qk_norm:
        yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from dense_or_experts(c, layer, "post_attention_norm")


GLM4_MOE = Family(
    _glm4_moe,
    _glm4_moe_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        moe_intermediate_size=1408,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_routed_experts=128,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        use_qk_norm=False,
    ),
    ignored=r"model\.layers\.{layers}\..*",
)


# ---- GLM 4.7 Flash: DeepSeek V3's latent attention; `mlp_layer_types` says which layers have experts ----


def _glm4_moe_lite(hf: dict[str, Any]) -> ModelConfig:
    turning = hf["qk_rope_head_dim"]
    if (hf["head_dim"] or turning) != turning:
        raise ModelError(f"head_dim={hf['head_dim']} is not qk_rope_head_dim={turning}; in a glm4_moe_lite model both are one number")
    moe = experts_of(hf, sparse_by_type(hf, 1), normalize=bool(hf["norm_topk_prob"]), sigmoid=True)
    return latent_config(hf, interleaved=bool(hf["rope_interleave"]), moe=moe)


GLM4_MOE_LITE = DEEPSEEK_V3._replace(
    config=_glm4_moe_lite,
    defaults=DEEPSEEK_V3.defaults
    | dict(
        num_key_value_heads=20,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        max_position_embeddings=202752,
        rms_norm_eps=1e-5,
        mlp_layer_types=None,
        n_routed_experts=64,
        moe_intermediate_size=1536,
        routed_scaling_factor=1.8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=4,
    ),
)


# ---- dots.llm1: attention as in Qwen 3, windows from some layer on ----


def _dots1(hf: dict[str, Any]) -> ModelConfig:
    first = hf["max_window_layers"] if hf["sliding_window"] is not None else hf["num_hidden_layers"]
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(hf["num_hidden_layers"])]
    moe = experts_of(hf, normalize=bool(hf["norm_topk_prob"]), sigmoid=True)
    return llama_config(hf, mlp_bias=False, layer_windows=windows(hf, hf.get("layer_types") or kinds), moe=moe)


def _dots1_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from dense_or_experts(c, layer)


DOTS1 = Family(
    _dots1,
    _dots1_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=32,
        moe_intermediate_size=1408,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        sliding_window=4096,
        max_window_layers=62,
    ),
    required=(*Family._field_defaults["required"], "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
)


# ---- Solar Open: experts in every layer ----


def _solar_open(hf: dict[str, Any]) -> ModelConfig:
    moe = experts_of(hf | dict(first_k_dense_replace=0), normalize=bool(hf["norm_topk_prob"]), sigmoid=True)
    return common(hf | dict(intermediate_size=hf["moe_intermediate_size"]), qkv_bias=bool(hf["attention_bias"]), moe=moe)


SOLAR_OPEN = GLM4_MOE._replace(
    config=_solar_open,
    defaults={key: value for key, value in GLM4_MOE.defaults.items() if key not in ("partial_rotary_factor", "first_k_dense_replace")}
    | dict(head_dim=128, rope_theta=1e6, moe_intermediate_size=1280),
    refused={"use_qk_norm": (None, False), "first_k_dense_replace": (None, 0)},
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    ignored=None,
)

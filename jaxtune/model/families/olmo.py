"""OLMo 1 to 3, FlexOlmo, EXAONE 4 and K-EXAONE: norms without parameters, then norms after attention and feed-forward instead of before."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.deepseek import dense_or_experts, experts_of
from jaxtune.model.families.kinds import ropes_by_kind, windows_by_period
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.moe import OLMOE, moe_of, qwen_experts, sparse_by_type
from jaxtune.model.families.parts import Rows, attention, mlp, norm, query_key_norms

# ---- OLMo: LayerNorms without parameters, queries, keys and values cut ----


def _olmo(hf: dict[str, Any]) -> ModelConfig:
    clip = float(hf["clip_qkv"] or 0)
    return llama_config(
        hf, norm="layer_unbiased", norm_eps=1e-5, bare_norms=("attn_norm", "mlp_norm", "norm"), mlp_bias=False, qkv_clip=clip
    )


def _olmo_layer(c: ModelConfig, layer: int) -> Rows:
    yield from attention(c)
    yield from mlp(c)


OLMO = Family(_olmo, _olmo_layer, DEFAULTS | dict(clip_qkv=None, pad_token_id=1))


# ---- OLMo 2: norms over whole queries and keys too ----


def _olmo2(hf: dict[str, Any], **changes) -> ModelConfig:
    return llama_config(hf, norm="rms_float32", mlp_bias=False, **changes)


def post_norm_layer(c: ModelConfig, q_width: int, k_width: int) -> Rows:
    """Attention and feed-forward, each followed by a norm; norms of queries and keys over so many numbers."""
    yield from attention(c)
    yield from query_key_norms(c, q_width, k_width)
    yield from norm(c, "attn_post_norm", "post_attention_layernorm", "post_attention_norm")
    yield from qwen_experts(c) if c.moe else mlp(c)
    yield from norm(c, "mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm")


def _olmo2_layer(c: ModelConfig, layer: int) -> Rows:
    yield from post_norm_layer(c, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)


_OLMO2 = DEFAULTS | dict(rms_norm_eps=1e-5, pad_token_id=1)
OLMO2 = Family(_olmo2, _olmo2_layer, _OLMO2)


# ---- FlexOlmo: OLMo 2 with experts ----


def _flex_olmo(hf: dict[str, Any]) -> ModelConfig:
    number, layers = hf.get("num_local_experts") or hf["num_experts"], list(range(hf["num_hidden_layers"]))  # two names of one key
    return _olmo2(hf, moe=moe_of(hf, number, hf["intermediate_size"], layers, bool(hf["norm_topk_prob"])))


FLEX_OLMO = OLMOE._replace(
    config=_flex_olmo,
    layer=_olmo2_layer,
    defaults=OLMOE.defaults | dict(rms_norm_eps=1e-6, rope_theta=5e5, num_experts=7, num_experts_per_tok=5, pad_token_id=100277),
    refused={},
)


# ---- OLMo 3: windows in three of four layers, whose rotation is never scaled ----


def _olmo3(hf: dict[str, Any]) -> ModelConfig:
    head_dim = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    found = windows_by_period(hf, 4)
    ropes = ropes_by_kind(hf, head_dim, 5e5)
    return _olmo2(hf, ropes=ropes, layer_windows=found, layer_ropes=tuple(1 if window else 0 for window in found))


OLMO3 = Family(_olmo3, _olmo2_layer, _OLMO2 | dict(sliding_window=4096, rope_theta=5e5))


# ---- EXAONE 4: norms over heads; no positions in the layers without a window, where others have one ----


def _exaone4(hf: dict[str, Any], **changes) -> ModelConfig:
    period = hf.get("sliding_window_pattern", 4) if hf["sliding_window"] else 0
    if not hf.get("layer_types") and not isinstance(period, int):
        raise ModelError(f"sliding_window_pattern is {period!r} and layer_types is missing; write layer_types, the kind of each layer")
    found = windows_by_period(hf, period if isinstance(period, int) else 0)
    ropes = tuple(0 if window or hf["sliding_window"] is None else -1 for window in found)
    return llama_config(hf, layer_windows=found, layer_ropes=ropes, **changes)


def _exaone4_layer(c: ModelConfig, layer: int) -> Rows:
    yield from post_norm_layer(c, c.head_dim, c.head_dim)


EXAONE4 = Family(
    _exaone4,
    _exaone4_layer,
    DEFAULTS | dict(num_key_value_heads=32, rms_norm_eps=1e-5, sliding_window=4096),
)


# ---- EXAONE MoE (K-EXAONE): the same attention after a norm, and DeepSeek V3's experts ----


def _exaone_moe(hf: dict[str, Any]) -> ModelConfig:
    sparse, named = sparse_by_type(hf, hf["first_k_dense_replace"]), hf | dict(n_shared_experts=hf["num_shared_experts"])
    return _exaone4(hf, moe=experts_of(named, sparse, normalize=bool(hf["norm_topk_prob"]), sigmoid=True))


def _exaone_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from dense_or_experts(c, layer, correction="mlp.e_score_correction_bias")


EXAONE_MOE = Family(
    _exaone_moe,
    _exaone_moe_layer,
    EXAONE4.defaults
    | dict(
        mlp_layer_types=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1024,
        num_experts=64,
        num_experts_per_tok=8,
        num_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=1,
        topk_group=1,
        pad_token_id=0,
    ),
    ignored=r"mtp.*",
)

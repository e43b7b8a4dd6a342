"""Cohere 1 and 2 (Command R, Aya): LayerNorms without bias, attention and feed-forward in parallel under one norm, neighbouring dimensions
rotate together."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common, windows_by_period
from jaxtune.model.families.parts import Rows, attention, mlp, norm

DEFAULTS = dict(
    num_key_value_heads=None,
    hidden_act="silu",
    max_position_embeddings=8192,
    layer_norm_eps=1e-5,
    tie_word_embeddings=True,
    attention_bias=False,
    logit_scale=0.0625,
    pad_token_id=0,
)


# ---- Cohere: norms of queries and keys by flag, a scale for each head ----


def _cohere(hf: dict[str, Any], **changes) -> ModelConfig:
    bias = bool(hf["attention_bias"])
    fields = dict(
        interleaved=True,
        norm="layer_unbiased",
        norm_eps=hf["layer_norm_eps"],
        qkv_bias=bias,
        out_bias=bias,
        parallel_residual=True,
        shared_norm=True,
        logits_scaling=1 / hf["logit_scale"],
        qk_norm=bool(hf.get("use_qk_norm")),
    )
    return common(hf, **fields | changes)


def _cohere_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    if c.qk_norm:
        yield from norm(c, "q_norm", "self_attn.q_norm", "attn_q_norm", c.num_heads, c.head_dim)
        yield from norm(c, "k_norm", "self_attn.k_norm", "attn_k_norm", c.num_kv_heads, c.head_dim)
    yield from mlp(c)


COHERE = Family(_cohere, _cohere_layer, DEFAULTS | dict(use_qk_norm=False, rope_theta=5e5))


# ---- Cohere 2: windows, and no positions in the layers without ----


def _cohere2(hf: dict[str, Any]) -> ModelConfig:
    found = windows_by_period(hf, hf["sliding_window_pattern"])
    ropes = tuple(0 if window else -1 for window in found)
    return _cohere(hf | dict(head_dim=None, use_qk_norm=False), layer_windows=found, layer_ropes=ropes)


COHERE2 = Family(_cohere2, _cohere_layer, DEFAULTS | dict(sliding_window=4096, sliding_window_pattern=4))

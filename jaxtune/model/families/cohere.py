"""Cohere 1 and 2 (Command R, Aya): LayerNorms without bias, attention and feed-forward in parallel under one norm, neighbouring dimensions
rotate together. Cohere 2 MoE: experts, and RMS norms by flag."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import windows, windows_by_period
from jaxtune.model.families.moe import moe_of, qwen_experts, sparse_by_type
from jaxtune.model.families.parts import Rows, attention, mlp, norm, shared_expert

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


# ---- Cohere 2 MoE: dense layers first, with windows of their own and always rotation ----


def _cohere2_moe(hf: dict[str, Any]) -> ModelConfig:
    layers, dense, period = range(hf["num_hidden_layers"]), hf.get("first_k_dense_replace") or 0, hf["prefix_dense_sliding_window_pattern"]
    numbers = [(i, period) for i in range(dense)] + [(i, hf["sliding_window_pattern"]) for i in range(len(layers) - dense)]
    kinds = hf.get("layer_types") or ["sliding_attention" if every and (i + 1) % every else "full_attention" for i, every in numbers]
    sparse = sparse_by_type(hf, dense)
    inner, wide, eps = hf["intermediate_size"], hf["prefix_dense_intermediate_size"], hf["rms_norm_eps"]
    chosen, mixed = hf["expert_selection_fn"], hf["shared_expert_combination_strategy"]
    if chosen not in ("softmax", "sigmoid") or mixed not in ("average", "sum"):
        raise ModelError(
            f"expert_selection_fn={chosen!r} and shared_expert_combination_strategy={mixed!r} of this cohere2_moe model have to be softmax "
            "or sigmoid, average or sum"
        )
    part = 0.5 if hf["num_shared_experts"] and mixed == "average" else 1.0
    moe = moe_of(
        hf,
        hf["num_experts"],
        inner,
        sparse,
        normalize=chosen == "softmax" or bool(hf["norm_topk_prob"]),
        sigmoid=chosen == "sigmoid",
        shared_intermediate_size=inner * hf["num_shared_experts"],
        scale=part,
        shared_scale=part,
        aux_loss_coef=None,
    )
    found = windows(hf, kinds)
    turns = [bool(found[layer]) or (layer not in sparse and period == 1) for layer in layers]
    norms = {} if eps is None else dict(norm="rms", norm_eps=eps)
    named = hf | dict(intermediate_size=inner if wide is None else wide)
    return _cohere(named, layer_windows=found, layer_ropes=tuple(0 if turn else -1 for turn in turns), moe=moe, **norms)


def _cohere2_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c)
        return
    yield from qwen_experts(c)
    if c.moe.shared_intermediate_size:
        yield from shared_expert(c, "mlp.shared_experts")


COHERE2_MOE = Family(
    _cohere2_moe,
    _cohere2_moe_layer,
    COHERE2.defaults
    | dict(
        head_dim=128,
        mlp_layer_types=None,
        prefix_dense_sliding_window_pattern=1,
        prefix_dense_intermediate_size=None,
        rms_norm_eps=None,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=0,
        shared_expert_combination_strategy="average",
        expert_selection_fn="softmax",
        norm_topk_prob=True,
    ),
    {"use_qk_norm": (None, False)},
)

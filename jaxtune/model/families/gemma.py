"""Gemma 1, 2 and 3 (text) and VaultGemma: (1 + w) norms, scaled embeddings, then norms on both sides of a block, windows, soft caps."""

import dataclasses
from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import ropes_by_kind, windows_by_period
from jaxtune.model.families.parts import Rows, attention, mlp, norm, pre_norm_layer, query_key_norms

DEFAULTS = dict(
    num_key_value_heads=16,
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_bias=False,
    pad_token_id=0,
)
REFUSED = {"use_bidirectional_attention": (None, False)}


def _gemma(hf: dict[str, Any], **changes) -> ModelConfig:
    bias = bool(hf["attention_bias"])
    scale = hf["hidden_size"] ** 0.5
    return common(hf, **dict(norm="rms_offset", embed_scale=scale, qkv_bias=bias, out_bias=bias) | changes)


def _gemma1(hf: dict[str, Any]) -> ModelConfig:
    act = hf["hidden_act"]
    return _gemma(hf, hidden_act="gelu_pytorch_tanh" if act == "gelu" else act)  # the first files said gelu and meant the other


GEMMA = Family(_gemma1, pre_norm_layer, DEFAULTS, REFUSED)


# ---- Gemma 2 ----


def _gemma2(hf: dict[str, Any], period: int = 2, **changes) -> ModelConfig:
    fields = dict(
        hidden_act=hf["hidden_activation"],
        attention_scale=hf["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=hf["attn_logit_softcapping"] or 0.0,
        logits_softcap=hf["final_logit_softcapping"] or 0.0,
        layer_windows=windows_by_period(hf, period),
    )
    return _gemma(hf, **fields | changes)


def sandwich(c: ModelConfig, attending: Rows, fed: Rows) -> Rows:
    """A layer with norms before and after each of its two parts."""
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attending
    yield from norm(c, "attn_post_norm", "post_attention_layernorm", "post_attention_norm")
    yield from norm(c, "mlp_norm", "pre_feedforward_layernorm", "ffn_norm")
    yield from fed
    yield from norm(c, "mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm")


def _gemma2_layer(c: ModelConfig, layer: int) -> Rows:
    yield from sandwich(c, attention(c), mlp(c))


_SANDWICH = DEFAULTS | dict(
    num_key_value_heads=4,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
GEMMA2 = Family(_gemma2, _gemma2_layer, _SANDWICH, REFUSED)


# ---- VaultGemma: Gemma 2 with norms on one side ----


def _vaultgemma_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "pre_feedforward_layernorm", "ffn_norm")
    yield from mlp(c)


VAULTGEMMA = Family(_gemma2, _vaultgemma_layer, _SANDWICH)


# ---- Gemma 3: a rotary scheme for each kind of layer; no soft cap in the attention, whatever the config says ----


def _gemma3(hf: dict[str, Any]) -> ModelConfig:
    head_dim = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    ropes = ropes_by_kind(hf, head_dim, hf["rope_local_base_freq"])
    config = _gemma2(hf, hf["sliding_window_pattern"], attention_softcap=0.0, ropes=ropes)
    return dataclasses.replace(config, layer_ropes=tuple(1 if window else 0 for window in config.layer_windows))


def _gemma3_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _gemma2_layer(c, layer)
    yield from query_key_norms(c, c.head_dim, c.head_dim)


GEMMA3 = Family(
    _gemma3,
    _gemma3_layer,
    _SANDWICH
    | dict(
        max_position_embeddings=131072,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        sliding_window_pattern=6,
    ),
    REFUSED,
)

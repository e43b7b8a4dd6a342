"""Llama and the families that differ from it by a switch: Mistral, Qwen 2 and 3, SmolLM3, Granite, Phi-3, Ministral, InternLM 3, ..."""

import dataclasses
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.factors import Growth
from jaxtune.model.families.kinds import one_window, windows
from jaxtune.model.families.parts import Rows, attention, fused_mlp, linear, mlp, norm, pre_norm_layer, query_key_norms

DEFAULTS = dict(
    num_key_value_heads=None,
    head_dim=None,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)


# ---- Llama 2 to 3.2, SmolLM2 (llama) ----


def llama_config(hf: dict[str, Any], **changes) -> ModelConfig:
    """Biases by flag; the same for all families here."""
    bias = bool(hf["attention_bias"])
    return common(hf, **dict(qkv_bias=bias, out_bias=bias, mlp_bias=bool(hf["mlp_bias"])) | changes)


LLAMA = Family(llama_config, pre_norm_layer, DEFAULTS)


IQUESTCODER = LLAMA._replace(
    defaults=DEFAULTS | dict(num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5),
    refused={"clip_qkv": (None,), "use_sliding_window": (None, False)},
)


# ---- InternLM 3: other names of the biases ----


def _internlm3(hf: dict[str, Any]) -> ModelConfig:
    qkv, others = (hf[new] if hf.get(old) is None else hf[old] for old, new in (("qkv_bias", "attention_bias"), ("bias", "mlp_bias")))
    if bool(qkv) != bool(others):
        raise ModelError(f"qkv_bias={qkv!r} and bias={others!r} are not implemented for internlm3; only one value of both is")
    return llama_config(hf | dict(attention_bias=qkv, mlp_bias=others))


INTERNLM3 = Family(
    _internlm3,
    pre_norm_layer,
    DEFAULTS | dict(num_key_value_heads=2, head_dim=128, max_position_embeddings=32768, rms_norm_eps=1e-5, pad_token_id=2),
)


# ---- Code World Model: windows in three of four layers, the first is full ----

_CWM_ROPE = dict(rope_type="llama3", rope_theta=1e6, factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0)
_CWM_ROPE |= dict(original_max_position_embeddings=8192)


def every_fourth(hf: dict[str, Any]) -> tuple[int, ...]:
    """The window of each layer by `layer_types`; without them of all but every fourth, counted from the first."""
    kinds = ["sliding_attention" if layer % 4 else "full_attention" for layer in range(hf["num_hidden_layers"])]
    return windows(hf, hf.get("layer_types") or kinds)


def _cwm(hf: dict[str, Any]) -> ModelConfig:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or _CWM_ROPE
    return common(hf | dict(rope_parameters=rope), mlp_bias=bool(hf["mlp_bias"]), layer_windows=every_fourth(hf))


CWM = Family(
    _cwm,
    pre_norm_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=8192,
    ),
)


# ---- Mistral: one window ----


def _mistral(hf: dict[str, Any]) -> ModelConfig:
    return common(hf, layer_windows=one_window(hf))


MISTRAL = Family(
    _mistral, pre_norm_layer, DEFAULTS | dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
)


# ---- Ministral: windows by layer ----


def _ministral(hf: dict[str, Any]) -> ModelConfig:
    kind = "sliding_attention" if hf["sliding_window"] is not None else "full_attention"
    return common(hf, layer_windows=windows(hf, hf.get("layer_types") or [kind] * hf["num_hidden_layers"]))


MINISTRAL = Family(
    _ministral, pre_norm_layer, DEFAULTS | dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096)
)


# ---- Ministral 3: yarn, and queries that grow with their position ----


def _ministral3(hf: dict[str, Any]) -> ModelConfig:
    hf = hf | {"rope_parameters": hf.get("rope_scaling") or hf["rope_parameters"] or MINISTRAL3.defaults["rope_parameters"]}
    config, rope, key = _mistral(hf), hf["rope_parameters"], "original_max_position_embeddings"
    length = int(hf.get(key) or rope.get(key) or hf["max_position_embeddings"])
    return dataclasses.replace(config, query_growth=Growth(float(rope.get("llama_4_scaling_beta") or 0.0), length))


MINISTRAL3 = Family(
    _ministral3,
    pre_norm_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-5,
        sliding_window=None,
        pad_token_id=11,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=1e6,
            factor=16.0,
            original_max_position_embeddings=16384,
            mscale=1.0,
            mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1,
        ),
    ),
)


# ---- Qwen 2 and 2.5: biases on q, k, v; windows from some layer on. Qwen 3: norms of queries and keys ----


def _qwen_windows(hf: dict[str, Any]) -> tuple[int, ...]:
    hf = hf | {"sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None}
    first = hf["max_window_layers"] if hf["sliding_window"] else hf["num_hidden_layers"]
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(hf["num_hidden_layers"])]
    return windows(hf, hf.get("layer_types") or kinds)


def _qwen2(hf: dict[str, Any]) -> ModelConfig:
    return common(hf, qkv_bias=True, layer_windows=_qwen_windows(hf))


def _qwen3(hf: dict[str, Any]) -> ModelConfig:
    return llama_config(hf, layer_windows=_qwen_windows(hf))


def _qwen3_layer(c: ModelConfig, layer: int) -> Rows:
    yield from pre_norm_layer(c, layer)
    yield from query_key_norms(c, c.head_dim, c.head_dim)


_QWEN = DEFAULTS | dict(
    num_key_value_heads=32, max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096, max_window_layers=28
)
QWEN2 = Family(_qwen2, pre_norm_layer, _QWEN)
QWEN3 = Family(_qwen3, _qwen3_layer, _QWEN | dict(head_dim=128))


# ---- SmolLM3: layers without positions ----


def _smollm3(hf: dict[str, Any]) -> ModelConfig:
    layers = range(hf["num_hidden_layers"])
    turning = hf.get("no_rope_layers") or [(layer + 1) % hf["no_rope_layer_interval"] != 0 for layer in layers]
    if len(turning) < len(layers):
        raise ModelError(f"no_rope_layers has {len(turning)} entries for num_hidden_layers={len(layers)}")
    sliding = hf["use_sliding_window"] and hf["sliding_window"]
    kinds = ["sliding_attention" if sliding and not turning[layer] else "full_attention" for layer in layers]
    return llama_config(
        hf,
        layer_ropes=tuple(0 if turning[layer] else -1 for layer in layers),
        layer_windows=windows(hf, hf.get("layer_types") or kinds),
    )


SMOLLM3 = Family(
    _smollm3,
    pre_norm_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_theta=2e6,
        use_sliding_window=False,
        sliding_window=None,
        no_rope_layer_interval=4,
        pad_token_id=128004,
    ),
)


# ---- Seed-OSS, ERNIE 4.5, Helium: other biases, neighbours that turn together ----


def _seed_oss(hf: dict[str, Any]) -> ModelConfig:
    return llama_config(hf, out_bias=bool(hf["attention_out_bias"]))


def _seed_oss_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "post_attention_norm")
    yield from mlp(c)


SEED_OSS = Family(
    _seed_oss,
    _seed_oss_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=524288,
        attention_bias=True,
        attention_out_bias=False,
        pad_token_id=1,
    ),
)


def _ernie(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf["use_bias"])
    return common(hf, interleaved=True, qkv_bias=bias, out_bias=bias, mlp_bias=bias)


ERNIE4_5 = Family(
    _ernie,
    pre_norm_layer,
    dict(
        num_key_value_heads=2,
        head_dim=128,
        hidden_act="silu",
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_bias=False,
        rope_theta=5e5,
        pad_token_id=0,
    ),
)


def _helium(hf: dict[str, Any]) -> ModelConfig:
    return llama_config(hf, interleaved=True, norm="rms_float32", out_bias=False)


HELIUM = Family(
    _helium,
    pre_norm_layer,
    DEFAULTS
    | dict(num_key_value_heads=20, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-8, rope_theta=1e5, pad_token_id=3),
)


# ---- Granite: multipliers ----


def granite_config(hf: dict[str, Any], **changes) -> ModelConfig:
    """Its four multipliers; the same for Granite's mixtures."""
    return llama_config(
        hf,
        attention_scale=float(hf["attention_multiplier"]),
        embedding_multiplier=float(hf["embedding_multiplier"]),
        residual_multiplier=float(hf["residual_multiplier"]),
        logits_scaling=float(hf["logits_scaling"]),
        **changes,
    )


MULTIPLIERS = dict(attention_multiplier=1.0, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
GRANITE = Family(granite_config, pre_norm_layer, DEFAULTS | MULTIPLIERS)


# ---- HyperCLOVA X SEED: Granite with norms after its parts too, and a multiplier of logits that multiplies ----


def _hyperclovax(hf: dict[str, Any]) -> ModelConfig:
    scale = hf["attention_multiplier"]
    scale = (hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]) ** -0.5 if scale is None else scale
    hf = hf | dict(attention_multiplier=scale, logits_scaling=1 / hf["logits_scaling"])
    return granite_config(hf, post_norm=bool(hf["use_post_norm"]))


def _hyperclovax_layer(c: ModelConfig, layer: int) -> Rows:
    yield from pre_norm_layer(c, layer)
    if c.post_norm:
        yield from norm(c, "attn_post_norm", "post_norm1", "post_attention_norm")
        yield from norm(c, "mlp_post_norm", "post_norm2", "post_ffw_norm")


HYPERCLOVAX = Family(
    _hyperclovax, _hyperclovax_layer, DEFAULTS | MULTIPLIERS | dict(attention_multiplier=None, use_post_norm=True)
)


# ---- Phi-3, Phi-3.5, Phi-4, Phi-4-mini: fused projections, part of a head turns, longrope ----


def _phi3(hf: dict[str, Any]) -> ModelConfig:
    scaling = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ModelError(f"rope_type {kind!r} is not supported for phi3; supported are default, longrope")
    key = "original_max_position_embeddings"
    outside, inside = hf.get(key) or (None if kind == "su" else 4096), scaling.get(key)
    if kind != "default" and outside and inside and outside != inside:
        raise ModelError(f"{key} is {outside} in config.json and {inside} in its rope_scaling; write the same in both places")
    if kind in ("su", "yarn"):  # longrope's name when Phi-3 was released
        kind = "longrope"
    hf = hf | {"rope_scaling": scaling | {"rope_type": kind}, key: outside or inside or 4096}
    return common(hf, partial=True, layer_windows=one_window(hf))


def _phi3_layer(c: ModelConfig, layer: int) -> Rows:
    q, kv, width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from linear("qkv", q + 2 * kv, width, ("heads", "embed"), "self_attn.qkv_proj", "attn_qkv")
    yield from linear("o", width, q, ("embed", "heads"), "self_attn.o_proj", "attn_output")
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from fused_mlp(c)


PHI3 = Family(
    _phi3, _phi3_layer, DEFAULTS | dict(max_position_embeddings=4096, rms_norm_eps=1e-5, sliding_window=None, pad_token_id=32000)
)

"""LFM2 and LFM3 (Liquid AI): layers of short gated convolutions (model/convolution.py) between layers of attention; LFM2 also with experts.
"""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.kinds import check_layer_types, whole_rope
from jaxtune.model.families.moe import experts, moe_of
from jaxtune.model.families.parts import Rows, attention, linear, norm, query_key_norms
from jaxtune.model.families.recurrent import ShortConvolution
from jaxtune.model.row import Row

CONV, FULL, SLIDING = "conv", "full_attention", "sliding_attention"
ROPES = {  # LFM3's
    FULL: dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=1e6),
    SLIDING: dict(rope_type="default", rope_theta=1e4),
}


def _with_convolutions(hf: dict[str, Any], kinds: list[str], attending: tuple[str, ...] = (FULL,), **changes) -> ModelConfig:
    """Shared by all; `attending`: the kinds of layers of attention. In files on the hub, `tie_word_embeddings` is named `tie_embedding`."""
    check_layer_types(hf, kinds, CONV, *attending)
    if set(kinds) == {CONV}:
        raise ModelError(f"layer_types: a model without a {FULL} layer is not implemented for {hf['model_type']}")
    own = ShortConvolution(hf["hidden_size"], hf["conv_L_cache"], tuple(i for i, kind in enumerate(kinds) if kind == CONV))
    tied = hf.get("tie_embedding", hf["tie_word_embeddings"])
    return common(
        hf | dict(tie_word_embeddings=tied), norm_eps=hf["norm_eps"], hidden_act="silu", convolution=own if own.layers else None, **changes
    )


def _attends(c: ModelConfig, layer: int) -> bool:
    return c.convolution is None or layer not in c.convolution.layers


def _convolves(c: ModelConfig) -> Rows:
    """A projection to gate, gate and input, the convolution `[D, 1, W]`, and the output projection."""
    assert c.convolution is not None
    width = c.hidden_size
    yield from linear("in_bcu", 3 * width, width, ("heads", "embed"), "conv.in_proj", "shortconv.in_proj")
    shape, axes = (width, 1, c.convolution.kernel), ("heads", None, None)
    yield "conv", Row(shape, axes, "normal", "conv.conv.weight", "shortconv.conv.weight")
    yield from linear("out", width, width, ("embed", "heads"), "conv.out_proj", "shortconv.out_proj")


def _mixer(c: ModelConfig, layer: int) -> Rows:
    """The first half of a layer of LFM2."""
    yield from norm(c, "attn_norm", "operator_norm", "attn_norm")
    if _attends(c, layer):
        yield from attention(c, "out_proj")
        yield from query_key_norms(c, c.head_dim, c.head_dim, "q_layernorm", "k_layernorm")
    else:
        yield from _convolves(c)
    yield from norm(c, "mlp_norm", "ffn_norm", "ffn_norm")


def _dense(c: ModelConfig) -> Rows:
    inner, width = c.intermediate_size, c.hidden_size
    yield from linear("gate", inner, width, ("mlp", "embed"), "feed_forward.w1", "ffn_gate")
    yield from linear("up", inner, width, ("mlp", "embed"), "feed_forward.w3", "ffn_up")
    yield from linear("down", width, inner, ("embed", "mlp"), "feed_forward.w2", "ffn_down")


# ---- dense ----


def _lfm2(hf: dict[str, Any]) -> ModelConfig:
    layers = range(hf["num_hidden_layers"])
    attending = layers if hf["full_attn_idxs"] is None else hf["full_attn_idxs"]
    kinds = hf["layer_types"] or [FULL if layer in attending else CONV for layer in layers]
    inner = hf.get("block_ff_dim") or hf["intermediate_size"]
    if hf["block_auto_adjust_ff_dim"]:
        inner, step = int(2 * inner / 3), hf["block_multiple_of"]
        if (times := hf["block_ffn_dim_multiplier"]) is not None:
            inner = -(-int(times * inner) // step) * step
    if inner < 1:
        raise ModelError(f"intermediate_size is {inner} in this lfm2 model by its block_ff_dim and block_ffn_dim_multiplier; write more")
    return _with_convolutions(hf, kinds, intermediate_size=inner)


def _lfm2_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _mixer(c, layer)
    yield from _dense(c)


_COMMON = dict(
    num_key_value_heads=8,
    max_position_embeddings=128000,
    norm_eps=1e-5,
    rope_theta=1e6,
    tie_word_embeddings=True,
    conv_L_cache=3,
    conv_bias=False,
    layer_types=None,
    pad_token_id=0,
)
_ENDS = {"embed": "model.embed_tokens", "norm": "model.embedding_norm", "head": "lm_head"}
LFM2 = Family(
    _lfm2,
    _lfm2_layer,
    _COMMON
    | dict(
        intermediate_size=12288,
        full_attn_idxs=None,
        block_auto_adjust_ff_dim=True,
        block_multiple_of=256,
        block_ffn_dim_multiplier=1.0,
    ),
    {"conv_bias": (False,)},
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    ends=_ENDS,
)


# ---- LFM3: windows, a gate for each head's result, norms on both sides ----


def _lfm3(hf: dict[str, Any]) -> ModelConfig:
    layers = range(hf["num_hidden_layers"])
    kinds = hf["layer_types"] or [FULL if layer % 4 == 2 else SLIDING if layer and layer % 4 == 0 else CONV for layer in layers]
    said = hf["rope_parameters"] or ROPES
    if missing := [kind for kind in (FULL, SLIDING) if kind in kinds and not isinstance(said.get(kind), Mapping)]:
        raise ModelError(f"rope_parameters of this lfm3 model holds no object for {missing[0]}; its layers need one")
    own = {kind: {**hf, "rope_scaling": said.get(kind, ROPES[kind]), "rope_parameters": None} for kind in ROPES}
    if SLIDING in kinds and not hf["sliding_window"]:
        raise ModelError(f"layer_types has {SLIDING} but sliding_window is {hf['sliding_window']!r}, not a number of tokens")
    bias = bool(hf["attention_bias"])
    return _with_convolutions(
        hf,
        kinds,
        (FULL, SLIDING),
        ropes=tuple(whole_rope(own[kind], hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]) for kind in ROPES),
        layer_ropes=tuple(1 if kind == SLIDING else 0 for kind in kinds),
        layer_windows=tuple(hf["sliding_window"] if kind == SLIDING else 0 for kind in kinds),
        qkv_bias=bias,
        out_bias=bias,
        post_norm=bool(hf["use_sandwich_norm"]),
        head_gate=bool(hf["use_attention_gate"]),
    )


def _lfm3_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "operator_norm", "attn_norm")
    if _attends(c, layer):
        yield from attention(c)
        yield from query_key_norms(c, c.head_dim, c.head_dim)
        if c.head_gate:
            yield from linear("attn_gate", c.num_heads, c.hidden_size, ("heads", "embed"), "self_attn.gate_proj", "attn_gate")
    else:
        yield from _convolves(c)
    if c.post_norm:
        yield from norm(c, "attn_post_norm", "post_operator_norm", "post_attention_norm")
    yield from norm(c, "mlp_norm", "ffn_norm", "ffn_norm")
    yield from _dense(c)
    if c.post_norm:
        yield from norm(c, "mlp_post_norm", "post_ffn_norm", "post_ffw_norm")


LFM3 = Family(
    _lfm3,
    _lfm3_layer,
    _COMMON
    | dict(
        intermediate_size=7680,
        head_dim=128,
        num_key_value_heads=4,
        conv_L_cache=7,
        sliding_window=256,
        use_sandwich_norm=True,
        use_attention_gate=True,
        attention_bias=False,
        rope_parameters=None,
        pad_token_id=124893,
    ),
    {"conv_bias": (False,)},
    ends=_ENDS,
)


# ---- with experts in all layers but the first few ----


def _lfm2_moe(hf: dict[str, Any]) -> ModelConfig:
    if hf["layer_types"] is None:
        raise ModelError("config.json of this lfm2_moe model lacks layer_types; transformers has no default for it")
    layers, inner = list(range(max(0, hf["num_dense_layers"]), hf["num_hidden_layers"])), hf["moe_intermediate_size"]
    more: dict[str, Any] = dict(aux_loss_coef=None, sigmoid=True, scale=float(hf["routed_scaling_factor"]), epsilon=1e-6)
    return _with_convolutions(hf, hf["layer_types"], moe=moe_of(hf, hf["num_experts"], inner, layers, bool(hf["norm_topk_prob"]), **more))


def _lfm2_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from _mixer(c, layer)
    if c.moe is None or layer not in c.moe.layers:
        yield from _dense(c)
        return
    expert = "feed_forward.experts.{expert}"
    yield from experts(c, "feed_forward.gate", f"{expert}.w1", f"{expert}.w3", f"{expert}.w2")
    name = "feed_forward.expert_bias"
    yield "router_correction", Row((c.moe.num_experts,), ("experts",), "zeros", name, "exp_probs_b.bias", float32=True)


LFM2_MOE = Family(
    _lfm2_moe,
    _lfm2_moe_layer,
    _COMMON
    | dict(
        moe_intermediate_size=1792,
        num_dense_layers=2,
        num_experts=32,
        num_experts_per_tok=4,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    ),
    {"conv_bias": (False,), "use_expert_bias": (True,)},
    ends=_ENDS,
    moe=("feed_forward.gate", "feed_forward.experts"),
)

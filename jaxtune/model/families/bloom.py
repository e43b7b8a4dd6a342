"""BLOOM and MPT: no positions but ALiBi, q, k and v in one matrix; LayerNorms (BLOOM: another one after the embedding)."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.factors import Alibi
from jaxtune.model.families.parts import Rows, linear, norm, plain_mlp


def _size(hf: dict[str, Any], *names: str) -> int:
    """A size under the first of its names that config.json has; ModelError if it is no positive whole number."""
    name = next((name for name in names if hf.get(name) is not None), names[0])
    if type(hf.get(name)) is not int or hf[name] < 1:
        raise ModelError(f"this {hf['model_type']} model has {name}={hf.get(name)!r}; it needs a positive whole number there")
    return hf[name]


def _without_positions(hf: dict[str, Any], width: int, layers: int, heads: int, **changes) -> ModelConfig:
    if width % heads:
        raise ModelError(f"the width {width} of this {hf['model_type']} model is not a multiple of its {heads} heads")
    named = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
    named |= dict(head_dim=None, num_key_value_heads=None)
    return common(hf | named, norm_eps=hf["layer_norm_epsilon"], ropes=(), layer_ropes=(-1,) * layers, **changes)


# ---- BLOOM ----


def slopes(heads: int) -> tuple[float, ...]:
    """`2^(-8 i / n)` for the first n heads, n the largest power of two; then every other one of those for 2 n heads."""
    n = 2 ** math.floor(math.log2(heads))
    return tuple(2.0 ** (-8 * i / n) for i in range(1, n + 1)) + tuple(2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n) + 1, 2))


def _bloom(hf: dict[str, Any]) -> ModelConfig:
    width, layers = _size(hf, "n_embed", "hidden_size"), _size(hf, "n_layer", "num_hidden_layers")
    heads = _size(hf, "n_head", "num_attention_heads")
    return _without_positions(
        hf | dict(max_position_embeddings=hf["seq_length"]),
        width,
        layers,
        heads,
        norm="layer",
        hidden_act="gelu_new",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        alibi=Alibi(slopes(heads)),
    )


def _bloom_layer(c: ModelConfig, layer: int) -> Rows:
    width = c.hidden_size
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from linear("qkv_by_head", 3 * width, width, ("heads", "embed"), "self_attention.query_key_value", "attn_qkv", bias=True)
    yield from linear("o", width, width, ("embed", "heads"), "self_attention.dense", "attn_output", bias=True)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from plain_mlp(c, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


BLOOM = Family(
    _bloom,
    _bloom_layer,
    dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, seq_length=2048),
    refused={"apply_residual_connection_post_layernorm": (None, False)},
    required=("vocab_size",),
    prefix="transformer.h.{layer}.",
    ends={"embed": "transformer.word_embeddings", "norm": "transformer.ln_f", "head": "lm_head"},
    pads=False,
    extra_rows=lambda c: norm(c, "embed_norm", "transformer.word_embeddings_layernorm", "token_embd_norm"),
)


# ---- MPT: no biases, also of norms; other slopes if the number of heads is no power of two ----


def _mpt_slopes(heads: int) -> tuple[float, ...]:
    n = 2 ** math.ceil(math.log2(heads))
    all_n = tuple(2.0 ** (-8 * i / n) for i in range(1, n + 1))
    return all_n if n == heads else (*all_n[1::2], *all_n[::2])[:heads]


def _number(attention: dict[str, Any], name: str) -> float | None:
    value = attention.get(name)
    if value is not None and (type(value) not in (int, float) or not value > 0):
        raise ModelError(f"attn_config of this mpt model has {name}={value!r}; it needs a number above 0")
    return value


def _mpt(hf: dict[str, Any]) -> ModelConfig:
    width, layers = _size(hf, "d_model", "hidden_size"), _size(hf, "n_layers", "num_hidden_layers")
    heads, attention = _size(hf, "n_heads", "num_attention_heads"), hf["attn_config"] or {}
    if not isinstance(attention, dict):
        raise ModelError(f"this mpt model has attn_config={attention!r}; it needs an object there")
    scale = _number(attention, "softmax_scale")
    return _without_positions(
        hf | dict(max_position_embeddings=hf["max_seq_len"]),
        width,
        layers,
        heads,
        norm="layer_unbiased",
        hidden_act="gelu",
        qkv_clip=float(_number(attention, "clip_qkv") or 0.0),
        alibi=Alibi(_mpt_slopes(heads)),
        **({} if scale is None else dict(attention_scale=float(scale))),
    )


def _mpt_layer(c: ModelConfig, layer: int) -> Rows:
    width = c.hidden_size
    yield from norm(c, "attn_norm", "norm_1", "attn_norm")
    yield from linear("qkv", 3 * width, width, ("heads", "embed"), "attn.Wqkv", "attn_qkv")
    yield from linear("o", width, width, ("embed", "heads"), "attn.out_proj", "attn_output")
    yield from norm(c, "mlp_norm", "norm_2", "ffn_norm")
    yield from plain_mlp(c, "ffn.up_proj", "ffn.down_proj")


MPT = Family(
    _mpt,
    _mpt_layer,
    dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, max_seq_len=2048, attn_config=None),
    required=("vocab_size",),
    prefix="transformer.blocks.{layer}.",
    ends={"embed": "transformer.wte", "norm": "transformer.norm_f", "head": "lm_head"},
    pads=False,
)

"""Falcon: LayerNorms, rotary positions or ALiBi, attention and feed-forward in parallel, q, k and v in one matrix."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.bloom import slopes
from jaxtune.model.families.factors import Alibi
from jaxtune.model.families.parts import Rows, linear, norm, plain_mlp


def _falcon(hf: dict[str, Any]) -> ModelConfig:
    new, side_by_side = bool(hf["new_decoder_architecture"]), bool(hf["parallel_attn"])
    norms, heads = hf["num_ln_in_parallel_attn"] or (2 if new else 1), hf["num_attention_heads"]
    if new and not side_by_side or norms not in ((1, 2) if new else (1,)):
        said = f"new_decoder_architecture={new}, parallel_attn={side_by_side} and num_ln_in_parallel_attn={norms}"
        raise ModelError(f"config.json has {said}, which no Falcon model has; look at it again")
    named = dict(
        head_dim=None,
        intermediate_size=hf["ffn_hidden_size"] or 4 * hf["hidden_size"],
        num_key_value_heads=hf["num_kv_heads"] or heads if new else 1 if hf["multi_query"] else heads,
    )
    bias, positions = bool(hf["bias"]), {}
    if hf["alibi"]:
        alibi = Alibi(slopes(heads), (hf["hidden_size"] // heads) ** -0.5, rounded=True)
        positions = dict(alibi=alibi, ropes=(), layer_ropes=(-1,) * hf["num_hidden_layers"])
    return common(
        hf | named,
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        hidden_act=hf["activation"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        parallel_residual=side_by_side,
        shared_norm=side_by_side and norms == 1,
        **positions,
    )


def _falcon_layer(c: ModelConfig, layer: int) -> Rows:
    width, joint = c.hidden_size, c.hidden_size + 2 * c.num_kv_heads * c.head_dim
    two = c.parallel_residual and not c.shared_norm
    yield from norm(c, "attn_norm", "ln_attn" if two else "input_layernorm", "attn_norm_2" if two else "attn_norm")
    yield from linear("qkv_by_head", joint, width, ("heads", "embed"), "self_attention.query_key_value", "attn_qkv", c.qkv_bias)
    yield from linear("o", width, width, ("embed", "heads"), "self_attention.dense", "attn_output", c.out_bias)
    if not c.shared_norm:
        yield from norm(c, "mlp_norm", "ln_mlp" if two else "post_attention_layernorm", "attn_norm" if two else "ffn_norm")
    yield from plain_mlp(c, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


FALCON = Family(
    _falcon,
    _falcon_layer,
    dict(
        num_kv_heads=None,
        num_ln_in_parallel_attn=None,
        layer_norm_epsilon=1e-5,
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        max_position_embeddings=2048,
        ffn_hidden_size=None,
        activation="gelu",
        tie_word_embeddings=True,
        alibi=False,
    ),
    required=("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    prefix="transformer.h.{layer}.",
    ends={"embed": "transformer.word_embeddings", "norm": "transformer.ln_f", "head": "lm_head"},
    pads=False,
)

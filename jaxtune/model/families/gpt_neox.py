"""GPT-NeoX and Pythia: LayerNorms, q, k and v in one matrix head by head, partly rotated heads, attention and feed-forward in parallel."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.parts import Rows, linear, norm


def _gpt_neox(hf: dict[str, Any]) -> ModelConfig:
    named = hf | dict(rope_theta=hf["rotary_emb_base"], partial_rotary_factor=hf["rotary_pct"], head_dim=None, num_key_value_heads=None)
    bias = bool(hf["attention_bias"])
    return common(
        named,
        norm="layer",
        norm_eps=hf["layer_norm_eps"],
        partial=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        parallel_residual=bool(hf["use_parallel_residual"]),
    )


def _gpt_neox_layer(c: ModelConfig, layer: int) -> Rows:
    width, inner = c.hidden_size, c.intermediate_size
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from linear("qkv_by_head", 3 * width, width, ("heads", "embed"), "attention.query_key_value", "attn_qkv", c.qkv_bias)
    yield from linear("o", width, width, ("embed", "heads"), "attention.dense", "attn_output", c.out_bias)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from linear("up", inner, width, ("mlp", "embed"), "mlp.dense_h_to_4h", "ffn_up", c.mlp_bias)
    yield from linear("down", width, inner, ("embed", "mlp"), "mlp.dense_4h_to_h", "ffn_down", c.mlp_bias)


GPT_NEOX = Family(
    _gpt_neox,
    _gpt_neox_layer,
    dict(
        hidden_act="gelu",
        max_position_embeddings=2048,
        layer_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_parallel_residual=True,
        rotary_emb_base=10000.0,
        rotary_pct=0.25,
        attention_bias=True,
    ),
    prefix="gpt_neox.layers.{layer}.",
    ends={"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    pads=False,
)

"""GPT-2: LayerNorms, learned positions, q, k and v in one matrix, a plain feed-forward; its files hold matrices as `[in, out]`."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.parts import Rows, linear, norm


def _gpt2(hf: dict[str, Any]) -> ModelConfig:
    width, heads = hf["n_embd"], hf["n_head"]
    named = hf | dict(
        hidden_size=width,
        intermediate_size=hf["n_inner"] or 4 * width,
        num_hidden_layers=hf["n_layer"],
        num_attention_heads=heads,
        max_position_embeddings=hf["n_positions"],
        head_dim=None,
        num_key_value_heads=None,
    )
    return common(
        named,
        norm="layer",
        norm_eps=hf["layer_norm_epsilon"],
        hidden_act=hf["activation_function"],
        attention_scale=(width // heads) ** -0.5 if hf["scale_attn_weights"] else 1.0,
        ropes=(),
        layer_ropes=(-1,) * hf["n_layer"],
    )


def _gpt2_layer(c: ModelConfig, layer: int) -> Rows:
    width, inner, conv1d = c.hidden_size, c.intermediate_size, dict(bias=True, transposed=True)
    yield from norm(c, "attn_norm", "ln_1", "attn_norm")
    yield from linear("qkv", 3 * width, width, ("heads", "embed"), "attn.c_attn", "attn_qkv", **conv1d)
    yield from linear("o", width, width, ("embed", "heads"), "attn.c_proj", "attn_output", **conv1d)
    yield from norm(c, "mlp_norm", "ln_2", "ffn_norm")
    yield from linear("up", inner, width, ("mlp", "embed"), "mlp.c_fc", "ffn_up", **conv1d)
    yield from linear("down", width, inner, ("embed", "mlp"), "mlp.c_proj", "ffn_down", **conv1d)


GPT2 = Family(
    _gpt2,
    _gpt2_layer,
    dict(
        n_positions=1024,
        n_inner=None,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        tie_word_embeddings=True,
    ),
    refused={"scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False)},
    required=("vocab_size", "n_embd", "n_layer", "n_head"),
    prefix="transformer.h.{layer}.",
    ends={"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    pads=False,
)

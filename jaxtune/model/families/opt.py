"""OPT, except the 350M model: learned positions that begin at row 2, LayerNorms before each part, biases everywhere."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.parts import Rows, attention, norm, plain_mlp


def _opt(hf: dict[str, Any]) -> ModelConfig:
    width = hf["hidden_size"]
    if hf["word_embed_proj_dim"] not in (None, width):
        raise ModelError(f"word_embed_proj_dim={hf['word_embed_proj_dim']} is not implemented for opt; only hidden_size={width} is")
    bias = bool(hf["enable_bias"])
    return common(
        hf | dict(intermediate_size=hf["ffn_dim"], head_dim=None, num_key_value_heads=None),
        norm="layer",
        norm_eps=1e-5,
        hidden_act=hf["activation_function"],
        ropes=(),
        layer_ropes=(-1,) * hf["num_hidden_layers"],
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        initializer_range=hf["init_std"],
    )


def _opt_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "self_attn_layer_norm", "attn_norm")
    yield from attention(c, "out_proj")
    yield from norm(c, "mlp_norm", "final_layer_norm", "ffn_norm")
    yield from plain_mlp(c, "fc1", "fc2")


OPT = Family(
    _opt,
    _opt_layer,
    dict(
        max_position_embeddings=2048,
        word_embed_proj_dim=None,
        activation_function="relu",
        init_std=0.02,
        enable_bias=True,
        tie_word_embeddings=True,
        pad_token_id=1,
    ),
    refused={
        "do_layer_norm_before": (None, True),
        "_remove_final_layer_norm": (None, False),
        "layer_norm_elementwise_affine": (None, True),
    },
    required=("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads"),
    prefix="model.decoder.layers.{layer}.",
    ends={
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
)

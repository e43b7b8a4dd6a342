"""Bamba: layers of Mamba-2 between attention layers, half of a head turns; and Mamba-2 alone (Codestral Mamba)."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.mamba import mamba_of, mamba_rows
from jaxtune.model.families.parts import Rows, attention, mlp, norm
from jaxtune.model.rope import Rope


def _bamba(hf: dict[str, Any]) -> ModelConfig:
    layers, full = range(hf["num_hidden_layers"]), hf["attn_layer_indices"] or []
    if not all(type(layer) is int and layer in layers for layer in full):
        raise ModelError(f"attn_layer_indices={full!r} of this bamba model are not numbers of its {len(layers)} layers")
    size, linear = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"], tuple(i for i in layers if i not in full)
    return llama_config(
        hf,
        ropes=(Rope.from_hf(hf | dict(partial_rotary_factor=0.5), size),),  # whatever config.json says, in transformers too
        mamba=mamba_of(hf, linear, int(hf["mamba_expand"] * hf["hidden_size"]), hf["hidden_act"]) if linear else None,
    )


def _bamba_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from mamba_rows(c, c.mamba) if c.mamba and layer in c.mamba.layers else attention(c)
    yield from norm(c, "mlp_norm", "pre_ff_layernorm", "ffn_norm")
    yield from mlp(c, hf="feed_forward")


BAMBA = Family(
    _bamba,
    _bamba_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        max_position_embeddings=262144,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        attn_layer_indices=None,
        mamba_n_heads=128,
        mamba_d_head=None,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        time_step_limit=[0.0, math.inf],
        z_loss_coefficient=0.0,
    ),
    {"mamba_proj_bias": (False,), "z_loss_coefficient": (None, 0.0)},
    ends={"embed": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
)


# ---- Mamba-2: nothing else in a layer ----


def _mamba2(hf: dict[str, Any]) -> ModelConfig:
    heads, size, layers = hf["num_heads"], hf["head_dim"], tuple(range(hf["num_hidden_layers"]))
    keys = dict(mamba_n_heads=heads, mamba_d_head=size, mamba_n_groups=hf["n_groups"], mamba_d_state=hf["state_size"])
    keys |= dict(mamba_d_conv=hf["conv_kernel"], mamba_conv_bias=hf["use_conv_bias"])
    mamba = mamba_of(hf | keys, layers, int(hf["expand"] * hf["hidden_size"]), hf["hidden_act"])
    named = hf | dict(num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=mamba.width)
    return llama_config(named, norm_eps=hf["layer_norm_epsilon"], ropes=(), layer_ropes=(-1,) * len(layers), mamba=mamba)


def _mamba2_layer(c: ModelConfig, layer: int) -> Rows:
    assert c.mamba is not None
    yield from norm(c, "attn_norm", "norm", "attn_norm")
    yield from mamba_rows(c, c.mamba, "mixer")


MAMBA2 = Family(
    _mamba2,
    _mamba2_layer,
    dict(
        max_position_embeddings=1048576,  # there is no limit
        attention_bias=False,
        mlp_bias=False,
        num_heads=128,
        head_dim=64,
        state_size=128,
        layer_norm_epsilon=1e-5,
        initializer_range=0.1,
        expand=2,
        conv_kernel=4,
        n_groups=8,
        use_bias=False,
        use_conv_bias=True,
        hidden_act="silu",
        time_step_limit=[0.0, math.inf],
        tie_word_embeddings=False,
    ),
    {"use_bias": (False,)},
    required=("vocab_size", "hidden_size", "num_hidden_layers"),
    prefix="backbone.layers.{layer}.",
    ends={"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"},
    pads=False,
)

"""Falcon H1: attention and Mamba-2 in parallel in every layer, and multipliers of the inputs and outputs of their matrices."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.factors import Multipliers
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.mamba import mamba_of, mamba_rows
from jaxtune.model.families.parts import Rows, attention, mlp, norm


def _numbers(hf: dict[str, Any], key: str, count: int) -> tuple[float, ...]:
    """A list of that many multipliers."""
    given = [1.0] * count if hf[key] is None else hf[key]
    if len(given) != count or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in given):
        raise ModelError(f"{key}={given!r} of this falcon_h1 model has to be {count} numbers")
    return tuple(map(float, given))


def _falcon_h1(hf: dict[str, Any]) -> ModelConfig:
    layers = tuple(range(hf["num_hidden_layers"]))
    width = int(hf["mamba_expand"] * hf["hidden_size"]) if hf["mamba_d_ssm"] is None else hf["mamba_d_ssm"]
    place = ("before" if hf["mamba_norm_before_gate"] else "after") if hf["mamba_rms_norm"] else ""
    gate, down = _numbers(hf, "mlp_multipliers", 2)
    return llama_config(
        hf,
        mamba=mamba_of(hf, layers, width, hf["hidden_act"], norm=place, out_bias=bool(hf["projectors_bias"]), parallel_attention=True),
        embedding_multiplier=float(hf["embedding_multiplier"]),
        logits_scaling=1 / hf["lm_head_multiplier"],
        multipliers=Multipliers(
            float(hf["attention_in_multiplier"]),
            float(hf["attention_out_multiplier"]),
            float(hf["key_multiplier"]),
            float(hf["ssm_in_multiplier"]),
            _numbers(hf, "ssm_multipliers", 5),
            float(hf["ssm_out_multiplier"]),
            gate,
            down,
        ),
    )


def _layer(c: ModelConfig, layer: int) -> Rows:
    assert c.mamba is not None
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from mamba_rows(c, c.mamba)
    for name, row in norm(c, "mlp_norm", "pre_ff_layernorm", "ffn_norm"):
        yield name, row._replace(gguf="ffn_norm")  # so in llama.cpp's files, without a .weight
    yield from mlp(c, hf="feed_forward")


FALCON_H1 = Family(
    _falcon_h1,
    _layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        mamba_d_ssm=1024,
        mamba_n_heads=128,
        mamba_d_head=None,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        mamba_norm_before_gate=True,
        mamba_rms_norm=False,
        time_step_limit=[0.0, float("inf")],
        projectors_bias=False,
        **dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_in_multiplier"), 1.0),
        **dict.fromkeys(("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
        mlp_multipliers=None,
        ssm_multipliers=None,
    ),
    {"mamba_proj_bias": (False,)},
    ends={"embed": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
)

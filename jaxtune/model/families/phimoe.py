"""Mixtral's kin: Phi 3.5 MoE, with LayerNorms and a router of near ties; MiniMax M2, with sigmoids and norms of queries and keys."""

import dataclasses
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig, common
from jaxtune.model.families.kinds import one_window
from jaxtune.model.families.moe import MIXTRAL, mixtral_experts, moe_of
from jaxtune.model.families.parts import Rows, attention, norm, query_key_norms
from jaxtune.model.row import Row

# ---- Phi 3.5 MoE ----


def _phimoe(hf: dict[str, Any]) -> ModelConfig:
    number, bias = hf.get("num_experts") or hf["num_local_experts"], bool(hf["attention_bias"])
    near = float(hf["router_jitter_noise"])
    moe = moe_of(hf, number, hf["intermediate_size"], list(range(hf["num_hidden_layers"])), normalize=False, near=near)
    if hf["num_experts_per_tok"] != 2 or number < 2:
        raise ModelError(f"num_experts_per_tok={hf['num_experts_per_tok']} of {number} is not implemented for phimoe; transformers takes 2")
    config = common(
        hf, norm="layer", qkv_bias=bias, out_bias=bias, head_bias=bool(hf["lm_head_bias"]), layer_windows=one_window(hf), moe=moe
    )
    said, (rope,) = hf.get("rope_scaling") or hf.get("rope_parameters") or {}, config.ropes
    if rope.kind == "default":
        return config
    short, long = said.get("short_mscale"), said.get("long_mscale")
    if rope.kind != "longrope" or short != long or not isinstance(short, int | float):
        raise ModelError(
            f"rope_type={rope.kind!r} with short_mscale={short!r} and long_mscale={long!r} is not implemented for phimoe; only longrope "
            "with the same number for both is"
        )
    return dataclasses.replace(config, ropes=(dataclasses.replace(rope, attention_factor=float(short)),))


PHIMOE = MIXTRAL._replace(
    config=_phimoe,
    defaults=MIXTRAL.defaults
    | dict(num_local_experts=16, router_jitter_noise=0.01, input_jitter_noise=0.0, attention_bias=False, lm_head_bias=False),
    refused={"input_jitter_noise": (None, 0.0)},
    moe=("mlp.router", "mlp.experts"),
)


# ---- MiniMax M2 ----


def _minimax_m2(hf: dict[str, Any]) -> ModelConfig:
    if (turning := hf.get("rotary_dim")) is not None:  # what files on the hub say
        size = hf["head_dim"] or max(1, hf["hidden_size"] // hf["num_attention_heads"])
        hf = {"partial_rotary_factor": turning / size} | hf
    number = hf.get("num_experts") or hf["num_local_experts"]
    moe = moe_of(hf, number, hf["intermediate_size"], list(range(hf["num_hidden_layers"])), normalize=True, sigmoid=True)
    return common(hf, partial=True, moe=moe)


def _minimax_m2_layer(c: ModelConfig, layer: int) -> Rows:
    assert c.moe is not None
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from mixtral_experts(c)
    name = "block_sparse_moe.e_score_correction_bias"
    yield "router_correction", Row((c.moe.num_experts,), ("experts",), "zeros", name, "exp_probs_b.bias", float32=True)


MINIMAX_M2 = MIXTRAL._replace(
    config=_minimax_m2,
    layer=_minimax_m2_layer,
    defaults={key: value for key, value in MIXTRAL.defaults.items() if key != "sliding_window"}
    | dict(
        head_dim=128,
        max_position_embeddings=196608,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        num_local_experts=256,
        num_experts_per_tok=8,
    ),
    ignored=r"model\.layers\.{layers}\..*|.*\.mtp\..*",
)

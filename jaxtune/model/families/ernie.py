"""ERNIE 4.5's mixtures: neighbouring dimensions rotate together, experts chosen by corrected probabilities, with shared ones."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.llama import DEFAULTS
from jaxtune.model.families.moe import moe_of, qwen_experts
from jaxtune.model.families.parts import Rows, attention, mlp, norm, shared_expert
from jaxtune.model.row import Row


def _ernie4_5_moe(hf: dict[str, Any]) -> ModelConfig:
    number, chosen = hf.get("num_experts") or hf["moe_num_experts"], hf.get("num_experts_per_tok") or hf["moe_k"]
    first, last, step = hf["moe_layer_start_index"], hf["moe_layer_end_index"], hf["moe_layer_interval"]
    last = hf["num_hidden_layers"] - 1 if last == -1 else last
    layers = [layer for layer in range(hf["num_hidden_layers"]) if (layer + 1) % step == 0 and first <= layer <= last]
    inner = hf["moe_intermediate_size"]
    shared = inner * hf["moe_num_shared_experts"]
    hf = hf | {"num_experts_per_tok": chosen}
    moe = moe_of(hf, number, inner, layers, normalize=True, shared_intermediate_size=shared, float32=True)
    return common(hf, interleaved=True, moe=moe)


def _ernie4_5_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c)
        return
    yield from qwen_experts(c)
    name = "mlp.moe_statics.e_score_correction_bias"
    yield "router_correction", Row((1, c.moe.num_experts), (None, "experts"), "zeros", name, "exp_probs_b.bias", float32=True)
    if c.moe.shared_intermediate_size:
        yield from shared_expert(c, "mlp.shared_experts")


ERNIE4_5_MOE = Family(
    _ernie4_5_moe,
    _ernie4_5_moe_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        moe_intermediate_size=1536,
        moe_k=6,
        moe_num_experts=64,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_layer_interval=1,
        router_aux_loss_coef=0.001,
        pad_token_id=0,
    ),
    {"use_bias": (None, False), "moe_norm_min": (None, 1e-12)},
    ignored=r".*\bmtp.*",
)

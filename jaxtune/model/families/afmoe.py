"""Arcee's Trinity (AFMoE): norms on both sides, attention whose result is gated, positions in layers with a window alone, experts by
sigmoids beside shared ones."""

from typing import Any

from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.deepseek import experts_of
from jaxtune.model.families.kinds import windows_by_period
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.moe import experts
from jaxtune.model.families.parts import Rows, attention, linear, mlp, norm, query_key_norms, shared_expert
from jaxtune.model.row import Row


def _afmoe(hf: dict[str, Any]) -> ModelConfig:
    found = windows_by_period(hf, hf["global_attn_every_n_layers"])
    named = hf | dict(n_shared_experts=hf["num_shared_experts"], routed_scaling_factor=hf["route_scale"], n_group=1, topk_group=1)
    layers = list(range(hf["num_dense_layers"], hf["num_hidden_layers"]))
    return llama_config(
        hf,
        norm="rms_float32",
        mlp_bias=False,
        layer_windows=found,
        layer_ropes=tuple(0 if window else -1 for window in found),
        embedding_multiplier=hf["hidden_size"] ** 0.5 if hf["mup_enabled"] else 1.0,
        moe=experts_of(named, layers, normalize=True, sigmoid=True, epsilon=1e-20, float32=False),
    )


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from linear("attn_gate", c.num_heads * c.head_dim, c.hidden_size, ("heads", "embed"), "self_attn.gate_proj", "attn_gate")
    yield from norm(c, "attn_post_norm", "post_attention_layernorm", "post_attention_norm")
    yield from norm(c, "mlp_norm", "pre_mlp_layernorm", "ffn_norm")
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c)
    else:
        expert = "mlp.experts.{expert}"
        yield from experts(c, "mlp.router.gate", f"{expert}.gate_proj", f"{expert}.up_proj", f"{expert}.down_proj")
        bias = "mlp.expert_bias"
        yield "router_correction", Row((c.moe.num_experts,), ("experts",), "zeros", bias, "exp_probs_b.bias", float32=True)
        yield from shared_expert(c, "mlp.shared_experts")
    yield from norm(c, "mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm")


AFMOE = Family(
    _afmoe,
    _layer,
    DEFAULTS
    | dict(
        head_dim=128,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        moe_intermediate_size=1408,
        num_dense_layers=1,
        num_experts=64,
        num_experts_per_tok=6,
        num_shared_experts=2,
        route_scale=1.0,
        global_attn_every_n_layers=4,
        sliding_window=1024,
        mup_enabled=False,
    ),
    moe=("mlp.router.gate", "mlp.experts"),
)

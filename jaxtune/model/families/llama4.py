"""Llama 4's language model: attention in chunks of positions, with layers without rotation in between, whose queries are scaled by their
position; and experts with a shared one, of which a token uses one, scaled by the router's sigmoid."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.factors import Growth
from jaxtune.model.families.kinds import check_layer_types
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.moe import moe_of
from jaxtune.model.families.parts import Rows, attention, mlp, norm, shared_expert
from jaxtune.model.row import Part, Row

CHUNKED, FULL = "chunked_attention", "full_attention"


def _llama4(hf: dict[str, Any]) -> ModelConfig:
    layers, step, chunk = range(hf["num_hidden_layers"]), hf["interleave_moe_layer_step"], hf["attention_chunk_size"]
    turning = hf["no_rope_layers"] or [(layer + 1) % hf["no_rope_layer_interval"] != 0 for layer in layers]
    if len(turning) < len(layers):
        raise ModelError(f"no_rope_layers has {len(turning)} entries for num_hidden_layers={len(layers)}")
    kinds = hf["layer_types"] or [CHUNKED if turning[layer] and chunk is not None else FULL for layer in layers]
    check_layer_types(hf, kinds, CHUNKED, FULL)
    if CHUNKED in kinds and not chunk:
        raise ModelError(f"layer_types has {CHUNKED} but attention_chunk_size is {chunk!r}, not a number of tokens")
    sparse = list(layers[step - 1 :: step]) if hf["moe_layers"] is None else [layer for layer in layers if layer in hf["moe_layers"]]
    inner, tuned = hf["intermediate_size"], bool(hf["attn_temperature_tuning"])
    more: dict[str, Any] = dict(aux_loss_coef=None, shared_intermediate_size=inner, sigmoid=True, scales_input=True)
    return llama_config(
        hf | dict(intermediate_size=hf["intermediate_size_mlp"]),
        interleaved=True,
        mlp_bias=False,
        layer_ropes=tuple(0 if turning[layer] else -1 for layer in layers),
        layer_windows=tuple(-chunk if kind == CHUNKED else 0 for kind in kinds),
        bare_norms=("q_norm", "k_norm") if hf["use_qk_norm"] else (),
        query_growth=Growth(float(hf["attn_scale"]), hf["floor_scale"], ahead=1, still=True) if tuned else Growth(),
        moe=moe_of(hf, hf["num_local_experts"], inner, sparse, normalize=False, **more),
    )


def _layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c, hf="feed_forward")
        return
    yield from _experts(c)
    yield from shared_expert(c, "feed_forward.shared_expert")


def _experts(c: ModelConfig) -> Rows:
    """In a file, each layer's experts are one tensor `[E, in, out]`, gate before up."""
    assert c.moe is not None
    E, width, inner = c.moe.num_experts, c.hidden_size, c.moe.intermediate_size
    yield "router", Row((E, width), ("experts", "embed"), "normal", "feed_forward.router.weight", "ffn_gate_inp.weight")
    for number, name in enumerate(("gate", "up")):
        hf, axes = "feed_forward.experts.gate_up_proj", ("experts", "mlp", "embed")
        row = Row((E, inner, width), axes, "normal", hf, f"ffn_{name}_exps.weight", transposed=True, part=Part(number, 2))
        yield f"experts_{name}", row
    hf, axes = "feed_forward.experts.down_proj", ("experts", "embed", "mlp")
    yield "experts_down", Row((E, width, inner), axes, "normal", hf, "ffn_down_exps.weight", transposed=True, part=Part())


LLAMA4 = Family(
    _llama4,
    _layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        intermediate_size_mlp=16384,
        num_local_experts=16,
        num_experts_per_tok=1,
        moe_layers=None,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        no_rope_layers=None,
        no_rope_layer_interval=4,
        attention_chunk_size=8192,
        layer_types=None,
        attn_temperature_tuning=True,
        floor_scale=8192,
        attn_scale=0.1,
    ),
    moe=("feed_forward.router", "feed_forward.experts"),
)

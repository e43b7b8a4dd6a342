"""Gemma 4 (text): another head size in layers without a window, inputs for each layer, keys and values shared by layers, experts beside a
dense part."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, Moe, Wide, common
from jaxtune.model.families.gemma import sandwich
from jaxtune.model.families.kinds import windows
from jaxtune.model.families.moe import moe_of
from jaxtune.model.families.parts import Rows, linear, mlp, norm
from jaxtune.model.rope import Rope
from jaxtune.model.row import Part, Row

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULTS = dict(
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_bias=False,
    pad_token_id=0,
    sliding_window=512,
    layer_types=None,
    rope_parameters=None,
    vocab_size_per_layer_input=262144,
    hidden_size_per_layer_input=256,
)
ROPES = {
    FULL: dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1e6),
    SLIDING: dict(rope_type="default", rope_theta=1e4),
}


def _kinds(hf: Mapping[str, Any]) -> list[str]:
    """The kind of each layer: by default every sixth is full attention, and the last one always."""
    layers = hf["num_hidden_layers"]
    kinds = list(hf["layer_types"] or [SLIDING if (layer + 1) % 6 else FULL for layer in range(layers)])
    return [*kinds[:-1], FULL]


def _wide_heads(hf: Mapping[str, Any], kinds: list[str]) -> tuple[int, int]:
    """Number and size of the heads in full layers: `per_layer_config` in transformers 5, separate keys in files on the hub."""
    own = hf["num_key_value_heads"]
    if (said := hf["per_layer_config"]) is None:
        heads = hf["num_global_key_value_heads"] if hf["attention_k_eq_v"] else None
        return heads or own, hf["global_head_dim"]
    full = {layer for layer, kind in enumerate(kinds) if kind == FULL}
    values = list(said.values()) if isinstance(said, Mapping) else [None]
    known = all(isinstance(value, Mapping) and value.keys() <= {"head_dim", "num_key_value_heads"} for value in values)
    layers = {int(layer) if str(layer).isdigit() else -1 for layer in said} if known else set()  # 5 is "05" if there are more than 10
    if not known or any(value != values[0] for value in values) or layers not in (set(), full):
        raise ModelError(
            f"per_layer_config={said!r} is not implemented for gemma4_text; only one head_dim and num_key_value_heads of all full layers is"
        )
    value = values[0] if values else {}
    return value.get("num_key_value_heads") or own, value.get("head_dim") or hf["head_dim"]


def _moe(hf: Mapping[str, Any]) -> Moe | None:
    """The experts of all layers; None if there are none."""
    if not hf["enable_moe_block"]:
        return None
    keys = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if missing := [key for key in keys if not isinstance(hf[key], int) or hf[key] < 1]:
        raise ModelError(f"enable_moe_block needs a positive whole number at {missing[0]}; it is {hf[missing[0]]!r}")
    said = {"num_experts_per_tok": hf["top_k_experts"]}
    return moe_of(said, hf["num_experts"], hf["moe_intermediate_size"], list(range(hf["num_hidden_layers"])), True, aux_loss_coef=None)


def check_sharing(hf: Mapping[str, Any], kinds: list[str]) -> int:
    """The number of last layers that use the keys and values of earlier ones; ModelError if there are none of some kind."""
    shared = hf["num_kv_shared_layers"]
    if shared < 0 or set(kinds[: len(kinds) - shared]) != set(kinds):
        raise ModelError(f"num_kv_shared_layers={shared} leaves no layer of each kind that makes keys and values; kinds are {kinds}")
    return shared


def sharing_config(hf: dict[str, Any], kinds: list[str], **changes) -> ModelConfig:
    """The fields of a model of layers of these kinds, which may have inputs of their own and share keys and values."""
    bias = bool(hf["attention_bias"])
    return common(
        hf,
        hidden_act=hf["hidden_activation"],
        norm="rms_float32",
        embed_scale=hf["hidden_size"] ** 0.5,
        attention_scale=1.0,
        bare_norms=("v_norm",),
        qkv_bias=bias,
        out_bias=bias,
        logits_softcap=hf["final_logit_softcapping"] or 0.0,
        layer_ropes=tuple(0 if kind == FULL else 1 for kind in kinds),
        layer_windows=windows(hf, kinds),
        **changes,
    )


def _gemma4(hf: dict[str, Any]) -> ModelConfig:
    kinds = _kinds(hf)
    shared = check_sharing(hf, kinds)
    vocabulary, inputs = hf["vocab_size_per_layer_input"], hf["hidden_size_per_layer_input"] or 0
    if inputs and vocabulary < hf["vocab_size"]:
        raise ModelError(f"vocab_size_per_layer_input={vocabulary} is less than vocab_size={hf['vocab_size']}; each token needs an input")
    wide, said = _wide_heads(hf, kinds), hf["rope_parameters"] or ROPES
    if not all(needed := (hf["num_key_value_heads"], hf["head_dim"], *wide)):
        raise ModelError(f"gemma4_text needs num_key_value_heads and head_dim, of full layers too; they are {', '.join(map(repr, needed))}")
    if hf["num_attention_heads"] % wide[0]:
        raise ModelError(f"num_attention_heads={hf['num_attention_heads']} is not a multiple of the {wide[0]} key heads of full layers")
    sizes = {FULL: wide[1], SLIDING: hf["head_dim"]}
    own = {kind: {**hf, "rope_scaling": said.get(kind) or ROPES[kind], "rope_parameters": None} for kind in sizes}
    ropes = tuple(Rope.from_hf(own[kind], size) for kind, size in sizes.items())
    if ropes[1].dim != hf["head_dim"] or ropes[0].dim != wide[1]:
        raise ModelError("partial_rotary_factor is implemented for gemma4_text with rope_type proportional alone")
    return sharing_config(
        hf,
        kinds,
        ropes=ropes,
        wide=Wide(*wide, tuple(layer for layer, kind in enumerate(kinds) if kind == FULL), not hf["attention_k_eq_v"]),
        kv_sharing=shared,
        kv_sharing_mlp=2 if hf["use_double_wide_mlp"] and shared else 1,
        layer_inputs=(vocabulary, inputs) if inputs else (0, 0),
        moe=_moe(hf),
    )


def sharing_attention(c: ModelConfig, layer: int) -> Rows:
    """Attention with norms of queries and keys, without keys and values where those of an earlier layer are used."""
    at = c.at(layer)
    q, kv, size = at.num_heads * at.head_dim, at.num_kv_heads * at.head_dim, at.head_dim
    yield from linear("q", q, c.hidden_size, ("heads", "embed"), "self_attn.q_proj", "attn_q", c.qkv_bias)
    yield from norm(c, "q_norm", "self_attn.q_norm", "attn_q_norm", size)
    if c.kv_source(layer) == layer:
        yield from linear("k", kv, c.hidden_size, ("kv_heads", "embed"), "self_attn.k_proj", "attn_k", c.qkv_bias)
        if c.wide is None or c.wide.values or layer not in c.wide.layers:
            yield from linear("v", kv, c.hidden_size, ("kv_heads", "embed"), "self_attn.v_proj", "attn_v", c.qkv_bias)
        yield from norm(c, "k_norm", "self_attn.k_norm", "attn_k_norm", size)
    yield from linear("o", c.hidden_size, q, ("embed", "heads"), "self_attn.o_proj", "attn_output", c.out_bias)


def _experts(c: ModelConfig, moe: Moe) -> Rows:
    """A router, which is a linear layer here, and experts in one tensor, each with its own norms."""
    E, width, inner = moe.num_experts, c.hidden_size, moe.intermediate_size
    wide, narrow, both = ("experts", "mlp", "embed"), ("experts", "embed", "mlp"), "experts.gate_up_proj"
    yield from norm(c, "mlp_own_post_norm", "post_feedforward_layernorm_1", "post_ffw_norm_1")
    yield from norm(c, "experts_norm", "pre_feedforward_layernorm_2", "pre_ffw_norm_2")
    yield from linear("router_proj", E, width, (None, "embed"), "router.proj", "ffn_gate_inp")
    yield "router_scale", Row((width,), ("embed",), "ones", "router.scale", "ffn_gate_inp.scale")
    yield "router_expert_scale", Row((E,), (None,), "ones", "router.per_expert_scale", "ffn_down_exps.scale")
    yield "experts_gate", Row((E, inner, width), wide, "normal", both, "ffn_gate_exps.weight", part=Part(0, 2))
    yield "experts_up", Row((E, inner, width), wide, "normal", both, "ffn_up_exps.weight", part=Part(1, 2))
    yield "experts_down", Row((E, width, inner), narrow, "normal", "experts.down_proj", "ffn_down_exps.weight", part=Part())
    yield from norm(c, "experts_post_norm", "post_feedforward_layernorm_2", "post_ffw_norm_2")


def input_rows(c: ModelConfig) -> Rows:
    """The gated network for a layer's own input."""
    width, inner = c.hidden_size, c.layer_inputs[1]
    yield from linear("input_gate", inner, width, ("mlp", "embed"), "per_layer_input_gate", "inp_gate")
    yield from linear("input_projection", width, inner, ("embed", "mlp"), "per_layer_projection", "proj")
    yield from norm(c, "input_post_norm", "post_per_layer_input_norm", "post_norm")


def _layer(c: ModelConfig, layer: int) -> Rows:
    own = c.kv_source(layer) == layer
    yield from sandwich(c, sharing_attention(c, layer), mlp(c, 1 if own else c.kv_sharing_mlp))
    if c.moe:
        yield from _experts(c, c.moe)
    if c.layer_inputs[1]:
        yield from input_rows(c)
    yield "layer_scale", Row((1,), (None,), "ones", "layer_scalar", "layer_output_scale.weight")


def _extra_rows(c: ModelConfig) -> Rows:
    vocabulary, inputs = c.layer_inputs
    if not inputs:
        return
    wide = c.num_layers * inputs
    name = "model.embed_tokens_per_layer.weight"
    yield "layer_inputs/embed", Row((vocabulary, wide), ("vocab", "embed"), "normal", name, "per_layer_token_embd.weight")
    # a stack of one: a linear layer like those of layers, for adapters and quantisation
    matrix, name = ((1, wide, c.hidden_size), ("layers", "mlp", "embed")), "model.per_layer_model_projection.weight"
    yield "layer_inputs/projection", Row(*matrix, "normal", name, "per_layer_model_proj.weight", layers=(0,))
    yield "layer_inputs/norm", Row((inputs,), (None,), "ones", "model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight")


GEMMA4 = Family(
    _gemma4,
    _layer,
    DEFAULTS
    | dict(
        num_key_value_heads=4,
        max_position_embeddings=131072,
        final_logit_softcapping=None,
        attention_k_eq_v=False,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        global_head_dim=512,
        num_global_key_value_heads=None,
        per_layer_config=None,
        enable_moe_block=False,
        num_experts=None,
        top_k_experts=None,
        moe_intermediate_size=None,
    ),
    # image tokens attend in both directions, text tokens never do
    {"use_bidirectional_attention": (None, "vision")},
    extra_rows=_extra_rows,
    moe=("router.proj", "experts"),
    ignored=r"model\.layers\.({sharing})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*",
)


# ---- the unified one (Gemma 4 12B), without towers: its layers are given nothing and have no experts ----


def _unified(hf: dict[str, Any]) -> ModelConfig:
    return _gemma4(hf | dict(hidden_size_per_layer_input=0, enable_moe_block=False))


GEMMA4_UNIFIED = GEMMA4._replace(config=_unified, defaults=GEMMA4.defaults | dict(sliding_window=1024, max_position_embeddings=262144))

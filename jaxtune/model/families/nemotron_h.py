"""Nemotron H and Nemotron Nano 2 and 3: each layer is a single part, Mamba-2, attention without positions, or a feed-forward part without a
gate, dense or with experts and a shared one."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, common
from jaxtune.model.families.deepseek import experts_of
from jaxtune.model.families.kinds import check_layer_types
from jaxtune.model.families.mamba import mamba_of, mamba_rows
from jaxtune.model.families.parts import Rows, attention, linear, norm, plain_mlp
from jaxtune.model.row import Row

LINEAR, FULL, DENSE, SPARSE = "linear_attention", "full_attention", "mlp", "moe"
OLD = {"mamba": LINEAR, "attention": FULL}  # their names in files on the hub,
LETTERS = {"M": LINEAR, "*": FULL, "-": DENSE, "E": SPARSE}  # or all in one text
RENAMED = {  # older names of keys, which take precedence in transformers too
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
}


def _kinds(hf: dict[str, Any]) -> list[str]:
    """The kind of each layer."""
    kinds, letters = hf.get("layers_block_type") or hf.get("layer_types"), hf.get("hybrid_override_pattern")
    if not kinds and letters:
        if not isinstance(letters, str) or set(letters) - LETTERS.keys():
            raise ModelError(f"hybrid_override_pattern={letters!r} of this nemotron_h model has to be a text of {' '.join(LETTERS)}")
        return [LETTERS[letter] for letter in letters]
    kinds = kinds or [LINEAR, SPARSE, FULL, DENSE]
    return [OLD.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]


def _nemotron_h(hf: dict[str, Any]) -> ModelConfig:
    hf = hf | {RENAMED[key]: hf[key] for key in RENAMED if hf.get(key) is not None}
    kinds = _kinds(hf)
    hf |= dict(num_hidden_layers=len(kinds))
    check_layer_types(hf, kinds, LINEAR, FULL, DENSE, SPARSE)
    if FULL not in kinds:
        raise ModelError("layers_block_type: a model without a layer of attention is not implemented for nemotron_h")
    linear, dense, sparse = (tuple(n for n, kind in enumerate(kinds) if kind == one) for one in (LINEAR, DENSE, SPARSE))
    mamba, moe = None, None
    if linear:
        heads, size = hf["mamba_num_heads"], hf["mamba_head_dim"]
        keys = dict(mamba_n_heads=heads, mamba_d_head=size, mamba_n_groups=hf["n_groups"], mamba_d_state=hf["ssm_state_size"])
        keys |= dict(mamba_d_conv=hf["conv_kernel"], mamba_conv_bias=hf["use_conv_bias"], time_step_limit=[0.0, float("inf")])
        mamba = mamba_of(hf | keys, linear, heads * size, hf["mamba_hidden_act"], least_step=float(hf["time_step_min"]))
    if sparse:
        shared = hf["moe_shared_expert_intermediate_size"]
        more: dict[str, Any] = dict(sigmoid=True, epsilon=1e-20, shared_intermediate_size=shared, latent_size=hf["moe_latent_size"] or 0)
        moe = experts_of(hf, list(sparse), normalize=bool(hf["norm_topk_prob"]), **more)
    return common(
        hf,
        norm="rms_float32",
        norm_eps=hf["layer_norm_epsilon"],
        hidden_act=hf["mlp_hidden_act"],
        ropes=(),
        layer_ropes=(-1,) * len(kinds),
        mlp_bias=bool(hf["mlp_bias"]),
        mamba=mamba,
        moe=moe,
        feed_forward_only=tuple(sorted(dense + sparse)),
    )


def _layer(c: ModelConfig, layer: int) -> Rows:
    if layer not in c.feed_forward_only:
        yield from norm(c, "attn_norm", "norm", "attn_norm")
        yield from mamba_rows(c, c.mamba, "mixer") if c.mamba and layer in c.mamba.layers else attention(c, hf="mixer")
        return
    yield from norm(c, "mlp_norm", "norm", "attn_norm")
    if c.moe is None or layer not in c.moe.layers:
        yield from plain_mlp(c, "mixer.up_proj", "mixer.down_proj")
    else:
        yield from _experts(c)


def _experts(c: ModelConfig) -> Rows:
    """A router with a correction, experts without a gate, possibly narrower than the residual stream, and the shared one."""
    assert c.moe is not None
    E, inner, width = c.moe.num_experts, c.moe.intermediate_size, c.moe.latent_size or c.hidden_size
    yield "router", Row((E, c.hidden_size), ("experts", "embed"), "normal", "mixer.gate.weight", "ffn_gate_inp.weight")
    correction = "mixer.gate.e_score_correction_bias"
    yield "router_correction", Row((E,), ("experts",), "zeros", correction, "exp_probs_b.bias", float32=True)
    for name, shape, axes in (("up", (inner, width), ("mlp", "embed")), ("down", (width, inner), ("embed", "mlp"))):
        hf = f"mixer.experts.{{expert}}.{name}_proj.weight"
        yield f"experts_{name}", Row((E, *shape), ("experts", *axes), "normal", hf, f"ffn_{name}_exps.weight")
    if c.moe.latent_size:
        yield from linear("latent_in", width, c.hidden_size, (None, "embed"), "mixer.fc1_latent_proj", "ffn_latent_down", c.mlp_bias)
        yield from linear("latent_out", c.hidden_size, width, ("embed", None), "mixer.fc2_latent_proj", "ffn_latent_up", c.mlp_bias)
    inner, hf = c.moe.shared_intermediate_size, "mixer.shared_experts"
    yield from linear("shared_up", inner, c.hidden_size, ("mlp", "embed"), f"{hf}.up_proj", "ffn_up_shexp", c.mlp_bias)
    yield from linear("shared_down", c.hidden_size, inner, ("embed", "mlp"), f"{hf}.down_proj", "ffn_down_shexp", c.mlp_bias)


NEMOTRON_H = Family(
    _nemotron_h,
    _layer,
    dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        intermediate_size=21504,
        mlp_hidden_act="relu2",
        mlp_bias=False,
        ssm_state_size=128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        mamba_hidden_act="silu",
        n_groups=8,
        conv_kernel=4,
        time_step_min=0.001,
        use_conv_bias=True,
        use_bias=False,
        layer_norm_epsilon=1e-5,
        n_routed_experts=8,
        n_shared_experts=1,
        moe_intermediate_size=7688,
        moe_shared_expert_intermediate_size=7688,
        moe_latent_size=None,
        num_experts_per_tok=2,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
    ),
    {"use_bias": (False,), "tie_word_embeddings": (False,)},
    required=("vocab_size", "hidden_size", "num_attention_heads"),
    prefix="backbone.layers.{layer}.",
    ends={"embed": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"},
    pads=False,
    ignored=r"mtp\..*",
    moe=("mixer.gate", "mixer.experts"),
)

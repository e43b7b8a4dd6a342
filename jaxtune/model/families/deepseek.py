"""DeepSeek V2 and V3 (also Moonlight), Mistral 4: latent attention; dense layers first, then experts with a shared one."""

import math
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, Latent, ModelConfig, Moe, common
from jaxtune.model.families.factors import Growth
from jaxtune.model.families.kinds import whole_rope
from jaxtune.model.families.llama import DEFAULTS
from jaxtune.model.families.moe import moe_of, qwen_experts
from jaxtune.model.families.nested import together
from jaxtune.model.families.parts import Rows, linear, mlp, norm, shared_expert
from jaxtune.model.row import Row


def experts_of(hf: dict[str, Any], layers: list[int] | None = None, **changes) -> Moe | None:
    """All layers from `first_k_dense_replace` on unless listed; transformers has no load-balancing loss for these."""
    number = hf.get("num_local_experts") or hf.get("num_experts") or hf.get("n_routed_experts") or 0
    layers = list(range(hf["first_k_dense_replace"], hf["num_hidden_layers"])) if layers is None else layers
    inner, groups = hf["moe_intermediate_size"], (hf["n_group"] or 1, hf["topk_group"] or 1)
    if min(groups) < 1 or number % groups[0] or groups[1] > groups[0] or hf["num_experts_per_tok"] > number // groups[0] * groups[1]:
        raise ModelError(f"n_group={groups[0]} and topk_group={groups[1]} leave no {hf['num_experts_per_tok']} of {number} experts")
    judges = changes.setdefault("judges", 2 if changes.get("sigmoid") else 1)
    if judges > 1 and groups[0] > 1 and number // groups[0] < judges:
        raise ModelError(f"n_group={groups[0]} of {number} experts are groups of one; a group is judged by its two best experts")
    fields: dict[str, Any] = dict(
        aux_loss_coef=None,
        shared_intermediate_size=inner * hf["n_shared_experts"],
        groups=groups,
        scale=float(hf["routed_scaling_factor"]),
        float32=True,
    )
    return moe_of(hf, number, inner, layers, **fields | changes)


def dense_or_experts(
    c: ModelConfig, layer: int, gguf: str = "ffn_norm", correction: str = "mlp.gate.e_score_correction_bias",
    shared: str = "mlp.shared_experts", router: str = "mlp.gate",
) -> Rows:  # fmt: skip
    """The second half of a layer; `correction`, `shared` and `router` are Hugging Face's names."""
    yield from norm(c, "mlp_norm", "post_attention_layernorm", gguf)
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c)
        return
    yield from qwen_experts(c, router)
    if c.moe.sigmoid:
        yield "router_correction", Row((c.moe.num_experts,), ("experts",), "zeros", correction, "exp_probs_b.bias", float32=True)
    if c.moe.shared_intermediate_size:
        yield from shared_expert(c, shared)


# ---- DeepSeek V2 and V3 ----


def latent_config(hf: dict[str, Any], interleaved: bool, **changes) -> ModelConfig:
    """Latent attention, as all of these configs describe it."""
    heads, turning, still, value = hf["num_attention_heads"], hf["qk_rope_head_dim"], hf["qk_nope_head_dim"], hf["v_head_dim"]
    if (hf.get("num_key_value_heads") or heads) != heads:
        raise ModelError(f"num_key_value_heads={hf['num_key_value_heads']} is not num_attention_heads={heads}; latents make one for each")
    if value > turning + still:
        raise ModelError(f"v_head_dim={value} is more than qk_nope_head_dim + qk_rope_head_dim={turning + still}, which is not implemented")
    rope, scaling = whole_rope(hf, turning, interleaved), hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    scale, bias = (turning + still) ** -0.5, bool(hf["attention_bias"])
    if (scaling.get("rope_type") or scaling.get("type") or "default") != "default" and scaling.get("mscale_all_dim"):
        scale *= (0.1 * scaling["mscale_all_dim"] * math.log(max(rope.factor, 1)) + 1) ** 2
    return common(
        hf | dict(head_dim=turning + still, num_key_value_heads=heads),
        ropes=(rope,),
        attention_scale=scale,
        latent=Latent(hf["kv_lora_rank"], hf["q_lora_rank"] or 0, turning, still, value),
        qkv_bias=bias,
        out_bias=bias,
        **changes,
    )


def _deepseek_v2(hf: dict[str, Any]) -> ModelConfig:
    if (method := hf["topk_method"]) not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"topk_method={method!r} is not supported for deepseek_v2; supported are greedy, group_limited_greedy")
    groups = {} if method == "group_limited_greedy" else dict(n_group=1, topk_group=1)
    return latent_config(hf, interleaved=True, moe=experts_of(hf | groups, normalize=False))


def _deepseek_v3(hf: dict[str, Any]) -> ModelConfig:
    moe = experts_of(hf, normalize=bool(hf["norm_topk_prob"]), sigmoid=True)
    return latent_config(hf, interleaved=bool(hf["rope_interleave"]), moe=moe)


def latent_layer(c: ModelConfig, layer: int) -> Rows:
    """A layer with latent attention."""
    assert c.latent is not None
    low, width, q = c.latent, c.hidden_size, c.num_heads * c.head_dim
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    if low.q_rank:
        yield from linear("q_a", low.q_rank, width, (None, "embed"), "self_attn.q_a_proj", "attn_q_a", c.qkv_bias)
        yield from norm(c, "q_a_norm", "self_attn.q_a_layernorm", "attn_q_a_norm", low.q_rank)
        yield from linear("q_b", q, low.q_rank, ("heads", "embed"), "self_attn.q_b_proj", "attn_q_b")
    else:
        yield from linear("q", q, width, ("heads", "embed"), "self_attn.q_proj", "attn_q")
    yield from linear(
        "kv_a", low.kv_rank + low.turning, width, (None, "embed"), "self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", c.qkv_bias
    )
    yield from norm(c, "kv_a_norm", "self_attn.kv_a_layernorm", "attn_kv_a_norm", low.kv_rank)
    both = c.num_heads * (low.still + low.value)
    yield from linear("kv_b", both, low.kv_rank, ("heads", "embed"), "self_attn.kv_b_proj", "attn_kv_b")
    yield from linear("o", width, c.num_heads * low.value, ("embed", "heads"), "self_attn.o_proj", "attn_output", c.out_bias)
    yield from dense_or_experts(c, layer)


_DEEPSEEK = DEFAULTS | dict(
    kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_group=None, topk_group=None
)
DEEPSEEK_V2 = Family(
    _deepseek_v2,
    latent_layer,
    _DEEPSEEK
    | dict(
        first_k_dense_replace=0,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        routed_scaling_factor=1.0,
        topk_method="greedy",
    ),
    {"mlp_bias": (None, False), "norm_topk_prob": (None, False)},  # DeepSeek's own code reads the second, transformers does not
    required=(*Family._field_defaults["required"], "num_experts_per_tok"),
)
DEEPSEEK_V3 = Family(
    _deepseek_v3,
    latent_layer,
    _DEEPSEEK
    | dict(
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        rope_interleave=True,
        max_position_embeddings=4096,
    ),
    ignored=r"model\.layers\.{layers}\..*",
)


# ---- Sarvam 105B: DeepSeek V3 with other defaults ----


def _sarvam_mla(hf: dict[str, Any]) -> ModelConfig:
    scaling, shared = hf.get("rope_scaling") or {}, hf.get("num_shared_experts")  # the second as in files on the hub
    if isinstance(scaling, dict) and "deepseek_yarn" in (scaling.get("type"), scaling.get("rope_type")):
        scaling = {key: value for key, value in scaling.items() if key != "type"} | {"rope_type": "yarn"}
    return _deepseek_v3(hf | dict(rope_scaling=scaling, n_shared_experts=hf["n_shared_experts"] if shared is None else shared))


SARVAM_MLA = DEEPSEEK_V3._replace(
    config=_sarvam_mla,
    defaults=DEEPSEEK_V3.defaults
    | dict(n_routed_experts=128, q_lora_rank=None, n_group=1, topk_group=1, first_k_dense_replace=1, initializer_range=0.006),
)


# ---- Mistral 4: softmax over experts, queries that grow with their position; a file holds a layer's experts in one tensor ----

_MISTRAL4_ROPE = dict(rope_type="yarn", rope_theta=10000.0, factor=128.0, original_max_position_embeddings=8192, mscale=1.0)
_MISTRAL4_ROPE |= dict(mscale_all_dim=1.0, llama_4_scaling_beta=0.1)


def _mistral4(hf: dict[str, Any]) -> ModelConfig:
    said, turning = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or _MISTRAL4_ROPE), hf["qk_rope_head_dim"]
    share = said.pop("partial_rotary_factor", None)  # of a whole head; only its rotated part counts here
    if share is not None and int(share * (turning + hf["qk_nope_head_dim"])) != turning:
        raise ModelError(f"partial_rotary_factor={share!r} of this mistral4 model does not make qk_rope_head_dim={turning}")
    moe = experts_of(hf, normalize=bool(hf["norm_topk_prob"]), judges=2, float32=False)
    return latent_config(
        hf | dict(rope_scaling=said),
        interleaved=bool(hf["rope_interleave"]),
        moe=moe,
        query_growth=Growth(float(said.get("llama_4_scaling_beta") or 0.0), int(said.get("original_max_position_embeddings") or 1)),
    )


def _mistral4_layer(c: ModelConfig, layer: int) -> Rows:
    return ((name, together(name, row)) for name, row in latent_layer(c, layer))


MISTRAL4 = Family(
    _mistral4,
    _mistral4_layer,
    _DEEPSEEK
    | dict(
        num_key_value_heads=32,
        kv_lora_rank=256,
        q_lora_rank=1024,
        qk_nope_head_dim=64,
        max_position_embeddings=1048576,
        first_k_dense_replace=0,
        n_routed_experts=128,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_experts_per_tok=4,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        rope_interleave=True,
        pad_token_id=11,
    ),
)


# ---- MiniCPM 3 and Youtu: latent attention in dense models ----


def _minicpm3(hf: dict[str, Any]) -> ModelConfig:
    width, layers, depth = hf["hidden_size"], hf["num_hidden_layers"], hf["scale_depth"]
    return latent_config(
        hf | dict(v_head_dim=hf["v_head_dim"] or width // hf["num_attention_heads"]),
        interleaved=False,
        mlp_bias=bool(hf["mlp_bias"]),
        embed_scale=float(hf["scale_emb"]),
        residual_multiplier=1.0 if depth is None else depth / math.sqrt(layers),
        logits_scaling=width / (hf["dim_model_base"] or width),
    )


MINICPM3 = Family(
    _minicpm3,
    latent_layer,
    DEFAULTS
    | dict(
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.1,
        kv_lora_rank=256,
        q_lora_rank=768,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=None,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
    ),
)


def _youtu(hf: dict[str, Any]) -> ModelConfig:
    spread = hf["initializer_range"] or 2 / math.sqrt(5 * hf["hidden_size"])
    return latent_config(hf, interleaved=bool(hf["rope_interleave"]), initializer_range=spread)


YOUTU = Family(
    _youtu,
    latent_layer,
    _DEEPSEEK | dict(max_position_embeddings=131072, tie_word_embeddings=True, rope_interleave=True, initializer_range=None),
)

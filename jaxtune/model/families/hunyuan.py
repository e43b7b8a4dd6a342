"""HunYuan: norms of queries and keys after they turned, a rotary base stretched by alpha; dense, or experts beside a shared one.
Hy3: norms before the rotation, and DeepSeek V3's experts."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig
from jaxtune.model.families.deepseek import dense_or_experts, experts_of
from jaxtune.model.families.llama import DEFAULTS, llama_config
from jaxtune.model.families.moe import expert_matrices, moe_of, sparse_by_type
from jaxtune.model.families.parts import Rows, attention, linear, norm, pre_norm_layer, query_key_norms, shared_expert


def _hunyuan(hf: dict[str, Any], **changes) -> ModelConfig:
    head_dim = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    said = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if (said.get("rope_type") or said.get("type")) == "dynamic" and said.get("alpha"):
        theta = said.get("rope_theta") or hf.get("rope_theta") or 1e4
        said = dict(rope_type="default", rope_theta=theta * said["alpha"] ** (head_dim / (head_dim - 2)))
    return llama_config(hf | dict(rope_scaling=said), mlp_bias=False, qk_norm_last=True, **changes)


def _norms(c: ModelConfig) -> Rows:
    return query_key_norms(c, c.head_dim, c.head_dim, "query_layernorm", "key_layernorm")


def _hunyuan_layer(c: ModelConfig, layer: int) -> Rows:
    yield from pre_norm_layer(c, layer)
    yield from _norms(c)


HUNYUAN = Family(_hunyuan, _hunyuan_layer, DEFAULTS | dict(rms_norm_eps=1e-5, pad_token_id=0))


# ---- the mixture (Hunyuan-A13B) ----


def _hunyuan_moe(hf: dict[str, Any]) -> ModelConfig:
    said = hf.get("num_experts_per_tok") or hf["moe_topk"]  # two names of one key; in files a list, of one number for each layer
    chosen = said if isinstance(said, list) else [said]
    if not all(isinstance(number, int) and number == chosen[0] for number in chosen) or not chosen:
        raise ModelError(f"moe_topk={said!r} is not implemented for hunyuan_v1_moe; only one whole number for all layers is")
    number, inner, layers = hf.get("num_local_experts") or hf["num_experts"], hf["intermediate_size"], list(range(hf["num_hidden_layers"]))
    more: dict[str, Any] = dict(aux_loss_coef=None, shared_intermediate_size=inner, float32=True)
    return _hunyuan(hf, moe=moe_of(hf | dict(num_experts_per_tok=chosen[0]), number, inner, layers, normalize=True, **more))


def _hunyuan_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from _norms(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    expert = "mlp.experts.{expert}"
    assert c.moe is not None
    yield from linear("router_proj", c.moe.num_experts, c.hidden_size, (None, "embed"), "mlp.gate.wg", "ffn_gate_inp")
    yield from expert_matrices(c, f"{expert}.gate_proj", f"{expert}.up_proj", f"{expert}.down_proj")
    yield from shared_expert(c, "mlp.shared_mlp")


HUNYUAN_MOE = Family(
    _hunyuan_moe, _hunyuan_moe_layer, DEFAULTS | dict(rms_norm_eps=1e-5, pad_token_id=0, num_experts=1, moe_topk=[1])
)


# ---- Hy3 ----


def _hy_v3(hf: dict[str, Any]) -> ModelConfig:
    named = hf | dict(n_shared_experts=hf["num_shared_experts"], routed_scaling_factor=hf["router_scaling_factor"], n_group=1, topk_group=1)
    return llama_config(hf, moe=experts_of(named, sparse_by_type(hf, 1), normalize=True, sigmoid=True, epsilon=1e-20))


def _hy_v3_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from dense_or_experts(c, layer, correction="mlp.expert_bias", shared="mlp.shared_mlp", router="mlp.router.gate")


HY_V3 = Family(
    _hy_v3,
    _hy_v3_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=11158840.0,
        initializer_range=0.006,
        mlp_layer_types=None,
        num_experts=192,
        num_experts_per_tok=8,
        num_shared_experts=1,
        moe_intermediate_size=1536,
        router_scaling_factor=2.826,
    ),
    {"mlp_bias": (False,)},
    ignored=r"model\.layers\.{layers}\..*",
)

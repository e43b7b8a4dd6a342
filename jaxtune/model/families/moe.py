"""Mixtures of experts: Mixtral, OLMoE, Qwen 2 and 3 MoE, Mellum 2, Granite's."""

from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import Family, ModelConfig, Moe, common
from jaxtune.model.families.kinds import one_window, ropes_by_kind, windows
from jaxtune.model.families.llama import DEFAULTS, MULTIPLIERS, granite_config, llama_config
from jaxtune.model.families.parts import Rows, attention, linear, mlp, norm, query_key_norms, shared_expert
from jaxtune.model.row import Part, Row


def experts(c: ModelConfig, router: str, gate: str, up: str, down: str) -> Rows:
    """A router and the experts' matrices."""
    assert c.moe is not None
    table = (c.moe.num_experts, c.hidden_size), ("experts", "embed"), "normal"
    yield "router", Row(*table, f"{router}.weight", "ffn_gate_inp.weight")
    yield from expert_matrices(c, gate, up, down)


def expert_matrices(c: ModelConfig, gate: str, up: str, down: str) -> Rows:
    """`[E, out, in]`; the names have an {expert}, GGUF's tensors hold all of a layer's."""
    assert c.moe is not None
    E, width, inner = c.moe.num_experts, c.hidden_size, c.moe.intermediate_size
    wide, narrow = ("experts", "mlp", "embed"), ("experts", "embed", "mlp")
    yield "experts_gate", Row((E, inner, width), wide, "normal", f"{gate}.weight", "ffn_gate_exps.weight")
    yield "experts_up", Row((E, inner, width), wide, "normal", f"{up}.weight", "ffn_up_exps.weight")
    yield "experts_down", Row((E, width, inner), narrow, "normal", f"{down}.weight", "ffn_down_exps.weight")


def moe_of(hf: dict[str, Any], experts: int, inner: int, layers: list[int], normalize: bool, **changes) -> Moe | None:
    """The fields with common spelling, with `changes`; None if no layer has experts."""
    chosen = hf["num_experts_per_tok"]
    if chosen > experts:
        raise ModelError(f"num_experts_per_tok={chosen} is more than the {experts} experts there are")
    if chosen < 1:
        raise ModelError(f"num_experts_per_tok={chosen} is no number of experts; it has to be 1 or more")
    fields: dict[str, Any] = dict(aux_loss_coef=float(hf.get("router_aux_loss_coef") or 0.0)) | changes
    return Moe(experts, chosen, inner, tuple(layers), normalize, **fields) if layers else None


# ---- Mixtral ----


def _mixtral(hf: dict[str, Any]) -> ModelConfig:
    number = hf.get("num_experts") or hf["num_local_experts"]  # two names of one key, in transformers too
    moe = moe_of(hf, number, hf["intermediate_size"], list(range(hf["num_hidden_layers"])), normalize=True)
    return common(hf, layer_windows=one_window(hf), moe=moe)


def _mixtral_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from mixtral_experts(c)


def mixtral_experts(c: ModelConfig) -> Rows:
    """A router and experts under Mixtral's names."""
    expert = "block_sparse_moe.experts.{expert}"
    return experts(c, "block_sparse_moe.gate", f"{expert}.w1", f"{expert}.w3", f"{expert}.w2")


MIXTRAL = Family(
    _mixtral,
    _mixtral_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.001,
    ),
    {"router_jitter_noise": (None, 0.0)},
)


# ---- Qwen 2 MoE: an expert that all tokens share, weighed by a gate of its own ----


def sparse_layers(hf: dict[str, Any], number: int) -> list[int]:
    """The layers that have experts, `number` of them, by Qwen's keys."""
    dense, step = hf["mlp_only_layers"] or (), hf["decoder_sparse_step"]
    return [i for i in range(hf["num_hidden_layers"]) if number and i not in dense and (i + 1) % step == 0]


def sparse_by_type(hf: dict[str, Any], dense: int) -> list[int]:
    """The layers with experts by `mlp_layer_types`; without it all but the first `dense`."""
    layers = range(hf["num_hidden_layers"])
    kinds = hf["mlp_layer_types"] or ["sparse" if layer >= dense else "dense" for layer in layers]
    if len(kinds) != len(layers) or not all(kind in ("sparse", "dense") for kind in kinds):
        raise ModelError(f"mlp_layer_types={kinds!r} is not sparse or dense for each of num_hidden_layers={len(layers)}")
    return [layer for layer in layers if kinds[layer] == "sparse"]


def _qwen2_moe(hf: dict[str, Any]) -> ModelConfig:
    number, sliding, layers = hf["num_experts"], hf["use_sliding_window"], range(hf["num_hidden_layers"])
    inner, shared = hf["moe_intermediate_size"], hf["shared_expert_intermediate_size"]
    moe = moe_of(hf, number, inner, sparse_layers(hf, number), bool(hf["norm_topk_prob"]), shared_intermediate_size=shared)
    turns = [bool((layer + 1) % 2 and layer < hf["max_window_layers"] and sliding) for layer in layers]
    kinds = hf.get("layer_types") or ["sliding_attention" if turn else "full_attention" for turn in turns]
    hf = hf | {"sliding_window": hf["sliding_window"] if sliding else None}
    return common(hf, qkv_bias=bool(hf["qkv_bias"]), layer_windows=windows(hf, kinds), moe=moe)


def _qwen2_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from qwen_fed(c, layer)


def qwen_fed(c: ModelConfig, layer: int) -> Rows:
    """A layer's feed-forward part: dense, or experts under Qwen's names, possibly with a shared one."""
    if c.moe is None or layer not in c.moe.layers:
        yield from mlp(c)
        return
    yield from qwen_experts(c)
    if c.moe.shared_intermediate_size:
        yield from shared_expert(c, "mlp.shared_expert")
        yield from linear("shared_router", 1, c.hidden_size, (None, "embed"), "mlp.shared_expert_gate", "ffn_gate_inp_shexp")


def qwen_experts(c: ModelConfig, router: str = "mlp.gate") -> Rows:
    """A router and experts under the names that Qwen introduced, and many others use."""
    expert = "mlp.experts.{expert}"
    return experts(c, router, f"{expert}.gate_proj", f"{expert}.up_proj", f"{expert}.down_proj")


QWEN2_MOE = Family(
    _qwen2_moe,
    _qwen2_moe_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=16,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        max_window_layers=28,
        decoder_sparse_step=1,
        mlp_only_layers=None,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        qkv_bias=True,
        router_aux_loss_coef=0.001,
    ),
)


# ---- OLMoE: norms over whole queries and keys ----


def _olmoe(hf: dict[str, Any]) -> ModelConfig:
    number = hf.get("num_local_experts") or hf["num_experts"]  # two names of one key, in transformers too
    moe = moe_of(hf, number, hf["intermediate_size"], list(range(hf["num_hidden_layers"])), bool(hf["norm_topk_prob"]))
    return llama_config(hf, mlp_bias=False, moe=moe)


def _olmoe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from qwen_experts(c)


OLMOE = Family(
    _olmoe,
    _olmoe_layer,
    DEFAULTS
    | dict(
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        pad_token_id=1,
    ),
    {"clip_qkv": (None,)},
)


# ---- Qwen 3 MoE: Qwen 3 with experts in some layers ----


def _qwen3_moe(hf: dict[str, Any]) -> ModelConfig:
    number = hf.get("num_local_experts") or hf["num_experts"]  # transformers 5 writes the first, the hub has the second
    moe = moe_of(hf, number, hf["moe_intermediate_size"], sparse_layers(hf, number), bool(hf["norm_topk_prob"]))
    sliding = hf | {"sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None}
    return llama_config(hf, mlp_bias=False, layer_windows=one_window(sliding), moe=moe)


def _qwen3_moe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from query_key_norms(c, c.head_dim, c.head_dim)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from qwen_fed(c, layer)


QWEN3_MOE = Family(
    _qwen3_moe,
    _qwen3_moe_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=4,
        max_position_embeddings=32768,
        use_sliding_window=False,
        sliding_window=4096,
        decoder_sparse_step=1,
        mlp_only_layers=None,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        router_aux_loss_coef=0.001,
    ),
)


# ---- Mellum 2: the same with windows and a rotary scheme by kind of layer ----


def _mellum(hf: dict[str, Any]) -> ModelConfig:
    size = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    found = windows(hf, hf["layer_types"] or ["full_attention"] * hf["num_hidden_layers"])
    said = hf.get("rope_parameters") or {f"{kind}_attention": dict(rope_theta=theta) for kind, theta in _MELLUM_THETA.items()}
    if missing := {f"{'sliding' if window else 'full'}_attention" for window in found} - {*said}:
        raise ModelError(f"rope_parameters of this mellum model lacks {sorted(missing)[0]}; it needs a scheme for each kind of layer")
    number = hf.get("num_local_experts") or hf["num_experts"]
    return llama_config(
        hf,
        mlp_bias=False,
        ropes=ropes_by_kind(hf | dict(rope_parameters=said), size, _MELLUM_THETA["sliding"]),
        layer_windows=found,
        layer_ropes=tuple(1 if window else 0 for window in found),
        moe=moe_of(hf, number, hf["moe_intermediate_size"], sparse_by_type(hf, 0), bool(hf["norm_topk_prob"])),
    )


_MELLUM_THETA = dict(full=5e5, sliding=1e4)
MELLUM = Family(
    _mellum,
    _qwen3_moe_layer,
    DEFAULTS
    | dict(
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        sliding_window=1024,
        layer_types=None,
        mlp_layer_types=None,
        moe_intermediate_size=896,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
    ),
    {"rope_scaling": (None,)},
    ignored=r"mtp\..*",
)


# ---- Granite's mixtures: Granite with experts, which a file holds in one tensor, and perhaps one that all tokens share ----


def granitemoe_config(hf: dict[str, Any], **changes) -> ModelConfig:
    """The same for all of Granite's mixtures."""
    layers, shared = list(range(hf["num_hidden_layers"])), hf.get("shared_intermediate_size", 0)
    moe = moe_of(hf, hf["num_local_experts"], hf["intermediate_size"], layers, normalize=True, shared_intermediate_size=shared)
    return granite_config(hf, mlp_bias=False, moe=moe, **changes)


def _granitemoe_layer(c: ModelConfig, layer: int) -> Rows:
    yield from norm(c, "attn_norm", "input_layernorm", "attn_norm")
    yield from attention(c)
    yield from norm(c, "mlp_norm", "post_attention_layernorm", "ffn_norm")
    yield from granite_experts(c)


def granite_experts(
    c: ModelConfig, router: str = "router.layer", up: str = "input_linear.weight", down: str = "output_linear.weight"
) -> Rows:
    """Experts that a file stores in one tensor, possibly with a shared one."""
    assert c.moe is not None
    called = {"experts_gate": (up, Part(0, 2)), "experts_up": (up, Part(1, 2)), "experts_down": (down, Part())}
    for name, row in experts(c, f"block_sparse_moe.{router}", "", "", ""):
        hf, part = called.get(name, ("", None))
        yield name, row._replace(hf=f"block_sparse_moe.{hf}", part=part) if part else row
    if inner := c.moe.shared_intermediate_size:
        yield from linear("shared_gate_up", 2 * inner, c.hidden_size, ("mlp", "embed"), "shared_mlp.input_linear", "ffn_up_shexp")
        yield from linear("shared_down", c.hidden_size, inner, ("embed", "mlp"), "shared_mlp.output_linear", "ffn_down_shexp")


_GRANITE = DEFAULTS | MULTIPLIERS | dict(num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.001)
_GRANITE_MODULES = ("block_sparse_moe.router", "block_sparse_moe.experts")
GRANITEMOE = Family(granitemoe_config, _granitemoe_layer, _GRANITE, moe=_GRANITE_MODULES)
GRANITEMOESHARED = Family(granitemoe_config, _granitemoe_layer, _GRANITE | dict(shared_intermediate_size=0), moe=_GRANITE_MODULES)

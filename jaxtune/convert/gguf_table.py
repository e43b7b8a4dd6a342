"""llama.cpp's name for each family, and the metadata of its files: one table for both directions."""


from jaxtune.convert import gguf_limits as limits
from jaxtune.convert import gguf_readers as readers
from jaxtune.convert.gguf_keys import (
    INNER,
    LEADING,
    LOGIT_SCALE,
    MULTIPLIERS,
    PATTERN,
    RECURRENT,
    ROUTING,
    SHARED,
    Architecture,
    Key,
    experts,
    moe,
    state,
    window,
)
from jaxtune.convert.gguf_rope import rope_parameters
from jaxtune.model.families import ModelConfig

_OWN = ("llama3", "divisors")
_GPT2 = dict(
    hidden_size="n_embd", intermediate_size="n_inner", num_hidden_layers="n_layer", num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)  # fmt: skip
_TANH = "gelu_pytorch_tanh"


def _sections(c: ModelConfig) -> list[int]:
    """The numbers of frequencies for time, height and width, which are the same for text."""
    return [(c.ropes[0].pairs + 2) // 3, (c.ropes[0].pairs + 1) // 3, c.ropes[0].pairs // 3, 0]


_DEEPSEEK = Architecture(
    "deepseek2",
    (
        *experts("n_routed_experts"),
        LEADING,
        Key("attention.head_count_kv", "", lambda c: 1),  # one key-value head, the latents themselves
        Key("attention.key_length", "", lambda c: c.latent and c.latent.kv_rank + c.latent.turning),
        Key("attention.value_length", "", lambda c: c.latent and c.latent.kv_rank),
        Key("attention.key_length_mla", "", lambda c: c.head_dim),
        Key("attention.value_length_mla", "v_head_dim", lambda c: c.latent and c.latent.value),
        Key("attention.kv_lora_rank", "kv_lora_rank", lambda c: c.latent and c.latent.kv_rank),
        Key("attention.q_lora_rank", "", lambda c: c.latent and c.latent.q_rank),
        Key("expert_shared_count", "", lambda c: c.moe and c.moe.shared_intermediate_size // c.moe.intermediate_size),
        *ROUTING,
        Key("rope.scaling.attn_factor", "", lambda c: None),
        Key("rope.scaling.yarn_log_multiplier", "", lambda c: 0.1 * weight if (weight := limits.mscale_all_dim(c)) else None),
    ),
    read=readers.deepseek,
    check=limits.deepseek,
    leading=True,
    scaled=True,
)  # fmt: skip
_DELTA = (
    Key("ssm.conv_kernel", "linear_conv_kernel_dim", lambda c: c.delta and c.delta.kernel),
    Key("ssm.state_size", "linear_key_head_dim", lambda c: c.delta and c.delta.key_dim),
    Key("ssm.group_count", "linear_num_key_heads", lambda c: c.delta and c.delta.key_heads),
    Key("ssm.time_step_rank", "linear_num_value_heads", lambda c: c.delta and c.delta.value_heads),
    Key("ssm.inner_size", "", lambda c: c.delta and c.delta.value_heads * c.delta.value_dim),
    Key("full_attention_interval", "full_attention_interval", lambda c: 4, 4),
)
_QWEN35 = Architecture("qwen35", (*_DELTA, Key("rope.dimension_sections", "", _sections)), read=readers.delta, check=limits.delta)
_LFM2 = Architecture(
    "lfm2", (RECURRENT, Key("shortconv.l_cache", "conv_L_cache", lambda c: c.convolution and c.convolution.kernel)),
    {"block_auto_adjust_ff_dim": False}, readers.lfm2, eps="norm_eps", shares=True,
)  # fmt: skip
_GRANITE = Architecture("granite", MULTIPLIERS, read=readers.LLAMA_BIASES, biases=("out", "mlp"), frequencies=_OWN, scaled=True)
_GRANITEMOE = _GRANITE._replace(
    name="granitemoe", keys=(*MULTIPLIERS, *experts("num_local_experts", inner=None)), read=readers.ATTENTION_BIAS, biases=("out",),
    normalize=True,
)  # fmt: skip
_HYBRID = _GRANITE._replace(
    name="granitehybrid",
    keys=(
        *MULTIPLIERS, RECURRENT, *(key._replace(missing=0) for key in experts("num_local_experts", inner=None)), SHARED._replace(hf=""),
        *state("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads"),
        Key("rope.scaling.finetuned", "", lambda c: bool(c.ropes)),
    ),
    read=readers.granite_hybrid, check=limits.granite_hybrid, biases=("out",), normalize=True, dense=True,
)  # fmt: skip
_GEMMA4 = Architecture(
    "gemma4",
    (
        window(), PATTERN, *(key._replace(missing=None) for key in experts("num_experts", "top_k_experts")),
        Key("final_logit_softcapping", "final_logit_softcapping", lambda c: c.logits_softcap or None, None),
        Key("feed_forward_length", "", limits.gemma4_widths),
        Key("attention.head_count_kv", "", lambda c: [c.at(layer).num_kv_heads for layer in range(c.num_layers)]),
        Key("attention.key_length", "", lambda c: c.wide and c.wide.head_dim), Key("attention.key_length_swa", "", lambda c: c.head_dim),
        Key("attention.value_length", "", lambda c: c.wide and c.wide.head_dim),
        Key("attention.value_length_swa", "", lambda c: c.head_dim),
        Key("attention.shared_kv_layers", "num_kv_shared_layers", lambda c: c.kv_sharing, 0),
        Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", lambda c: c.layer_inputs[1], 0),
        Key("rope.freq_base_swa", "", lambda c: c.ropes[1].theta), Key("rope.dimension_count_swa", "", lambda c: c.ropes[1].dim),
    ),
    read=readers.gemma4, check=limits.gemma4, activation=_TANH, period=None, dense=True, normalize=True, scaled=True,
)  # fmt: skip
_NEMOTRON_H = Architecture(
    "nemotron_h",
    (
        RECURRENT, Key("feed_forward_length", "", limits.nemotron_h_widths), Key("attention.layer_norm_epsilon", "", lambda c: c.norm_eps),
        *state("conv_kernel", "ssm_state_size", "n_groups", "mamba_num_heads"),
        *(key._replace(hf="") for key in (*experts(""), SHARED)), *(key for key in ROUTING if key.gguf != "expert_gating_func"),
        Key("expert_shared_count", "", lambda c: 1 if c.moe else None),
        Key("moe_latent_size", "moe_latent_size", lambda c: (c.moe and c.moe.latent_size) or None, None),
    ),
    {"mlp_hidden_act": "relu2", "time_step_min": 0.0}, readers.nemotron_h, limits.nemotron_h, eps="layer_norm_epsilon", activation="relu2",
    biases=("mlp",), head=True, dense=True,
)  # fmt: skip
_LLAMA = Architecture("llama", read=readers.LLAMA_BIASES, biases=("out", "mlp"), frequencies=_OWN)
_MISTRAL = _LLAMA._replace(keys=(window(None),), read=lambda m: {}, limited=True)
_GEMMA2 = Architecture(
    "gemma2",
    (
        window(4096),
        Key("attn_logit_softcapping", "attn_logit_softcapping", lambda c: c.attention_softcap or None, 50.0),
        Key("final_logit_softcapping", "final_logit_softcapping", lambda c: c.logits_softcap or None, 30.0),
    ),
    read=lambda m: {"query_pre_attn_scalar": readers.scalar(m, "gemma2")},
    check=limits.gemma2,
    activation=_TANH,
    period=2,
    scaled=True,
)

ARCHITECTURES: dict[str, Architecture] = {
    "afmoe": Architecture(
        "afmoe",
        (
            *experts("num_experts"), LEADING._replace(hf="num_dense_layers"), window(),
            Key("expert_shared_count", "num_shared_experts", lambda c: c.moe and c.moe.shared_intermediate_size // c.moe.intermediate_size),
            Key("expert_weights_scale", "route_scale", moe("scale"), 1.0), Key("expert_weights_norm", "", moe("normalize")),
            Key("expert_gating_func", "", lambda c: 2),
        ),
        {"mup_enabled": True, "global_attn_every_n_layers": 4}, check=limits.afmoe, period=4, leading=True,
    ),
    "apertus": Architecture(
        "apertus", read=readers.ATTENTION_BIAS, activation="xielu", biases=("out",), head=True, frequencies=_OWN, hf={"hidden_act": "xielu"}
    ),
    "arcee": Architecture("arcee", activation="relu2", frequencies=_OWN),
    "cohere": Architecture(
        "command-r", (LOGIT_SCALE,), read=lambda m: {"use_qk_norm": m.has("blk.0.attn_q_norm.weight")},
        check=limits.command_r, eps="layer_norm_eps", head=False, shares=True,
    ),
    "cohere2": Architecture(
        "cohere2", (LOGIT_SCALE, window()), {"sliding_window_pattern": 4}, eps="layer_norm_eps", head=False, shares=True,
        period=4,
    ),
    "deepseek_v2": _DEEPSEEK._replace(
        keys=tuple(key._replace(hf="" if key.hf == "norm_topk_prob" else key.hf) for key in _DEEPSEEK.keys), hf={"topk_method": "greedy"}
    ),
    "deepseek_v3": _DEEPSEEK,
    "dots1": Architecture(
        "dots1",
        (
            *experts("n_routed_experts"), LEADING, *ROUTING,
            Key("expert_shared_count", "n_shared_experts", lambda c: c.moe and c.moe.shared_intermediate_size // c.moe.intermediate_size),
        ),
        {"sliding_window": None}, check=limits.dots1, leading=True, head=True,
    ),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        (
            *experts("moe_num_experts", "moe_k"),
            LEADING._replace(hf="moe_layer_start_index"),
            SHARED._replace(hf="", missing=0),
            Key("interleave_moe_layer_step", "", lambda c: 1),
        ),
        read=readers.ernie_moe, leading=True, normalize=True,
    ),
    "exaone": Architecture("exaone", frequencies=_OWN),
    "exaone4": Architecture(
        "exaone4", (window(None), PATTERN), read=readers.layer_types, check=limits.exaone4, shares=True, period=None, frequencies=_OWN
    ),
    "falcon": Architecture("falcon", read=readers.falcon, check=limits.falcon, eps="layer_norm_epsilon", activation="gelu", shares=True),
    "falcon_h1": Architecture(
        "falcon-h1", state("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_ssm"),
        {"mamba_norm_before_gate": False, "mamba_d_head": None}, readers.falcon_h1, limits.falcon_h1, head=True,
    ),
    "gemma": Architecture("gemma", activation=_TANH),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2._replace(
        name="gemma3",
        keys=(
            window(),
            Key("final_logit_softcapping", "final_logit_softcapping", lambda c: c.logits_softcap or None, None),
            Key("rope.freq_base_swa", "", lambda c: c.ropes[1].theta),
        ),
        read=readers.gemma3, check=limits.gemma3, period=6,
    ),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm": Architecture("chatglm", read=lambda m: readers.partial(m) | readers.ATTENTION_BIAS(m), shares=True),
    "glm4": Architecture("glm4", read=lambda m: readers.partial(m) | readers.ATTENTION_BIAS(m)),
    "glm4_moe_lite": _DEEPSEEK,
    "glm4_moe": Architecture(
        "glm4moe",
        (
            *experts("n_routed_experts"), LEADING,
            *ROUTING,
            Key("expert_shared_count", "n_shared_experts", lambda c: c.moe and c.moe.shared_intermediate_size // c.moe.intermediate_size),
        ),
        read=lambda m: readers.partial(m) | readers.ATTENTION_BIAS(m) | {"use_qk_norm": m.has("blk.0.attn_q_norm.weight")},
        check=limits.glm4_moe, leading=True,
    ),
    "gpt2": Architecture("gpt2", eps="layer_norm_epsilon", renamed=_GPT2, activation=_TANH),
    "gpt_bigcode": Architecture(
        "starcoder", read=lambda m: {"multi_query": m("attention.head_count_kv") == 1}, eps="layer_norm_epsilon", renamed=_GPT2,
        activation=_TANH, biases=("mlp",),
    ),
    "gpt_neox": Architecture(
        "gptneox", (Key("use_parallel_residual", "use_parallel_residual", lambda c: c.parallel_residual, True),),
        read=lambda m: {"rotary_pct": readers.partial(m)["partial_rotary_factor"], "rotary_emb_base": m.get("rope.freq_base", 10000.0)},
        check=limits.all_biases, eps="layer_norm_eps", activation="gelu", biases=("out", "mlp"), head=True,
    ),
    "gpt_oss": Architecture(
        "gpt-oss", (*experts("num_local_experts", inner="intermediate_size"), window()),
        read=lambda m: {"rope_parameters": rope_parameters(m, m("attention.key_length")) | {"truncate": False}},
        check=limits.gpt_oss, biases=("out",), period=2, truncate=False,
    ),
    "granite": _GRANITE,
    "granitemoe": _GRANITEMOE,
    "granitemoehybrid": _HYBRID,
    "granitemoeshared": _GRANITEMOE._replace(keys=(*_GRANITEMOE.keys, SHARED._replace(hf="shared_intermediate_size"))),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "hunyuan_v1_moe": Architecture(
        "hunyuan-moe", (*experts("num_experts", inner=None), INNER, SHARED._replace(hf="")), normalize=True, frequencies=_OWN
    ),
    "internlm3": _LLAMA,
    "jais2": Architecture(
        "jais2", hf={"attention_bias": True, "mlp_bias": True}, check=limits.all_biases, eps="layer_norm_eps", activation="relu2",
        biases=("out", "mlp"),
    ),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2._replace(
        name="lfm2moe",
        keys=(
            *_LFM2.keys, *experts("num_experts"), LEADING._replace(hf="num_dense_layers"),
            Key("expert_gating_func", "", lambda c: 2),
        ),
        hf={"routed_scaling_factor": 1.0, "norm_topk_prob": True}, check=limits.lfm2_moe, leading=True, normalize=True,
    ),
    "llama": _LLAMA,
    "llama4_text": Architecture(
        "llama4",
        (
            *experts("num_local_experts"),
            Key("interleave_moe_layer_step", "interleave_moe_layer_step", lambda c: c.moe.layers[0] + 1 if c.moe else None),
        ),
        limits.LLAMA4, lambda m: {"use_qk_norm": m("expert_count") != 128}, limits.llama4,
        renamed={"intermediate_size": "intermediate_size_mlp", "moe_intermediate_size": "intermediate_size"}, frequencies=_OWN, every=True,
        period=4, normalize=False,
    ),
    "minimax_m2": Architecture(
        "minimax-m2", (*experts("num_local_experts", inner=None), INNER, Key("expert_gating_func", "", lambda c: 2)), read=readers.partial,
        head=True, normalize=True,
    ),
    "ministral": _MISTRAL,
    "ministral3": Architecture(
        "mistral3",
        (
            window(None),
            Key("attention.temperature_scale", "", lambda c: c.query_growth[0] or None),
            Key("rope.scaling.attn_factor", "", lambda c: None),
            Key("rope.scaling.yarn_log_multiplier", "", lambda c: 1.0 if c.ropes[0].kind == "yarn" else None),
        ),
        read=readers.ministral3, check=limits.ministral3, limited=True,
    ),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL._replace(keys=(window(None), *experts("num_local_experts", inner=None)), normalize=True),
    "nemotron": Architecture(
        "nemotron", read=lambda m: readers.partial(m) | readers.LLAMA_BIASES(m), eps="norm_eps", activation="relu2",
        biases=("out", "mlp"), head=True, shares=True,
    ),
    "nemotron_h": _NEMOTRON_H,
    "olmo": Architecture(
        "olmo", (Key("attention.clamp_kqv", "clip_qkv", lambda c: c.qkv_clip or None, None),), eps="", shares=True
    ),
    "olmo2": Architecture("olmo2", head=True, shares=True),
    "olmo3": Architecture("olmo2", (window(), PATTERN), read=readers.olmo3, check=limits.olmo3, head=True, shares=True, period=None),
    "olmoe": Architecture(
        "olmoe", experts("num_experts", inner=None), {"norm_topk_prob": False}, check=limits.olmoe, shares=True, normalize=False
    ),
    "phi": Architecture(
        "phi2", read=readers.partial, check=limits.phi, eps="layer_norm_eps", activation=_TANH, biases=("out", "mlp"), head=True,
        shares=True,
    ),
    "phi3": Architecture(
        "phi3", (window(None)._replace(of=lambda c: max(c.layer_windows)),), read=readers.phi3, frequencies=("longrope",), shares=True,
        limited=True,
    ),
    "qwen2": Architecture("qwen2", shares=True),
    "qwen2_moe": Architecture(
        "qwen2moe", (*experts("num_experts"), SHARED), {"norm_topk_prob": False}, check=limits.qwen2_moe, shares=True, normalize=False
    ),
    "qwen3": Architecture("qwen3"),
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35._replace(
        name="qwen35moe", keys=(*_QWEN35.keys, *experts("num_experts"), SHARED), normalize=True, check=limits.shared_delta
    ),
    "qwen3_next": Architecture(
        "qwen3next", (*_DELTA, *experts("num_experts"), SHARED), {"norm_topk_prob": True}, readers.delta, limits.shared_delta,
        normalize=True,
    ),
    "qwen3_moe": Architecture("qwen3moe", experts("num_experts"), {"norm_topk_prob": True}, normalize=True),
    "seed_oss": Architecture("seed_oss", read=readers.ATTENTION_BIAS),
    "smollm3": Architecture("smollm3", hf={"no_rope_layer_interval": 4}, check=limits.smollm3),
    "stablelm": Architecture(
        "stablelm", (Key("use_parallel_residual", "", lambda c: c.parallel_residual),), read=readers.stablelm,
        eps="layer_norm_eps", head=True, shares=True,
    ),
    "starcoder2": Architecture(
        "starcoder2", (window(None),), {"use_bias": True}, check=limits.all_biases, eps="norm_epsilon", activation=_TANH,
        biases=("out", "mlp"), shares=True, limited=True,
    ),
}  # fmt: skip
# general.architecture -> the family of a file, if no other shares it
MODEL_TYPES = {architecture.name: model_type for model_type, architecture in ARCHITECTURES.items()} | {"nemotron_h_moe": "nemotron_h"}

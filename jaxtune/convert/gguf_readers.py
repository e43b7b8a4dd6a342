"""config.json entries of a GGUF file that are more than the value of a key, by architecture."""

from collections.abc import Callable
from typing import Any

from jaxtune.convert import gguf_limits as limits
from jaxtune.convert.gguf_file import Metadata
from jaxtune.convert.gguf_keys import PATTERN
from jaxtune.convert.gguf_rope import partial_factor, rope_parameters
from jaxtune.errors import ModelError


def layer_types(m: Metadata) -> dict[str, Any]:
    """The kind of each layer, for an architecture whose files state it; older files had a full layer in every four."""
    given, layers = m.get(PATTERN.gguf), m("block_count")
    kinds = given if isinstance(given, list) else [bool((layer + 1) % (given or 4)) for layer in range(layers)]
    windows = m.get("attention.sliding_window")
    return {"layer_types": ["sliding_attention" if windows and sliding else "full_attention" for sliding in kinds]}


def biases(*names: tuple[str, str]) -> Callable[[Metadata], dict[str, Any]]:
    """Flags of config.json, and the tensors of the first layer whose presence sets them."""
    return lambda m: {flag: m.has(f"blk.0.{tensor}.bias") for flag, tensor in names}


LLAMA_BIASES = biases(("attention_bias", "attn_q"), ("mlp_bias", "ffn_up"))
ATTENTION_BIAS = biases(("attention_bias", "attn_q"))


def head_dim(m: Metadata) -> int:
    """The size of a head, which only some files state."""
    return m("attention.key_length") if m.get("attention.key_length") else m("embedding_length") // m("attention.head_count")


def partial(m: Metadata) -> dict[str, Any]:
    """The default of partly rotated heads."""
    size = head_dim(m)
    return {"partial_rotary_factor": partial_factor(m.get("rope.dimension_count", size), size)}


def scalar(m: Metadata, model_type: str) -> int:
    """Gemma's `query_pre_attn_scalar`, as used by llama.cpp."""
    return limits.gemma_scalar(
        model_type, m("block_count"), m("embedding_length"), m("attention.head_count"), m("attention.key_length")
    )


def gemma3(m: Metadata) -> dict[str, Any]:
    """Its scale, and a rotary scheme for each kind of layer."""
    full = rope_parameters(m, m("attention.key_length")) | {"rope_theta": m.get("rope.freq_base", 1e6)}
    sliding = {"rope_type": "default", "rope_theta": m.get("rope.freq_base_swa", 10000.0)}
    return {"query_pre_attn_scalar": scalar(m, "gemma3_text"), "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def gemma4(m: Metadata) -> dict[str, Any]:
    """What differs between full layers and those with windows; which layers have keys as values; experts."""
    kinds, (full, sliding) = layer_types(m)["layer_types"], (m.get("rope.freq_base", 1e6), m.get("rope.freq_base_swa", 1e4))
    first = {kind: kinds.index(kind) for kind in set(kinds)}
    heads, widths = (of if isinstance(of := m.get(key), list) else [of] for key in ("attention.head_count_kv", "feed_forward_length"))
    size = m("attention.key_length")
    turning = 2 * int((m.file.read("rope_freqs.weight") < 2).sum()) if m.has("rope_freqs.weight") else size
    ropes = {"full_attention": {"rope_type": "proportional", "rope_theta": full, "partial_rotary_factor": partial_factor(turning, size)}}
    return {
        "layer_types": kinds, "rope_parameters": ropes | {"sliding_attention": {"rope_type": "default", "rope_theta": sliding}},
        "intermediate_size": widths[0], "use_double_wide_mlp": widths[-1] != widths[0],
        "head_dim": m("attention.key_length_swa"), "global_head_dim": size,
        "num_key_value_heads": heads[first.get("sliding_attention", 0) % len(heads)],
        "num_global_key_value_heads": heads[first.get("full_attention", 0) % len(heads)],
        "attention_k_eq_v": not m.has(f"blk.{first.get('full_attention', 0)}.attn_v.weight"),
        "enable_moe_block": bool(m.get("expert_count")), "vocab_size_per_layer_input": m.file.tensors["token_embd.weight"].shape[0],
    }  # fmt: skip


def olmo3(m: Metadata) -> dict[str, Any]:
    """The kinds of layers, and a rotary scheme for each."""
    full = rope_parameters(m, head_dim(m))
    sliding = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    return layer_types(m) | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def falcon(m: Metadata) -> dict[str, Any]:
    """Which of Falcon's two architectures it is."""
    heads, kv_heads, two = m("attention.head_count"), m("attention.head_count_kv"), m.has("blk.0.attn_norm_2.weight")
    new = two or kv_heads not in (1, heads)
    return {
        "num_kv_heads": kv_heads, "new_decoder_architecture": new, "multi_query": kv_heads == 1, "num_ln_in_parallel_attn": 1 + two,
        "ffn_hidden_size": m("feed_forward_length"), "parallel_attn": True, "bias": False, "alibi": False,
    }  # fmt: skip


def deepseek(m: Metadata) -> dict[str, Any]:
    """Head sizes, which the file stores as sums, and YaRN's effect on the attention."""
    if m.get("attention.key_length_mla") is None:
        raise ModelError(f"{m.file.path}: an old DeepSeek file without attention.key_length_mla cannot be read; convert the model anew")
    turning, inner = m("rope.dimension_count"), m("expert_feed_forward_length")
    rope = rope_parameters(m, turning)
    if weight := m.get("rope.scaling.yarn_log_multiplier"):
        rope |= {"mscale": 10 * weight, "mscale_all_dim": 10 * weight}
    return {
        "num_key_value_heads": m("attention.head_count"), "head_dim": turning, "q_lora_rank": m.get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": turning, "qk_nope_head_dim": m("attention.key_length_mla") - turning, "rope_parameters": rope,
        "n_shared_experts": m("expert_shared_count"), "moe_intermediate_size": inner,
    }  # fmt: skip


def ministral3(m: Metadata) -> dict[str, Any]:
    """YaRN, and the scaling of queries."""
    rope = rope_parameters(m, m("attention.key_length"))
    weight, growth = m.get("rope.scaling.yarn_log_multiplier"), m.get("attention.temperature_scale")
    rope |= {"mscale": 1.0, "mscale_all_dim": weight} if weight else {}
    return {"rope_parameters": rope | ({"llama_4_scaling_beta": growth} if growth else {})}


def phi3(m: Metadata) -> dict[str, Any]:
    """The length at which longrope's factors change."""
    return {"original_max_position_embeddings": m.get("rope.scaling.original_context_length") or m("context_length")}


def stablelm(m: Metadata) -> dict[str, Any]:
    """Flags that follow from the tensors."""
    flags = {"use_qkv_bias": m.has("blk.0.attn_q.bias"), "use_parallel_residual": not m.has("blk.0.ffn_norm.weight")}
    return partial(m) | flags | {"qk_layernorm": m.has("blk.0.attn_q_norm.weight")}


def ernie_moe(m: Metadata) -> dict[str, Any]:
    """The shared expert."""
    shared = m.get("expert_shared_feed_forward_length", 0) // m("expert_feed_forward_length")
    return {"moe_num_shared_experts": shared, "moe_layer_interval": 1, "moe_layer_end_index": -1, "use_bias": False}


def delta(m: Metadata) -> dict[str, Any]:
    """The width of value heads in linear layers."""
    return {"linear_value_head_dim": m("ssm.inner_size") // m("ssm.time_step_rank")}


def _attending(m: Metadata, other: str) -> list[str]:
    """The kind of each layer: those with key heads are attention layers."""
    heads = m.get("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * m("block_count")
    return ["full_attention" if number else other for number in heads]


def lfm2(m: Metadata) -> dict[str, Any]:
    """Which layers attend."""
    return {"layer_types": _attending(m, "conv")}


def granite_hybrid(m: Metadata) -> dict[str, Any]:
    """Which layers are attention, and the settings that the file expresses differently."""
    kinds, inner = _attending(m, "linear_attention"), m("ssm.inner_size")
    return {
        "layer_types": kinds, "position_embedding_type": "rope" if m.get("rope.scaling.finetuned", True) else "nope",
        "shared_intermediate_size": m.get("expert_shared_feed_forward_length") or m("feed_forward_length"),
        "mamba_d_head": inner // m("ssm.time_step_rank"), "mamba_expand": inner // m("embedding_length"),
        "mamba_conv_bias": m.has(*(f"blk.{layer}.ssm_conv1d.bias" for layer in range(len(kinds)))),
    } | ATTENTION_BIAS(m)  # fmt: skip


def falcon_h1(m: Metadata) -> dict[str, Any]:
    """Norms and biases of its Mamba part; what files call multipliers is in the matrices here."""
    return {"mamba_rms_norm": m.has("blk.0.ssm_norm.weight"), "mamba_conv_bias": m.has("blk.0.ssm_conv1d.bias")}


def nemotron_h(m: Metadata) -> dict[str, Any]:
    """What each layer is: it attends where it has heads of keys, is a feed-forward part where that has a width, and else Mamba-2."""
    layers, widths = m("block_count"), m.get("feed_forward_length")
    widths = widths if isinstance(widths, list) else [widths] * layers
    fed, inner = "moe" if m.get("expert_count") else "mlp", "intermediate_size"
    experts = {"n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count", f"moe_{inner}": "expert_feed_forward_length"}
    experts[f"moe_shared_expert_{inner}"] = "expert_shared_feed_forward_length"
    kinds = [fed if width else kind for kind, width in zip(_attending(m, "linear_attention"), widths, strict=True)]
    return {
        "layers_block_type": kinds, "intermediate_size": max(widths) or 1, "num_hidden_layers": layers,
        "mamba_head_dim": m("ssm.inner_size") // m("ssm.time_step_rank"),
        "use_conv_bias": m.has(*(f"blk.{layer}.ssm_conv1d.bias" for layer in range(layers))),
        "mlp_bias": m.has(*(f"blk.{layer}.ffn_up.bias" for layer in range(layers))),
    } | ({key: m(said) for key, said in experts.items()} if fed == "moe" else {})  # fmt: skip

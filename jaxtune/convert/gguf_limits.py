"""What llama.cpp's loaders and graphs do not support, by architecture: refused here, with the reason."""

import dataclasses
import logging
import math

from jaxtune.convert.gguf_keys import Architecture
from jaxtune.convert.gguf_rope import mscale
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.layers import ACTIVATIONS

log = logging.getLogger("jaxtune")


def check(c: ModelConfig, a: Architecture) -> None:
    """ModelError for what this architecture's loader or graph does not support."""
    if c.file_layers:
        raise ModelError(f"llama.cpp has no {c.outer} models; export it with --format hf (or its adapter with --format peft)")
    if c.out_bias and "out" not in a.biases:
        raise ModelError(f"llama.cpp knows no bias of the attention's output in a {a.name} model; this one has attention_bias")
    if c.mlp_bias and "mlp" not in a.biases:
        raise ModelError(f"llama.cpp knows no biases of the feed-forward part of a {a.name} model; this one has mlp_bias")
    if ACTIVATIONS.get(c.hidden_act, c.hidden_act) != ACTIVATIONS.get(a.activation, a.activation):
        raise ModelError(f"llama.cpp computes {a.activation} in a {a.name} model; this one has hidden_act {c.hidden_act}")
    if a.shares and c.num_heads * c.head_dim != c.hidden_size:
        raise ModelError(f"llama.cpp takes hidden_size / num_attention_heads for the head_dim of a {a.name} model; not this one")
    if a.head is not None and c.tie_word_embeddings is a.head:
        raise ModelError(f"llama.cpp wants {'a head of its own' if a.head else 'no head but the embedding'} in a {a.name} model")
    if not a.scaled and not math.isclose(c.attention_scale, c.head_dim**-0.5, rel_tol=1e-6):
        raise ModelError(f"llama.cpp scales the attention of a {a.name} model by head_dim ** -0.5; this one has {c.attention_scale:g}")
    if not c.ropes and a.name not in ("gpt2", "starcoder", "granitehybrid", "nemotron_h", "nemotron_h_moe"):
        raise ModelError(f"llama.cpp turns queries and keys in a {a.name} model; this one has no rotary positions")
    own = [rope.kind for rope in c.ropes if rope.kind in ("llama3", "divisors", "longrope") and rope.kind not in a.frequencies]
    if own:
        raise ModelError(f"llama.cpp reads no frequencies of rope_type {own[0]} in a {a.name} model; this one cannot be written")
    _check_windows(c, a)
    _check_experts(c, a)
    a.check(c)


def _check_windows(c: ModelConfig, a: Architecture) -> None:
    windows = [bool(window) for window in c.layer_windows]
    if a.period == 0 and any(windows) and not a.limited:
        raise ModelError(f"llama.cpp has no windows in a {a.name} model; this one has (sliding_window, use_sliding_window)")
    if a.period and windows != [bool((layer + 1) % a.period) for layer in range(c.num_layers)]:
        raise ModelError(f"llama.cpp runs {c.model_type} with a full layer every {a.period}; this model's layer_types differ")


def _check_experts(c: ModelConfig, a: Architecture) -> None:
    if not any(key.gguf == "expert_count" for key in a.keys) or c.moe is None and a.dense:
        return
    where = "layers of one step" if a.every else "the last layers" if a.leading else "every layer"
    first, step = (c.moe.layers[0] if c.moe and (a.leading or a.every) else 0), (c.moe.layers[0] + 1 if c.moe and a.every else 1)
    known = c.feed_forward_only or range(first, c.num_layers, step)
    if c.moe is None or list(c.moe.layers) != list(known):
        raise ModelError(f"llama.cpp runs {c.model_type} with experts in {where}; this model differs")
    if a.normalize is not None and c.moe.normalize is not a.normalize:
        raise ModelError(f"llama.cpp runs {c.model_type} {'with' if a.normalize else 'without'} norm_topk_prob only; this model differs")


def olmoe(c: ModelConfig) -> None:
    """Heads of keys."""
    if c.num_kv_heads != c.num_heads:
        raise ModelError("llama.cpp runs OLMoE with as many heads of keys as of queries; this model has fewer (num_key_value_heads)")


def qwen2_moe(c: ModelConfig) -> None:
    """Biases."""
    if not c.qkv_bias:
        raise ModelError("llama.cpp wants biases of q, k and v in a qwen2moe model; this one has qkv_bias false")


def gpt_oss(c: ModelConfig) -> None:
    """The experts' gate, and biases."""
    if c.moe is None or c.moe.clamp != (7.0, 1.702) or not c.qkv_bias:
        raise ModelError("llama.cpp runs gpt_oss with attention_bias and swiglu_limit 7 only; this model differs")
    if c.ropes[0].kind == "yarn":
        log.warning("llama.cpp rounds the limits of yarn, and this model does not (truncate false): its logits there are a little others")


# llama.cpp does not read Gemma's scale: the largest models derive it from the residual width per head, all others from the head size
_LARGEST = {"gemma2": 46, "gemma3_text": 62}


def gemma_scalar(model_type: str, layers: int, width: int, heads: int, head_dim: int) -> int:
    """The value that llama.cpp uses for `query_pre_attn_scalar`."""
    return width // heads if layers == _LARGEST[model_type] else head_dim


def gemma2(c: ModelConfig) -> None:
    """The scale; soft caps."""
    scalar = gemma_scalar(c.model_type, c.num_layers, c.hidden_size, c.num_heads, c.head_dim)
    if not math.isclose(c.attention_scale, scalar**-0.5, rel_tol=1e-6):
        raise ModelError(f"llama.cpp takes {scalar} as query_pre_attn_scalar of a {c.model_type} of {c.num_layers} layers; not this one")
    if c.model_type == "gemma2" and not (c.logits_softcap and c.attention_softcap):
        raise ModelError("llama.cpp caps attention and logits of every gemma2 model; this one lacks attn_ or final_logit_softcapping")


def gemma3(c: ModelConfig) -> None:
    """As Gemma 2; the rotation in layers with windows."""
    gemma2(c)
    if c.ropes[1].kind != "default":
        raise ModelError("llama.cpp has no rotary scaling for the sliding layers of Gemma 3; this model has")


def gemma4_widths(c: ModelConfig) -> list[int]:
    """How wide the feed-forward part of each layer is."""
    return [c.intermediate_size * (1 if c.kv_source(layer) == layer else c.kv_sharing_mlp) for layer in range(c.num_layers)]


def gemma4(c: ModelConfig) -> None:
    """Biases, windows, and how each kind of layer turns."""
    if c.qkv_bias or not any(c.layer_windows) or [(rope.kind, rope.factor) for rope in c.ropes] != [("proportional", 1), ("default", 1)]:
        raise ModelError(
            "llama.cpp runs Gemma 4 without attention_bias, with windows, and rotary positions that are proportional in full layers and "
            "plain in the others; this model differs"
        )


def smollm3(c: ModelConfig) -> None:
    """Which layers have no positions."""
    if [rope < 0 for rope in c.layer_ropes] != [(layer + 1) % 4 == 0 for layer in range(c.num_layers)]:
        raise ModelError("llama.cpp runs SmolLM3 without positions in every fourth layer; this model differs")


def olmo3(c: ModelConfig) -> None:
    """The rotation in layers with windows."""
    if c.ropes[1] != dataclasses.replace(c.ropes[1], kind="default", theta=c.ropes[0].theta) or not any(c.layer_windows):
        raise ModelError("llama.cpp runs OLMo 3 with windows, whose layers turn by the same unscaled rope_theta; this model differs")


def exaone4(c: ModelConfig) -> None:
    """Which layers have windows."""
    if list(map(bool, c.layer_windows)) != [c.num_layers == 64 and bool((layer + 1) % 4) for layer in range(c.num_layers)]:
        raise ModelError("llama.cpp runs EXAONE 4 with windows in three of four layers if it has 64, else with none; this model differs")


def command_r(c: ModelConfig) -> None:
    """Norms of queries and keys."""
    if c.qk_norm is not (c.num_layers >= 64):
        raise ModelError("llama.cpp runs Cohere with use_qk_norm if it has 64 layers or more, else without; this model differs")


def phi(c: ModelConfig) -> None:
    """Norms of queries and keys."""
    if c.qk_norm:
        raise ModelError("llama.cpp has no norms of queries and keys in a phi2 model; this one has qk_layernorm")


def all_biases(c: ModelConfig) -> None:
    """Biases that are not optional there."""
    if not (c.qkv_bias and c.out_bias and c.mlp_bias):
        raise ModelError(f"llama.cpp wants all biases in a {c.model_type} model; this one lacks some (use_bias, attention_bias)")


def falcon(c: ModelConfig) -> None:
    """The order of a layer's parts."""
    if c.alibi:
        raise ModelError("llama.cpp runs Falcon with rotary positions; this model has ALiBi (alibi)")
    if not c.parallel_residual or c.qkv_bias:
        raise ModelError("llama.cpp runs Falcon with parallel_attn and without bias; this model differs")


def deepseek(c: ModelConfig) -> None:
    """Biases, groups of experts, and YaRN's effect on the attention."""
    assert c.latent is not None and c.moe is not None
    rope, groups = c.ropes[0], c.moe.groups
    if c.qkv_bias or not c.moe.shared_intermediate_size or c.latent.q_rank and c.num_layers in (26, 27):
        raise ModelError("llama.cpp runs DeepSeek without attention_bias, with a shared expert, and 26 or 27 layers without q_lora_rank")
    if groups[0] > groups[1] and not c.moe.sigmoid:
        raise ModelError("llama.cpp chooses groups of experts as DeepSeek V3 does, not as topk_method group_limited_greedy")
    if not math.isclose(c.norm_eps, 1e-6, rel_tol=1e-3):
        log.warning("llama.cpp takes rms_norm_eps=%g for the latents' norms too, which is 1e-6 in transformers", c.norm_eps)
    if not rope.interleaved:
        raise ModelError("llama.cpp turns neighbouring dimensions of a DeepSeek model; this one has rope_interleave false")
    if not math.isclose(c.attention_scale, c.head_dim**-0.5 * mscale(rope.factor, mscale_all_dim(c) or 0.0) ** 2, rel_tol=1e-6) or (
        rope.kind == "yarn" and not math.isclose(rope.attention_factor, 1, rel_tol=1e-6)
    ):
        raise ModelError("llama.cpp runs DeepSeek's yarn with mscale and mscale_all_dim alike; this model's differ")


def mscale_all_dim(c: ModelConfig) -> float | None:
    """DeepSeek's `mscale_all_dim`, which scales its attention."""
    rope = c.ropes[0]
    return (math.sqrt(c.attention_scale * c.head_dim**0.5) - 1) / (0.1 * math.log(rope.factor)) if rope.kind == "yarn" else None


def glm4_moe(c: ModelConfig) -> None:
    """The shared expert."""
    if c.moe and not c.moe.shared_intermediate_size:
        raise ModelError("llama.cpp runs GLM 4.5 with a shared expert; this model has none")


def delta(c: ModelConfig) -> None:
    """Which layers are linear, the width of their heads, and the epsilon for normalising queries and keys."""
    if not math.isclose(c.norm_eps, 1e-6, rel_tol=1e-3):
        raise ModelError(f"llama.cpp takes rms_norm_eps for what is 1e-6 in {c.model_type}'s linear layers; this model has {c.norm_eps:g}")
    if c.delta is None or c.delta.key_dim != c.delta.value_dim or c.delta.layers != tuple(i for i in range(c.num_layers) if (i + 1) % 4):
        raise ModelError(
            f"llama.cpp runs {c.model_type} with full attention in every fourth layer, and linear heads of values as wide as those of "
            "keys; this model differs"
        )


def shared_delta(c: ModelConfig) -> None:
    """As `delta`; the shared expert."""
    delta(c)
    if c.moe and not c.moe.shared_intermediate_size:
        raise ModelError(f"llama.cpp runs {c.model_type} with a shared expert; this model has none")


def dots1(c: ModelConfig) -> None:
    """Key heads; groups; the shared expert."""
    if c.num_kv_heads != c.num_heads:
        raise ModelError("llama.cpp runs dots.llm1 with as many heads of keys as of queries; this model has fewer (num_key_value_heads)")
    if c.moe and (c.moe.groups != (1, 1) or not c.moe.shared_intermediate_size):
        raise ModelError("llama.cpp runs dots.llm1 without groups of experts and with a shared expert; this model differs")


def lfm2_moe(c: ModelConfig) -> None:
    """The weights of experts."""
    if c.moe and c.moe.scale != 1:
        raise ModelError(f"llama.cpp reads no routed_scaling_factor of an lfm2_moe model; this one has {c.moe.scale:g}")


def granite_hybrid(c: ModelConfig) -> None:
    """The width of the Mamba layers."""
    if c.mamba and c.mamba.width != 2 * c.hidden_size:
        raise ModelError("llama.cpp runs Granite 4.0 with mamba_expand 2; this model differs")


def ministral3(c: ModelConfig) -> None:
    """The scaling of queries, and YaRN's effect on the attention."""
    rope, growth, length = c.ropes[0], c.query_growth.rate, c.query_growth.length
    if rope.kind != "yarn" and growth or growth and length != rope.original_max:
        raise ModelError("llama.cpp lets Ministral 3's queries grow by yarn's original_max_position_embeddings; this model differs")
    if rope.kind == "yarn" and not math.isclose(rope.attention_factor, 1, rel_tol=1e-6):
        raise ModelError("llama.cpp runs Ministral 3 with mscale and mscale_all_dim of 1; this model's differ")


def afmoe(c: ModelConfig) -> None:
    """The embedding's scale; the expert that all tokens share."""
    if not math.isclose(c.embedding_multiplier, c.hidden_size**0.5, rel_tol=1e-6):
        raise ModelError("llama.cpp runs AFMoE with mup_enabled; this model has it off")
    if c.moe and not c.moe.shared_intermediate_size:
        raise ModelError("llama.cpp runs AFMoE with shared experts; this model has none (num_shared_experts)")


def falcon_h1(c: ModelConfig) -> None:
    """Where the norm of the Mamba part stands, and biases."""
    assert c.mamba is not None
    if c.mamba.norm == "before" or c.mamba.out_bias or c.qkv_bias:
        raise ModelError("llama.cpp runs Falcon H1 without biases, its norm after the gate (mamba_norm_before_gate); this model differs")


# what llama.cpp's graph of Llama 4 has in itself
LLAMA4 = {
    "attention_chunk_size": 8192, "no_rope_layer_interval": 4, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
}  # fmt: skip


def llama4(c: ModelConfig) -> None:
    """Chunks, layers without rotation, how queries grow, norms, and how wide experts are."""
    assert c.moe is not None
    turning = [bool((layer + 1) % 4) for layer in range(c.num_layers)]
    growth = c.query_growth == (LLAMA4["attn_scale"], LLAMA4["floor_scale"], 1, True)
    if [rope >= 0 for rope in c.layer_ropes] != turning or list(c.layer_windows) != [-8192 * turns for turns in turning] or not growth:
        raise ModelError(
            "llama.cpp runs Llama 4 in chunks of 8192, every fourth layer without rotation, where queries grow by attn_scale 0.1 and "
            "floor_scale 8192; this model differs"
        )
    if bool(c.bare_norms) is (c.moe.num_experts == 128):
        raise ModelError("llama.cpp runs Llama 4 with use_qk_norm, but for models of 128 experts; this model differs")


def nemotron_h_widths(c: ModelConfig) -> list[int]:
    """How wide the feed-forward part of each layer is; 0: it has none."""
    inner = c.moe.intermediate_size if c.moe else c.intermediate_size
    return [inner if layer in c.feed_forward_only else 0 for layer in range(c.num_layers)]


def nemotron_h(c: ModelConfig) -> None:
    """Biases beside experts; time steps."""
    if c.mamba is None or c.moe and (c.mlp_bias or not c.moe.shared_intermediate_size):
        raise ModelError("llama.cpp runs Nemotron H with Mamba-2 layers, its mixtures without mlp_bias and with a shared expert")
    if c.mamba.least_step:
        log.warning("llama.cpp lets time steps be less than time_step_min=%g: its logits may be a little others", c.mamba.least_step)

"""What a model is: `ModelConfig`, and how to read it from the config.json of each Hugging Face `model_type`.

A family is an entry of `FAMILIES`: a function from config.json to `ModelConfig`, and one that lists a layer's rows. Optional parts of a
block (biases, query/key norms, post-norms, fused projections, experts) are rows of the row table: the decoder uses what it finds.

transformers is the reference. Keys that its model code does not read have no effect there and are ignored here; dropout rates only matter
in training and are not applied here; a key that it reads and jaxtune does not implement is in the family's `refused` list.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families import heads, nested
from jaxtune.model.families.afmoe import AFMOE
from jaxtune.model.families.apertus import APERTUS, APERTUS1P5
from jaxtune.model.families.bamba import BAMBA, MAMBA2
from jaxtune.model.families.base import Family, ModelConfig, Moe, Pattern
from jaxtune.model.families.bloom import BLOOM, MPT
from jaxtune.model.families.cohere import COHERE, COHERE2, COHERE2_MOE
from jaxtune.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, MINICPM3, MISTRAL4, SARVAM_MLA, YOUTU
from jaxtune.model.families.ernie import ERNIE4_5_MOE
from jaxtune.model.families.exaone import EXAONE
from jaxtune.model.families.falcon import FALCON
from jaxtune.model.families.falcon_h1 import FALCON_H1
from jaxtune.model.families.gemma import GEMMA, GEMMA2, GEMMA3, VAULTGEMMA
from jaxtune.model.families.gemma3n import GEMMA3N
from jaxtune.model.families.gemma4 import GEMMA4, GEMMA4_UNIFIED
from jaxtune.model.families.glm import GLM, GLM4
from jaxtune.model.families.glm4_moe import DOTS1, GLM4_MOE, GLM4_MOE_LITE, SOLAR_OPEN
from jaxtune.model.families.gpt2 import CODEGEN, GPT2, GPT_BIGCODE, GPT_NEO, GPTJ
from jaxtune.model.families.gpt_neox import GPT_NEOX
from jaxtune.model.families.gpt_oss import GPT_OSS
from jaxtune.model.families.granite_hybrid import GRANITEMOEHYBRID
from jaxtune.model.families.granite_swa import GRANITE_SWA, GRANITEMOE_SWA
from jaxtune.model.families.hunyuan import HUNYUAN, HUNYUAN_MOE, HY_V3
from jaxtune.model.families.layer_norms import ARCEE, JAIS2, NEMOTRON, PHI, STABLELM, STARCODER2
from jaxtune.model.families.lfm2 import LFM2, LFM2_MOE, LFM3
from jaxtune.model.families.llama import (
    CWM,
    ERNIE4_5,
    GRANITE,
    HELIUM,
    HYPERCLOVAX,
    INTERNLM3,
    IQUESTCODER,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
)
from jaxtune.model.families.llama4 import LLAMA4
from jaxtune.model.families.moe import GRANITEMOE, GRANITEMOESHARED, MELLUM, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from jaxtune.model.families.nanochat import NANOCHAT
from jaxtune.model.families.nemotron_h import NEMOTRON_H
from jaxtune.model.families.nested import NESTED
from jaxtune.model.families.olmo import EXAONE4, EXAONE_MOE, FLEX_OLMO, OLMO, OLMO2, OLMO3
from jaxtune.model.families.olmo_hybrid import OLMO_HYBRID
from jaxtune.model.families.opt import OPT
from jaxtune.model.families.phimoe import MINIMAX_M2, PHIMOE
from jaxtune.model.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

__all__ = ["FAMILIES", "NESTED", "Family", "ModelConfig", "Moe", "Pattern", "from_hf"]

FAMILIES: dict[str, Family] = {
    "afmoe": AFMOE,
    "apertus": APERTUS,
    "apertus1p5_text": APERTUS1P5,
    "arcee": ARCEE,
    "bamba": BAMBA,
    "bloom": BLOOM,
    "codegen": CODEGEN,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "cohere2_moe": COHERE2_MOE,
    "cwm": CWM,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "dots1": DOTS1,
    "exaone": EXAONE,
    "ernie4_5": ERNIE4_5,
    "exaone4": EXAONE4,
    "exaone_moe": EXAONE_MOE,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "falcon": FALCON,
    "falcon_h1": FALCON_H1,
    "flex_olmo": FLEX_OLMO,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "granite": GRANITE,
    "granite_swa": GRANITE_SWA,
    "granitemoe": GRANITEMOE,
    "granitemoe_swa": GRANITEMOE_SWA,
    "granitemoehybrid": GRANITEMOEHYBRID,
    "granitemoeshared": GRANITEMOESHARED,
    "helium": HELIUM,
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": HUNYUAN_MOE,
    "hy_v3": HY_V3,
    "hyperclovax": HYPERCLOVAX,
    "internlm3": INTERNLM3,
    "iquestcoder": IQUESTCODER,
    "jais2": JAIS2,
    "lfm2": LFM2,
    "lfm2_moe": LFM2_MOE,
    "lfm3": LFM3,
    "llama": LLAMA,
    "llama4_text": LLAMA4,
    "mamba2": MAMBA2,
    "mellum": MELLUM,
    "minicpm3": MINICPM3,
    "minimax_m2": MINIMAX_M2,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mistral4": MISTRAL4,
    "mixtral": MIXTRAL,
    "mpt": MPT,
    "nanochat": NANOCHAT,
    "nemotron": NEMOTRON,
    "nemotron_h": NEMOTRON_H,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmo_hybrid": OLMO_HYBRID,
    "olmoe": OLMOE,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "phimoe": PHIMOE,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "sarvam_mla": SARVAM_MLA,
    "seed_oss": SEED_OSS,
    "smollm3": SMOLLM3,
    "solar_open": SOLAR_OPEN,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
    "vaultgemma": VAULTGEMMA,
    "youtu": YOUTU,
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a config.json dict; ModelError for an unsupported family or switch."""
    if nested.is_nested(hf):
        return dataclasses.replace(from_hf(nested.text_config(hf)), **nested.fields(hf))
    model_type = hf.get("model_type")
    if model_type == "mistral" and hf.get("layer_types"):  # as in transformers' AutoConfig: windows by layer
        return dataclasses.replace(from_hf({**hf, "model_type": "ministral"}), hf_json=json.dumps(hf))
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join([*FAMILIES, *NESTED])}")
    family = FAMILIES[model_type]
    for key in family.required:
        if not isinstance(hf.get(key), int) or hf[key] < 1:
            given = f"has {key}={hf[key]!r}" if key in hf else f"lacks {key}"
            raise ModelError(f"this {model_type} model {given}; it needs a positive whole number there")
    _check_values(hf, family)
    for key, harmless in family.refused.items():
        if hf.get(key, harmless[0]) not in harmless:
            raise ModelError(f"{key}={hf[key]!r} is not implemented for {model_type}; only {key}={harmless[-1]!r} is")
    settings = {**family.defaults, **hf}
    config, padding = family.config(settings), settings.get("pad_token_id")
    if family.pads and type(padding) is int and padding < config.vocab_size:
        config = dataclasses.replace(config, padding_idx=padding % config.vocab_size)
    return dataclasses.replace(config, **heads.fields(settings), hf_json=json.dumps(hf))


def dropouts(config: ModelConfig) -> dict[str, float]:
    """The dropout rates of config.json that transformers applies in training and jaxtune does not, by key."""
    hf = json.loads(config.hf_json or "{}")
    said = {**hf, **nested.text_config(hf)} if nested.is_nested(hf) else hf
    own = {key: said[key] for key in said if key.endswith(("dropout", "pdrop")) and not key.startswith(("classifier", "summary"))}
    return {key: rate for key, rate in own.items() if isinstance(rate, int | float) and rate > 0}


# whose tensors are listed one by one
_LISTED = ("num_hidden_layers", "n_layer", "num_layers", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_COUNTS = ("intermediate_size", "num_key_value_heads", "num_kv_heads", "head_dim", "max_position_embeddings",
           "original_max_position_embeddings", "n_positions", "n_inner", "ffn_hidden_size", "sliding_window", "moe_intermediate_size",
           "full_attention_interval", "linear_conv_kernel_dim",
           "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "decoder_sparse_step",
           "moe_layer_interval", "no_rope_layer_interval", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim",
           "global_attn_every_n_layers", "global_head_dim", "num_global_key_value_heads", "vocab_size_per_layer_input",
           "output_vocab_size", "altup_num_inputs", "laurel_rank",
           "conv_L_cache", "seq_length", "max_seq_len", "block_ff_dim", "block_multiple_of",
           "attention_chunk_size", "floor_scale", "interleave_moe_layer_step", "intermediate_size_mlp",
           "mamba_n_heads", "mamba_n_groups", "mamba_d_ssm", "mamba_num_heads",
           "window_size", "prefix_dense_intermediate_size", "prefix_dense_sliding_window_pattern",
           "mamba_head_dim", "n_groups", "conv_kernel", "ssm_state_size", "mamba_d_state", "mamba_d_conv")  # fmt: skip
_WHOLE = (*_LISTED[3:], "num_experts_per_tok", "moe_k", "n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts",
          "first_k_dense_replace", "moe_layer_start_index", "moe_layer_end_index", "shared_intermediate_size",
          "shared_expert_intermediate_size", "max_window_layers", "q_lora_rank", "qk_nope_head_dim", "rotary_dim",
          "hidden_size_per_layer_input", "num_kv_shared_layers", "top_k_experts", "num_dense_layers", "altup_active_idx",
          "moe_latent_size", "moe_shared_expert_intermediate_size", "num_shared_experts")  # fmt: skip
_POSITIVE = ("rms_norm_eps", "rope_theta", "layer_norm_eps", "layer_norm_epsilon", "rope_local_base_freq", "rotary_emb_base",
             "query_pre_attn_scalar", "logit_scale", "norm_epsilon", "norm_eps", "clip_qkv", "partial_rotary_factor", "rotary_pct",
             "lm_head_multiplier", "logits_scaling", "scale_depth", "dim_model_base")  # fmt: skip
_LARGEST = 2**31 - 1  # positions are int32
_BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base")  # may be larger
_WANTED = {
    **dict.fromkeys(_COUNTS, "a whole number above 0"),
    **dict.fromkeys(_WHOLE, "a whole number"),
    **dict.fromkeys(_POSITIVE, "a number above 0"),
    **dict.fromkeys(("initializer_range", "attn_scale", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier"),
                    "a number"),
    **dict.fromkeys(("layer_types", "mlp_only_layers", "no_rope_layers", "full_attn_idxs", "layers_block_type", "mlp_layer_types",
                    "time_step_limit", "mlp_multipliers", "ssm_multipliers", "moe_layers", "layer_rope_theta", "attention_layers",
                    "attention_types", "attn_layer_indices"), "a list"),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), "an object"),
}
_KINDS = ((bool, "a truth value"), (int | float, "a number"), (str, "a text"))
# whose null has a meaning, whatever the default is
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "sliding_window_pattern", "q_lora_rank", "n_group", "topk_group",
             "attn_logit_softcapping", "final_logit_softcapping", "router_aux_loss_coef", "partial_rotary_factor", "rotary_dim",
             "pad_token_id", "initializer_range", "init_std", "rope_parameters", "attention_chunk_size", "mamba_d_ssm", "scale_depth",
             "dim_model_base")  # fmt: skip


def _check_values(hf: Mapping[str, Any], family: Family) -> None:
    """Check that values have the type that a key needs, or that of transformers' default; null where it has a meaning."""
    defaults = {**dict.fromkeys(_POSITIVE[:2], 1.0), **family.defaults}
    pairs = ((key, value if key in family.lists and isinstance(value, list) else [value]) for key, value in hf.items())
    for key, value in ((key, value) for key, values in pairs for value in values):
        if key in _LISTED and isinstance(value, int) and value > nested.MOST:
            raise ModelError(f"this {hf['model_type']} model has {key}={value}; at most {nested.MOST} are possible")
        if isinstance(value, int) and value > _LARGEST and key in _WANTED and key not in _BASES:
            raise ModelError(f"this {hf['model_type']} model has {key}={value}; at most {_LARGEST} is possible")
        default = defaults.get(key)
        wants = _WANTED.get(key) or next((name for kind, name in _KINDS if isinstance(default, kind)), "")
        if not wants or (value is None and (default is None or key in _NULLABLE)):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = {
            "a whole number above 0": number and isinstance(value, int) and (value > 0 or key == "sliding_window"),
            "a whole number": number and isinstance(value, int),
            "a number above 0": number and value > 0,
            "a truth value": isinstance(value, bool),
            "a number": number,
            "a text": isinstance(value, str),
            "a list": isinstance(value, list | tuple),
            "an object": isinstance(value, Mapping),
        }
        if not fits[wants]:
            raise ModelError(f"this {hf['model_type']} model has {key}={value!r}; it needs {wants} there")

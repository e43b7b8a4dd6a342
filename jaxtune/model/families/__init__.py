"""What a model is: `ModelConfig`, and how each Hugging Face `model_type` says it in its config.json.

A family is an entry of `FAMILIES`: a function from config.json to `ModelConfig`, and one that lists a layer's rows. Optional parts of
a block (biases, query/key norms, post-norms, fused projections, experts) are rows of the row table: the decoder uses what is there.

transformers is the reference. Keys that its model code does not read change nothing there and are ignored here; dropout rates are read
there in training only and are not applied here; a key that it reads and we do not implement is in the family's `refused` list.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families import heads, nested
from jaxtune.model.families.base import Family, ModelConfig, Moe, Pattern
from jaxtune.model.families.cohere import COHERE, COHERE2
from jaxtune.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from jaxtune.model.families.ernie import ERNIE4_5_MOE
from jaxtune.model.families.falcon import FALCON
from jaxtune.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxtune.model.families.glm import GLM, GLM4
from jaxtune.model.families.gpt2 import GPT2, GPT_BIGCODE, GPTJ
from jaxtune.model.families.gpt_neox import GPT_NEOX
from jaxtune.model.families.gpt_oss import GPT_OSS
from jaxtune.model.families.layer_norms import ARCEE, NEMOTRON, PHI, STABLELM, STARCODER2
from jaxtune.model.families.llama import (
    ERNIE4_5,
    GRANITE,
    HELIUM,
    HUNYUAN,
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
from jaxtune.model.families.moe import GRANITEMOE, GRANITEMOESHARED, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from jaxtune.model.families.nested import NESTED
from jaxtune.model.families.olmo import EXAONE4, OLMO, OLMO2, OLMO3
from jaxtune.model.families.opt import OPT
from jaxtune.model.families.qwen3_5 import QWEN3_5

__all__ = ["FAMILIES", "NESTED", "Family", "ModelConfig", "Moe", "Pattern", "from_hf"]

FAMILIES: dict[str, Family] = {
    "arcee": ARCEE,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "ernie4_5": ERNIE4_5,
    "exaone4": EXAONE4,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neox": GPT_NEOX,
    "gpt_oss": GPT_OSS,
    "gptj": GPTJ,
    "granite": GRANITE,
    "granitemoe": GRANITEMOE,
    "granitemoeshared": GRANITEMOESHARED,
    "helium": HELIUM,
    "hunyuan_v1_dense": HUNYUAN,
    "llama": LLAMA,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "nemotron": NEMOTRON,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_text": QWEN3_5,
    "qwen3_moe": QWEN3_MOE,
    "seed_oss": SEED_OSS,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` of a config.json dict; `ModelError` for a family or a switch we do not implement."""
    if nested.is_nested(hf):
        return dataclasses.replace(from_hf(nested.text_config(hf)), outer=hf["model_type"], hf_json=json.dumps(hf))
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; supported are {', '.join([*FAMILIES, *NESTED])}")
    family = FAMILIES[model_type]
    for key in family.required:
        if not isinstance(hf.get(key), int) or hf[key] < 1:
            given = f"has {key}={hf[key]!r}" if key in hf else f"lacks {key}"
            raise ModelError(f"config.json of this {model_type} model {given}; it needs a positive whole number there")
    _check_numbers(hf, family)
    for key, harmless in family.refused.items():
        if hf.get(key, harmless[0]) not in harmless:
            raise ModelError(f"{key}={hf[key]!r} is not implemented for {model_type}; only {key}={harmless[-1]!r} is")
    settings = {**family.defaults, **hf}
    config, padding = family.config(settings), settings.get("pad_token_id")
    if family.pads and type(padding) is int:
        config = dataclasses.replace(config, padding_idx=padding % config.vocab_size if padding < 0 else padding)
    return dataclasses.replace(config, **heads.fields(settings), hf_json=json.dumps(hf))


# whose tensors are listed one by one
_LISTED = ("num_hidden_layers", "n_layer", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST = 10_000
_COUNTS = ("num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions", "n_inner", "sliding_window",
           "moe_intermediate_size", "full_attention_interval", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
           "linear_num_key_heads", "linear_num_value_heads")  # fmt: skip
_POSITIVE = ("rms_norm_eps", "rope_theta", "layer_norm_eps", "layer_norm_epsilon", "rope_local_base_freq", "rotary_emb_base",
             "query_pre_attn_scalar", "logit_scale", "norm_epsilon", "norm_eps", "clip_qkv")  # fmt: skip


def _check_numbers(hf: Mapping[str, Any], family: Family) -> None:
    """Values of the kind that transformers' own default for the key has; null is the default where that is null."""
    for key in _LISTED:
        if isinstance(hf.get(key), int) and hf[key] > _MOST:
            raise ModelError(f"config.json of this {hf['model_type']} model has {key}={hf[key]}; at most {_MOST} are possible")
    for key, default in {**dict.fromkeys(_COUNTS), **dict.fromkeys(_POSITIVE[:2], 1.0), **family.defaults}.items():
        value = hf.get(key)
        if key not in hf or (value is None and (default is None or key in _COUNTS)):
            continue
        wants = "a whole number above 0" if key in _COUNTS else "a number above 0" if key in _POSITIVE else ""
        wants = wants or next((f"a {word}" for kind, word in _KINDS if isinstance(default, kind)), "")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = {
            "a whole number above 0": number and isinstance(value, int) and (value > 0 or key == "sliding_window"),
            "a number above 0": number and value > 0,
            "a truth value": isinstance(value, bool),
            "a number": number or value is None,
            "a text": isinstance(value, str),
        }
        if wants and not fits[wants]:
            raise ModelError(f"config.json of this {hf['model_type']} model has {key}={value!r}; it needs {wants} there")


_KINDS = ((bool, "truth value"), (int | float, "number"), (str, "text"))

"""Scoring heads: a few numbers in place of the vocabulary head, for whole texts (at their last token) or for each token; and PPO's value
head, one number per token beside the vocabulary head.

A reward model is a scoring head with one number for whole texts. Rows and names are those of transformers' classes
`...ForSequenceClassification` and `...ForTokenClassification`, and of TRL's `AutoModelForCausalLMWithValueHead`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig, architecture
from jaxtune.model.row import Row

SEQUENCE, TOKEN = "sequence", "token"
SUFFIX = {SEQUENCE: "ForSequenceClassification", TOKEN: "ForTokenClassification"}
BOTH = (SEQUENCE, TOKEN)
# model_type -> the prefix of transformers' classes, and which of the two exist
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "afmoe": ("Afmoe", ()),
    "apertus": ("Apertus", (TOKEN,)),
    "apertus1p5_text": ("Apertus1p5Text", ()),
    "arcee": ("Arcee", BOTH),
    "bamba": ("Bamba", ()),
    "bloom": ("Bloom", BOTH),
    "codegen": ("CodeGen", ()),
    "cohere": ("Cohere", ()),
    "cohere2": ("Cohere2", ()),
    "cohere2_moe": ("Cohere2Moe", ()),
    "cwm": ("Cwm", ()),
    "deepseek_v2": ("DeepseekV2", (SEQUENCE,)),
    "deepseek_v3": ("DeepseekV3", BOTH),
    "dots1": ("Dots1", ()),
    "exaone": ("Llama", ()),
    "ernie4_5": ("Ernie4_5", ()),
    "exaone4": ("Exaone4", BOTH),
    "exaone_moe": ("ExaoneMoe", ()),
    "ernie4_5_moe": ("Ernie4_5_Moe", ()),
    "falcon": ("Falcon", BOTH),
    "falcon_h1": ("FalconH1", ()),
    "flex_olmo": ("FlexOlmo", ()),
    "gemma": ("Gemma", BOTH),
    "gemma2": ("Gemma2", BOTH),
    "gemma3_text": ("Gemma3Text", (SEQUENCE,)),
    "gemma3n_text": ("Gemma3n", ()),
    "gemma4_text": ("Gemma4", ()),
    "gemma4_unified_text": ("Gemma4Unified", ()),
    "glm": ("Glm", BOTH),
    "glm4": ("Glm4", BOTH),
    "glm4_moe": ("Glm4Moe", ()),
    "glm4_moe_lite": ("Glm4MoeLite", ()),
    "gpt2": ("GPT2", BOTH),
    "gpt_bigcode": ("GPTBigCode", BOTH),
    "gpt_neo": ("GPTNeo", BOTH),
    "gpt_neox": ("GPTNeoX", BOTH),
    "gpt_oss": ("GptOss", BOTH),
    "gptj": ("GPTJ", (SEQUENCE,)),
    "granite": ("Granite", ()),
    "granite_swa": ("GraniteSWA", ()),
    "granitemoe": ("GraniteMoe", ()),
    "granitemoe_swa": ("GraniteMoeSWA", ()),
    "granitemoehybrid": ("GraniteMoeHybrid", ()),
    "granitemoeshared": ("GraniteMoeShared", ()),
    "helium": ("Helium", BOTH),
    "hunyuan_v1_dense": ("HunYuanDenseV1", (SEQUENCE,)),
    "hunyuan_v1_moe": ("HunYuanMoEV1", (SEQUENCE,)),
    "hy_v3": ("HYV3", ()),
    "hyperclovax": ("HyperCLOVAX", ()),
    "internlm3": ("Llama", ()),
    "iquestcoder": ("Llama", ()),
    "jais2": ("Jais2", ()),
    "lfm2": ("Lfm2", ()),
    "lfm2_moe": ("Lfm2Moe", ()),
    "lfm3": ("Lfm3", ()),
    "llama": ("Llama", BOTH),
    "llama4_text": ("Llama4", ()),
    "mamba2": ("Mamba2", ()),
    "mellum": ("Mellum", ()),
    "minicpm3": ("MiniCPM3", (SEQUENCE,)),
    "minimax_m2": ("MiniMaxM2", ()),
    "ministral": ("Ministral", BOTH),
    "ministral3": ("Ministral3", BOTH),
    "mistral": ("Mistral", BOTH),
    "mistral4": ("Mistral4", BOTH),
    "mixtral": ("Mixtral", BOTH),
    "mpt": ("Mpt", BOTH),
    "nanochat": ("NanoChat", ()),
    "nemotron": ("Nemotron", BOTH),
    "nemotron_h": ("NemotronH", ()),
    "olmo": ("Olmo", (SEQUENCE,)),
    "olmo2": ("Olmo2", (SEQUENCE,)),
    "olmo3": ("Olmo3", (SEQUENCE,)),
    "olmo_hybrid": ("OlmoHybrid", ()),
    "olmoe": ("Olmoe", ()),
    "opt": ("OPT", (SEQUENCE,)),
    "phi": ("Phi", BOTH),
    "phi3": ("Phi3", BOTH),
    "phimoe": ("Phimoe", (SEQUENCE,)),
    "qwen2": ("Qwen2", BOTH),
    "qwen2_moe": ("Qwen2Moe", BOTH),
    "qwen3": ("Qwen3", BOTH),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", ()),
    "qwen3_5_text": ("Qwen3_5Text", (SEQUENCE,)),
    "qwen3_moe": ("Qwen3Moe", BOTH),
    "qwen3_next": ("Qwen3Next", BOTH),
    "sarvam_mla": ("DeepseekV3", ()),
    "seed_oss": ("SeedOss", BOTH),
    "smollm3": ("SmolLM3", BOTH),
    "solar_open": ("SolarOpen", ()),
    "stablelm": ("StableLm", BOTH),
    "starcoder2": ("Starcoder2", BOTH),
    "vaultgemma": ("VaultGemma", ()),
    "youtu": ("Youtu", ()),
}
# whose token head is named classifier; all others are named score
CLASSIFIERS = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox")
VALUE = {"value": "v_head.summary.weight", "value_bias": "v_head.summary.bias"}
PATHS = ("score", "score_bias", *VALUE)  # which every method trains


def rows(config: ModelConfig) -> Iterator[tuple[str, Row]]:
    """The head's rows: `score [num_labels, D]`, and its bias if it has one."""
    name = "classifier" if config.labels_of == TOKEN and config.model_type in CLASSIFIERS else "score"
    yield "score", Row((config.num_labels, config.hidden_size), (None, "embed"), "normal", f"{name}.weight", "cls.output.weight")
    if config.score_bias:
        yield "score_bias", Row((config.num_labels,), (None,), "zeros", f"{name}.bias", "cls.output.bias")


def value_rows(config: ModelConfig) -> Iterator[tuple[str, Row]]:
    """The value head's rows, `value [1, D]` and its bias: initially 0, like a head that knows nothing about a text."""
    yield "value", Row((1, config.hidden_size), (None, "embed"), "zeros", VALUE["value"], "v_head.weight")
    yield "value_bias", Row((1,), (None,), "zeros", VALUE["value_bias"], "v_head.bias")


def fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's description of such a head, as fields of `ModelConfig`; empty for a language model."""
    name = architecture(hf)
    of = next((of for of, suffix in SUFFIX.items() if name.endswith(suffix)), None)
    if of is None:
        return {}
    return {
        "num_labels": len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2), "labels_of": of,
        "score_bias": of == TOKEN and (hf["model_type"] in CLASSIFIERS or hf.get("token_classification_bias", True)),
        "pad_token_id": hf.get("pad_token_id"),
    }  # fmt: skip


def with_head(
    config: ModelConfig, labels: Sequence[str], of: str = SEQUENCE, pad_token_id: int | None = None, problem_type: str | None = None
) -> ModelConfig:
    """The same model with a head of that many labels in place of the vocabulary head; its config.json names transformers' class for it.

    pad_token_id  a text's score is read at its last token other than this one (transformers' rule, for padding on either side)
    problem_type  transformers' name for the type of labels
    """
    if not labels:
        raise ModelError("a head without labels scores nothing; give at least one")
    if config.outer:
        raise ModelError(
            f"a scoring head on a {config.outer} model is not supported; write its language model alone with `jaxtune export MODEL OUT "
            "--format text` and give that"
        )
    hf = json.loads(config.hf_json or "{}")
    hf |= {
        "architectures": [class_name(config, of)], "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }  # fmt: skip
    hf |= {} if pad_token_id is None else {"pad_token_id": pad_token_id}
    hf |= {} if problem_type is None else {"problem_type": problem_type}
    return dataclasses.replace(config, **fields(hf), hf_json=json.dumps(hf))


def class_name(config: ModelConfig, of: str) -> str:
    """The class of transformers that opens it, or that would if it existed (`has_class`)."""
    return CLASSES[config.model_type][0] + SUFFIX[of]


def language_class(model_type: str) -> str:
    """The class of transformers that opens a language model of this family."""
    start = CLASSES[model_type][0]
    start = start if model_type == "apertus1p5_text" else start.removesuffix("Text")  # which the others have for scoring alone
    return start + ("LMHeadModel" if model_type == "gpt2" else "ForCausalLM")


def has_class(config: ModelConfig, of: str) -> bool:
    """Whether transformers has that class."""
    return of in CLASSES[config.model_type][1]

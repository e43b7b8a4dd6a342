"""Multimodal checkpoints: a config.json with a `text_config`, and a language model beside a vision tower and a projector.

The language model is one of `FAMILIES`, and is read, trained and run as such; an entry of `NESTED` says where it is. The other tensors are
kept (convert/other_tensors.py).
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.errors import ModelError
from jaxtune.model.families.base import ModelConfig, architecture
from jaxtune.model.row import Part, Row

MODULES = "model.language_model."  # transformers 5's usual name for the text model's modules, and hence PEFT's, whatever the file says
MOST = 10_000  # layers and experts, since their tensors are listed one by one
OLDER = ("language_model.model.", "language_model.lm_head")  # and the name that it still uses for Llama 4's


class Nested(NamedTuple):
    """One outer `model_type`.

    texts     the `model_type` of its text_config -> the family; the first if text_config has none
    stem      prefix of the language model's tensors in files on the hub, where a text model's begin with "model."
    other_prefixes  of the other tensors in any file (possibly after "model.")
    defaults  transformers' defaults for keys missing in text_config, if they differ from the family's
    fixed     values that its code uses whatever text_config says
    modules   transformers 5's names for the language model's modules and its head
    tied_inside  whether text_config's tie_word_embeddings counts if the outer one is false, as in older files
    tied      the outer tie_word_embeddings if it is missing; None: text_config's counts
    together  whether files store a layer's experts in one tensor, where the family's store each separately and nothing says so
    passed    (key, default): the layers that text passes over, since they only attend to images
    unwritten  rows of the embedding after the vocabulary's, which the head lacks
    """

    texts: Mapping[str, str]
    stem: str
    other_prefixes: tuple[str, ...]
    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    modules: tuple[str, str] = (MODULES, "lm_head")
    tied_inside: bool = False
    tied: bool | None = None
    together: bool = False
    passed: tuple[str, tuple[int, ...]] | None = None
    unwritten: int = 0


_LLAVA = dict(stem="language_model.model.", other_prefixes=("vision_tower.", "multi_modal_projector.", "image_newline"))
_IDEFICS = dict(other_prefixes=("vision_model.", "connector."), modules=("model.text_model.", "lm_head"), defaults=dict(rms_norm_eps=1e-5))
_USUAL = {kind: kind for kind in ("llama", "mistral", "qwen2", "qwen3")}  # text_configs whose outer classes compute what the family does
_PLAIN = dict(logit_scale=1.0)  # the outer class of transformers 5 does not scale logits
_GLM = dict(num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-5, partial_rotary_factor=1.0, pad_token_id=None)
_GLM_VISION = dict(stem=MODULES, other_prefixes=("visual.",))
_QWEN2 = dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, max_window_layers=80)
_QWEN3 = dict(rope_theta=5e5, max_position_embeddings=128000)
_MLLAMA = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=32)
_MLLAMA |= dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072, pad_token_id=128004)
_GEMMA = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
NESTED: dict[str, Nested] = {
    "apertus1p5": Nested({"apertus1p5_text": "apertus1p5_text"}, MODULES, ("vision_tokenizer.", "audio_tokenizer."), tied=False),
    "aya_vision": Nested({"cohere2": "cohere2", "cohere": "cohere"}, **_LLAVA, fixed=_PLAIN, tied=True),
    "cohere2_vision": Nested({"cohere2": "cohere2"}, **_LLAVA, fixed=_PLAIN, tied=True),
    "exaone4_5": Nested({"exaone4": "exaone4", "exaone4_5_text": "exaone4"}, MODULES, ("visual.", "mtp."), tied=False),
    "gemma3": Nested(
        {"gemma3_text": "gemma3_text"},
        **_LLAVA,
        defaults=dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8),
    ),
    "gemma3n": Nested({"gemma3n_text": "gemma3n_text"}, MODULES, _GEMMA, tied=True),
    "gemma4": Nested({"gemma4_text": "gemma4_text"}, MODULES, _GEMMA),
    "gemma4_unified": Nested(
        {"gemma4_unified_text": "gemma4_unified_text"}, MODULES, ("vision_embedder.", "embed_vision.", "embed_audio.")
    ),
    "glm46v": Nested({"glm4v_text": "glm4"}, **_GLM_VISION, defaults=_GLM, fixed=dict(attention_bias=True, head_dim=None), tied=False),
    "glm4v": Nested({"glm4v_text": "glm4"}, **_GLM_VISION, defaults=_GLM, fixed=dict(attention_bias=True, head_dim=None), tied_inside=True),
    "glm4v_moe": Nested(
        {"glm4v_moe_text": "glm4_moe"},
        **_GLM_VISION,
        defaults=dict(attention_bias=True, max_position_embeddings=65536),
        fixed=dict(use_qk_norm=False),
        tied_inside=True,
    ),
    "granite4_vision": Nested(
        {"granite4_vision_text": "granite", "granite": "granite"},
        MODULES,
        ("vision_tower.", "image_newline", "layerwise_projectors.", "spatial_projectors."),
        tied=False,
    ),
    "idefics3": Nested({"llama": "llama", "mistral": "mistral"}, "model.text_model.", **_IDEFICS, tied=False),
    "internvl": Nested({"qwen2": "qwen2"} | _USUAL | {"qwen3_moe": "qwen3_moe"}, **_LLAVA, tied=True),
    "lfm2_vl": Nested({"lfm2": "lfm2", "lfm2_moe": "lfm2_moe"}, MODULES, _LLAVA["other_prefixes"], tied=True),
    "lfm3_vl": Nested({"lfm3": "lfm3"}, MODULES, _LLAVA["other_prefixes"], tied=True),
    "llava": Nested(_USUAL, **_LLAVA, tied_inside=True),
    "llava_next": Nested(_USUAL, **_LLAVA, tied=False),
    "llava_onevision": Nested({"qwen2": "qwen2"} | _USUAL, **_LLAVA, tied_inside=True),
    "llama4": Nested({"llama4_text": "llama4_text"}, OLDER[0], ("vision_model.", "multi_modal_projector."), modules=OLDER),
    "mistral3": Nested(
        {"mistral": "mistral", "ministral3": "ministral3", "mistral4": "mistral4"}, **_LLAVA, fixed=dict(layer_types=None)
    ),
    "mllama": Nested(
        {"mllama_text_model": "llama"},
        OLDER[0],
        ("vision_model.", "multi_modal_projector."),
        _MLLAMA,
        dict(attention_bias=False, mlp_bias=False, head_dim=None, tie_word_embeddings=False),
        passed=("cross_attention_layers", (3, 8, 13, 18, 23, 28, 33, 38)),
        unwritten=8,
    ),
    "qwen2_5_vl": Nested({"qwen2_5_vl_text": "qwen2"}, "model.", ("visual.",), _QWEN2, tied_inside=True),
    "qwen2_vl": Nested({"qwen2_vl_text": "qwen2"}, "model.", ("visual.",), _QWEN2, tied_inside=True),
    "qwen3_5": Nested({"qwen3_5_text": "qwen3_5_text"}, MODULES, ("visual.", "mtp.")),
    "qwen3_5_moe": Nested({"qwen3_5_moe_text": "qwen3_5_moe_text"}, MODULES, ("visual.", "mtp.")),
    "qwen3_vl": Nested({"qwen3_vl_text": "qwen3"}, MODULES, ("visual.",), _QWEN3, dict(use_sliding_window=False)),
    "qwen3_vl_moe": Nested(
        {"qwen3_vl_moe_text": "qwen3_moe"},
        MODULES,
        ("visual.",),
        _QWEN3 | dict(num_key_value_heads=16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408),
        fixed=dict(use_sliding_window=False, norm_topk_prob=True),
        together=True,
    ),
    "smolvlm": Nested(_USUAL, "model.text_model.", **_IDEFICS, tied=False),
}
# transformers' sizes of a family, which older text_configs leave out
_SIZES = {
    family: dict(zip(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True))
    for family, sizes in {
        "cohere": (256000, 8192, 22528, 40, 64),
        "cohere2": (256000, 8192, 22528, 40, 64),
        "llama": (32000, 4096, 11008, 32, 32),
        "mistral": (32000, 4096, 14336, 32, 32),
        "qwen2": (151936, 4096, 22016, 32, 32),
        "qwen3": (151936, 4096, 22016, 32, 32),
    }.items()
}
# families whose files call things otherwise than transformers 5 does: patterns, and what it calls them
_CALLED = {
    "exaone": (
        (r"^transformer\.wte\b", "model.embed_tokens"),
        (r"^transformer\.h\b", "model.layers"),
        (r"^transformer\.ln_f\b", "model.norm"),
        (r"\.attn\.attention\.out_proj\b", ".self_attn.o_proj"),
        (r"\.attn\.attention\b", ".self_attn"),
        (r"\.ln_1\b", ".input_layernorm"),
        (r"\.ln_2\b", ".post_attention_layernorm"),
        (r"\.c_fc_0\b", ".gate_proj"),
        (r"\.c_fc_1\b", ".up_proj"),
        (r"\.c_proj\b", ".down_proj"),
    ),
    "hy_v3": ((r"\.mlp\.shared_mlp\b", ".mlp.shared_experts"),),
    "lfm3": ((r"\.self_attn\.gate_proj\b", ".self_attn.g_proj"),),
    "olmo_hybrid": (
        (r"\.attention_layer_norm\b", ".input_layernorm"),
        (r"\.feedforward_layer_norm\b", ".post_attention_layernorm"),
    ),
    "nemotron_h": ((r"^backbone\.", "model."),),
}
_TOGETHER = {
    "experts_gate": ("mlp.experts.gate_up_proj", Part(0, 2)),
    "experts_up": ("mlp.experts.gate_up_proj", Part(1, 2)),
    "experts_down": ("mlp.experts.down_proj", Part()),
}


def is_nested(hf: Mapping[str, Any]) -> bool:
    """Whether config.json belongs to such a checkpoint."""
    return isinstance(hf.get("model_type"), str) and hf["model_type"] in NESTED


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the language model alone, in its family's form. ModelError if there is none of a known kind."""
    outer, inner = NESTED[hf["model_type"]], _inner(hf)
    if not isinstance(inner, Mapping):
        raise ModelError(f"this {hf['model_type']} model has text_config={inner!r}; it has to be an object")
    kind = inner.get("model_type") or next(iter(outer.texts))
    if not isinstance(kind, str) or kind not in outer.texts:
        raise ModelError(f"text_config.model_type {kind!r} is not supported in {hf['model_type']}; supported are {', '.join(outer.texts)}")
    if architecture(hf).endswith("Classification"):
        raise ModelError(f"a scoring head on a {hf['model_type']} model is not supported; that of a {outer.texts[kind]} model is")
    text = {**_SIZES.get(outer.texts[kind], {}), **outer.defaults, **inner, "model_type": outer.texts[kind]}
    if "tie_word_embeddings" not in hf and outer.tied is not None:
        text["tie_word_embeddings"] = outer.tied
    if hf.get("tie_word_embeddings") or ("tie_word_embeddings" in hf and not outer.tied_inside):
        text["tie_word_embeddings"] = bool(hf["tie_word_embeddings"])  # where transformers looks
    text |= outer.fixed
    if numbers := _file_layers(outer, text):
        text["num_hidden_layers"] = len(numbers)
    for key in ("rope_scaling", "rope_parameters"):
        text |= {key: _one_axis(text[key])} if isinstance(text.get(key), Mapping) else {}
    for key in ("dtype", "torch_dtype"):
        text |= {key: hf[key]} if key in hf else {}
    return {key: value for key, value in text.items() if key != "architectures"}


def _inner(hf: Mapping[str, Any]) -> Any:
    """The part of config.json about the language model, as it is there."""
    if hf.get("text_config") is None and "hidden_size" in hf:  # flat, as in Qwen 2 VL's files
        return {key: value for key, value in hf.items() if key not in ("model_type", "vision_config")}
    return hf.get("text_config")


def fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a language model's `ModelConfig` that say what it is part of."""
    outer = NESTED[hf["model_type"]]
    inner = {**outer.defaults, **_inner(hf)}
    said = dict(together=outer.together, file_layers=_file_layers(outer, inner))
    said |= dict(unwritten=outer.unwritten) if outer.unwritten else {}  # otherwise the family's
    return dict(outer=hf["model_type"], hf_json=json.dumps(hf)) | said


def _file_layers(outer: Nested, text: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of the layers that text passes through; () if these are all. ModelError if config.json lists none or no numbers."""
    if outer.passed is None or type(count := text.get("num_hidden_layers")) is not int:
        return ()
    key, default = outer.passed
    passed = default if text.get(key) is None else text[key]
    if not isinstance(passed, list | tuple) or any(type(layer) is not int for layer in passed):
        raise ModelError(f"text_config has {key}={passed!r}; it needs a list of layers' numbers there")
    kept = tuple(layer for layer in range(min(count, MOST)) if layer not in passed)
    if count > 0 and not kept:
        raise ModelError(f"text_config has {key}={passed!r}, which are all of num_hidden_layers={count}, so that text passes through none")
    return kept


def is_passed(config: ModelConfig, name: str) -> bool:
    """Whether a tensor, by its name in a text model, belongs to a layer that text passes over."""
    found = re.match(r"model\.layers\.(\d+)\.", name) if config.file_layers else None
    return found is not None and int(found[1]) in passed_layers(config)


def passed_layers(config: ModelConfig) -> tuple[int, ...]:
    """The numbers of the layers in its files that text passes over."""
    if not config.file_layers:
        return ()
    inner = {**NESTED[config.outer].defaults, **_inner(json.loads(config.hf_json))}
    return tuple(layer for layer in range(inner["num_hidden_layers"]) if layer not in config.file_layers)


def _one_axis(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Text tokens in Qwen have the same position along time, height and width (mrope), which is plain rotation."""
    kept = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}


def together(name: str, row: Row) -> Row:
    """The row of a layer as in files that store its experts in one tensor."""
    hf, part = _TOGETHER.get(name, (row.hf, row.part))
    return row._replace(hf=hf, part=part)


def in_file(config: ModelConfig, name: str, row: Row) -> Row:
    """The row of a layer as in the files of its checkpoint."""
    return together(name, row) if config.together else row


def as_in_file(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The config for a checkpoint with tensors of these names: its experts together or separate, as in the file."""
    if config.moe is None:
        return config
    return dataclasses.replace(config, together=any(name.endswith(_TOGETHER["experts_down"][0]) for name in names))


def module(config: ModelConfig, name: str) -> str:
    """The name of a row's tensor or module in the transformers 5 class that opens the checkpoint."""
    for pattern, called in _CALLED.get(config.model_type, ()):
        name = re.sub(pattern, called, name)
    if not config.outer:
        return name
    modules, head = NESTED[config.outer].modules
    return re.sub(r"^lm_head\b", head, re.sub(r"^model\.", modules, name))


def spellings(hf: Mapping[str, Any], name: str) -> Iterator[str]:
    """Possible names of a text model's module under the config.json of the whole."""
    yield name
    if is_nested(hf):
        yield from (re.sub(r"^model\.", stem, name) for stem in {NESTED[hf["model_type"]].modules[0], NESTED[hf["model_type"]].stem})


def changed(hf: Mapping[str, Any], **values) -> dict[str, Any]:
    """config.json with changed values of the language model's keys, where it has them."""
    inside = is_nested(hf) and isinstance(hf.get("text_config"), Mapping)
    return {**hf, "text_config": {**hf["text_config"], **values}} if inside else {**hf, **values}


def alone(config: ModelConfig, architecture: str | None = None) -> ModelConfig:
    """The language model of a nested `config` as a separate model; `architecture`: transformers' class that opens it."""
    hf = text_config(json.loads(config.hf_json)) | ({"architectures": [architecture]} if architecture else {})
    return dataclasses.replace(config, outer="", together=False, hf_json=json.dumps(hf))

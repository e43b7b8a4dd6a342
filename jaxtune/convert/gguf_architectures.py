"""The architecture of a model for llama.cpp, and the metadata of its files, in both directions."""

from collections.abc import Callable
from typing import Any

from jaxtune.convert import gguf_limits as limits
from jaxtune.convert import gguf_readers as readers
from jaxtune.convert.gguf_file import Metadata
from jaxtune.convert.gguf_keys import COMMON, NEEDED, Architecture, Key
from jaxtune.convert.gguf_rope import rope_keys, rope_parameters
from jaxtune.convert.gguf_table import ARCHITECTURES, MODEL_TYPES
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig


def architecture_of(config: ModelConfig) -> Architecture:
    """llama.cpp's name for a model; ModelError for a family that it does not support, or not in this form."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"a model of type {config.model_type} cannot be written as GGUF; there are {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[config.model_type]
    if found.name == "granitehybrid" and not config.mamba:  # attention only: its predecessors compute the same
        found = ARCHITECTURES["granitemoeshared" if config.moe else "granite"]
    if found.name == "nemotron_h" and config.moe:
        found = found._replace(name="nemotron_h_moe")
    limits.check(config, found)
    return found


def keys_of(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """A model's metadata, without the architecture prefix. ModelError for a rotary scheme that it cannot express."""
    c, a = config, architecture
    norm = "layer_norm_epsilon" if c.norm.startswith("layer") else "layer_norm_rms_epsilon"
    found = {"vocab_size": c.vocab_size} | {key.gguf: key.of(c) for key in COMMON}
    found |= {"attention.value_length": c.head_dim, f"attention.{norm}": c.norm_eps}
    if a.limited:
        found["context_length"] = min([c.max_position_embeddings, *filter(None, c.layer_windows)])
    found |= rope_keys(c.ropes[0], a.truncate) if c.ropes else {}
    found |= {key.gguf: key.of(c) for key in a.keys}
    return {key: value for key, value in found.items() if value is not None}


def config_of(m: Metadata) -> dict[str, Any]:
    """config.json from a file's metadata, without its class and special tokens."""
    model_type = _SHARED_BY[m.architecture](m) if m.architecture in _SHARED_BY else MODEL_TYPES[m.architecture]
    a = ARCHITECTURES[model_type]
    norm = next((key for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon") if m.get(f"attention.{key}") is not None), None)
    own = {key.gguf for key in a.keys}
    hf = {key.hf: _read(m, key) for key in COMMON if key.gguf not in own}
    hf["num_hidden_layers"] -= m.get("nextn_predict_layers", 0)
    hf["head_dim"] = readers.head_dim(m)
    hf["vocab_size"] = m.file.tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = not m.has("output.weight")
    hf["rope_parameters"] = rope_parameters(m, hf["head_dim"])
    hf |= {a.eps: m(f"attention.{norm or 'layer_norm_rms_epsilon'}")} if a.eps else {}
    hf |= {key.hf: _read(m, key) for key in a.keys if key.hf}
    hf["num_key_value_heads"] = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    hf = {a.renamed.get(key, key): value for key, value in hf.items()}
    return {"model_type": model_type} | hf | a.hf | a.read(m)


def _read(m: Metadata, key: Key) -> Any:
    return m(key.gguf) if key.missing is NEEDED or m.get(key.gguf) is not None else key.missing


def _which_llama(m: Metadata) -> str:
    return "mixtral" if m.get("expert_count") else "mistral" if m.get("attention.sliding_window") else "llama"


# general.architecture, if several families share it -> which of them a file contains
_SHARED_BY: dict[str, Callable[[Metadata], str]] = {
    "llama": _which_llama,
    "gemma4": lambda m: "gemma4_text",
    "olmo2": lambda m: "olmo3" if m.get("attention.sliding_window") else "olmo2",
    "granitemoe": lambda m: "granitemoeshared" if m.get("expert_shared_feed_forward_length") else "granitemoe",
    "deepseek2": lambda m: "deepseek_v3" if m.has(f"blk.{m.get('leading_dense_block_count', 0)}.exp_probs_b.bias") else "deepseek_v2",
}

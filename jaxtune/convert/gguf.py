"""GGUF files in: llama.cpp's metadata as a config.json, and its tensors under Hugging Face's names and in Hugging Face's layout."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.convert.gguf_file import GGUFFile
from jaxtune.convert.names import cells
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec

# Where llama.cpp turns neighbouring pairs of dimensions instead of halves of a head, its files hold q and k with their rows interleaved.
INTERLEAVED = ("llama", "mistral", "mixtral", "granite", "granitemoe", "smollm3")
# Tensors that are not parameters; what they say is in the config.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFCheckpoint:
    """The tensors of a GGUF file as a `Checkpoint`: Hugging Face's names, shapes and layout."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self.file, self.config = file, config
        self.rows = spec(config)
        self.entries: dict[str, Any] = {}
        self._places: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self._stack: tuple[str, np.ndarray] = ("", np.zeros(0))
        for cell in cells(self.rows):
            row = self.rows[cell.path]
            name = row.gguf.format(layer=row.layers[cell.index[0]]) if cell.index else row.gguf
            if name in file.tensors:
                expert = cell.index[1:]
                tensor = file.tensors[name]
                shape = tensor.shape[len(expert) :]
                shape = (1, *shape) if cell.shape[0] == 1 and len(shape) == 1 else shape  # a matrix of one row is a vector there
                self.entries[cell.name] = tensor._replace(shape=shape[::-1] if cell.transposed else shape)
                self._places[cell.name] = (cell.path, name, expert)
        used = {name for _, name, _ in self._places.values()}
        self.entries |= {name: tensor for name, tensor in file.tensors.items() if name not in used and name not in _ROPE_TENSORS}

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded and laid out as Hugging Face has it."""
        path, stored, expert = self._places[name]
        if expert:  # all of a layer's experts are one tensor; it is decoded once for the run of them
            if self._stack[0] != stored:
                self._stack = (stored, self.file.read(stored))
            return self._stack[1][expert]
        return to_hf(self.config, path, self.file.read(stored)).reshape(self.entries[name].shape)


def to_hf(config: ModelConfig, path: str, value: np.ndarray) -> np.ndarray:
    """A tensor from llama.cpp's layout to Hugging Face's: q and k rows back in halves, norms without their one, Conv1D turned."""
    heads = _interleaved_heads(config, path)
    if heads:
        return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if config.norm == "rms_offset" and path.endswith("norm"):
        return value - value.dtype.type(1)
    return value.T if spec(config)[path].transposed else value


def to_gguf(config: ModelConfig, path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_hf`."""
    heads = _interleaved_heads(config, path)
    if heads:
        return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if config.norm == "rms_offset" and path.endswith("norm"):
        return value + value.dtype.type(1)
    return value.T if spec(config)[path].transposed else value


def _interleaved_heads(config: ModelConfig, path: str) -> int:
    """How many heads the rows of this q or k (or bias) fall into; 0 where nothing is interleaved."""
    if config.model_type not in INTERLEAVED:
        return 0
    return {"q": config.num_heads, "k": config.num_kv_heads}.get(path.rsplit("/", 1)[-1].removesuffix("_bias"), 0)


# ---- config.json ----


_COUNTS = ("attention.head_count", "attention.key_length", "embedding_length", "feed_forward_length", "block_count", "context_length")


class _Metadata:
    """The keys of a file's architecture: `m("block_count")` is `llama.block_count`; ModelError when a needed one is missing."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = file.metadata.get("general.architecture")

    def __call__(self, key: str):
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.file.path}: the metadata lacks {self.architecture}.{key}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"{self.file.path}: {self.architecture}.{key} differs from layer to layer; that is not supported")
            value = value[0]
        if key in _COUNTS and not (isinstance(value, int) and value > 0):
            raise ModelError(f"{self.file.path}: {self.architecture}.{key} is {value!r}; it has to be a whole number above 0")
        return value

    def get(self, key: str, default=None):
        return self.file.metadata.get(f"{self.architecture}.{key}", default)


def gguf_config(file: GGUFFile) -> dict:
    """What config.json of this model would say. ModelError for an architecture whose switches are not known."""
    m = _Metadata(file)
    if m.architecture not in ARCHITECTURES:
        raise ModelError(f"{file.path}: architecture {m.architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed not in file.tensors:
            raise ModelError(f"{file.path}: tensor {needed} is missing; the file holds a vocabulary or a part of a model")
    hf = _common(m) | ARCHITECTURES[m.architecture](m)
    hf["architectures"] = [CLASSES[hf["model_type"]]]
    for key, name in {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}.items():
        if (number := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            hf[name] = number
    return hf


def generation_config(file: GGUFFile) -> dict:
    """generation_config.json: the special tokens, with every token that ends a turn."""
    ids = {key: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    named = {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None), "pad_token_id": ids["padding"]}
    return {key: value for key, value in named.items() if value is not None}


def _common(m: _Metadata) -> dict[str, Any]:
    heads, width = m("attention.head_count"), m("embedding_length")
    head_dim = m("attention.key_length") if m.get("attention.key_length") is not None else width // heads
    return {
        "vocab_size": m.file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": m("feed_forward_length"),
        "num_hidden_layers": m("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m("attention.head_count_kv") if m.get("attention.head_count_kv") else heads,
        "head_dim": head_dim,
        "rms_norm_eps": m("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": m("context_length"),
        "tie_word_embeddings": "output.weight" not in m.file.tensors,
        "rope_parameters": _rope(m, head_dim),
    }


def _has(m: _Metadata, *names: str) -> bool:
    return any(name in m.file.tensors for name in names)


def _rope(m: _Metadata, head_dim: int) -> dict[str, Any]:
    """Rotary positions; the frequencies of `rope_freqs.weight` are divisors, recognised as llama3's where they are those."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.get("rope.freq_base", 10000.0)}
    turned = m.get("rope.dimension_count", head_dim)
    if turned != head_dim:
        rope["partial_rotary_factor"] = turned / head_dim
    if _has(m, "rope_freqs.weight"):
        divisors = m.file.read("rope_freqs.weight").astype(np.float32)
        return rope | (_llama3(rope["rope_theta"], divisors) or {"rope_type": "divisors", "divisors": divisors.tolist()})
    if _has(m, "rope_factors_long.weight"):
        return rope | {
            "rope_type": "longrope",
            "long_factor": m.file.read("rope_factors_long.weight").tolist(),
            "short_factor": m.file.read("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": m("rope.scaling.original_context_length"),
        } | ({"attention_factor": m("rope.scaling.attn_factor")} if m.get("rope.scaling.attn_factor") else {})
    kind = m.get("rope.scaling.type", "linear" if m.get("rope.scale_linear", 1.0) != 1.0 else "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": m.get("rope.scaling.factor") or m("rope.scale_linear")}
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": m("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = m("rope.scaling.original_context_length")
        betas = {key: m.get(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
        return rope | {key: value for key, value in betas.items() if value is not None}
    if kind != "none":
        raise ModelError(f"{m.file.path}: rope.scaling.type {kind!r} is not supported; supported are none, linear, yarn")
    return rope


def llama3_divisors(theta: float, size: int, rope: dict[str, Any]) -> np.ndarray:
    """What llama.cpp stores of a llama3 scheme: a divisor per frequency, float32 `[size]`."""
    wavelength = 2 * np.pi * theta ** (np.arange(size) / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _llama3(theta: float, divisors: np.ndarray) -> dict[str, Any] | None:
    """The llama3 scheme with these divisors, of those that Meta published (3.1: factor 8, 3.2: factor 32), or None."""
    for factor in (8.0, 32.0):
        rope = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if np.allclose(llama3_divisors(theta, divisors.size, rope), divisors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3"} | rope
    return None


# ---- architectures: general.architecture -> what config.json says beyond the common part ----


def _llama(m: _Metadata) -> dict[str, Any]:
    hf = {"model_type": "llama", "attention_bias": _has(m, "blk.0.attn_q.bias"), "mlp_bias": _has(m, "blk.0.ffn_up.bias")}
    if m.get("expert_count"):
        hf = {"model_type": "mixtral", "num_local_experts": m("expert_count"), "num_experts_per_tok": m("expert_used_count")}
        return hf | {"sliding_window": m.get("attention.sliding_window")}
    if m.get("attention.sliding_window"):
        return {"model_type": "mistral", "sliding_window": m("attention.sliding_window")}
    return hf


def _gpt_oss(m: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_local_experts": m("expert_count"),
        "num_experts_per_tok": m("expert_used_count"),
        "intermediate_size": m("expert_feed_forward_length"),
        "sliding_window": m("attention.sliding_window"),
        "rope_parameters": _rope(m, m("attention.key_length")) | {"truncate": False},
    }


def _qwen2_moe(m: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "num_experts": m("expert_count"),
        "num_experts_per_tok": m("expert_used_count"),
        "moe_intermediate_size": m("expert_feed_forward_length"),
        "shared_expert_intermediate_size": m("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,  # llama.cpp never does
    }


def _olmoe(m: _Metadata) -> dict[str, Any]:
    chosen = {"num_experts": m("expert_count"), "num_experts_per_tok": m("expert_used_count")}
    return {"model_type": "olmoe", "norm_topk_prob": False} | chosen


def _qwen3_moe(m: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_experts": m("expert_count"),
        "num_experts_per_tok": m("expert_used_count"),
        "moe_intermediate_size": m("expert_feed_forward_length"),
        "norm_topk_prob": True,  # llama.cpp always does
    }


def _gemma2(m: _Metadata) -> dict[str, Any]:
    # As in llama.cpp: the largest model alone scales by the width of a head's share of the residual stream.
    share = m("embedding_length") // m("attention.head_count")
    return {
        "model_type": "gemma2",
        "attn_logit_softcapping": m.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.get("final_logit_softcapping", 30.0),
        "sliding_window": m.get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": share if m("block_count") == 46 else m("attention.key_length"),
    }


def _gemma3(m: _Metadata) -> dict[str, Any]:
    share = m("embedding_length") // m("attention.head_count")
    full = _rope(m, m("attention.key_length"))
    return {
        "model_type": "gemma3_text",
        "sliding_window": m("attention.sliding_window"),
        "query_pre_attn_scalar": share if m("block_count") == 62 else m("attention.key_length"),
        "final_logit_softcapping": m.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": full | {"rope_theta": m.get("rope.freq_base", 1e6)},
            "sliding_attention": {"rope_type": "default", "rope_theta": m.get("rope.freq_base_swa", 10000.0)},
        },
    }


def _phi3(m: _Metadata) -> dict[str, Any]:
    hf = {"model_type": "phi3", "sliding_window": m.get("attention.sliding_window") or None}
    return hf | {"original_max_position_embeddings": m.get("rope.scaling.original_context_length") or m("context_length")}


def _granite(m: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "granite",
        "attention_bias": _has(m, "blk.0.attn_q.bias"),
        "mlp_bias": _has(m, "blk.0.ffn_up.bias"),
        "embedding_multiplier": m.get("embedding_scale", 1.0),
        "residual_multiplier": m.get("residual_scale", 1.0),
        "attention_multiplier": m("attention.scale"),
        "logits_scaling": m.get("logit_scale", 1.0),
    }


def _granitemoe(m: _Metadata) -> dict[str, Any]:
    if m.get("expert_shared_feed_forward_length"):
        raise ModelError(f"{m.file.path}: a Granite mixture with a shared expert cannot be read from GGUF; give the original")
    chosen = {"num_local_experts": m("expert_count"), "num_experts_per_tok": m("expert_used_count")}
    return {key: value for key, value in _granite(m).items() if key != "mlp_bias"} | {"model_type": "granitemoe"} | chosen


ARCHITECTURES: dict[str, Callable[[_Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": lambda m: {"model_type": "qwen2"},
    "qwen2moe": _qwen2_moe,
    "qwen3": lambda m: {"model_type": "qwen3"},
    "qwen3moe": _qwen3_moe,
    "gemma": lambda m: {"model_type": "gemma"},
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "smollm3": lambda m: {"model_type": "smollm3", "no_rope_layer_interval": 4},
    "olmo2": lambda m: {"model_type": "olmo2"},
    "olmoe": _olmoe,
}
CLASSES = {
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "granite": "GraniteForCausalLM", "granitemoe": "GraniteMoeForCausalLM", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmoe": "OlmoeForCausalLM",
    "phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip


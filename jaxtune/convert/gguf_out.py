"""GGUF files out, tensor by tensor, with llama.cpp's metadata and the tokenizer."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quantize

from jaxtune.convert.gguf import INTERLEAVED, llama3_divisors, to_gguf
from jaxtune.convert.gguf_vocabulary import add_tokenizer
from jaxtune.convert.hf import tensors_out
from jaxtune.convert.names import cells
from jaxtune.convert.tensors import Checkpoint
from jaxtune.disk import replacing
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.layers import ACTIVATIONS
from jaxtune.model.rope import Rope
from jaxtune.model.row import Row
from jaxtune.model.spec import spec

_T, _F = GGMLQuantizationType, LlamaFileType
# what a user asks for -> the type of matrices, of embedding and head, and the number llama.cpp gives such a file
TYPES = {
    "f32": (_T.F32, _T.F32, _F.ALL_F32),
    "f16": (_T.F16, _T.F16, _F.MOSTLY_F16),
    "bf16": (_T.BF16, _T.BF16, _F.MOSTLY_BF16),
    "q8_0": (_T.Q8_0, _T.Q8_0, _F.MOSTLY_Q8_0),
    "q5_0": (_T.Q5_0, _T.Q8_0, _F.MOSTLY_Q5_0),
    "q5_1": (_T.Q5_1, _T.Q8_0, _F.MOSTLY_Q5_1),
    "q4_0": (_T.Q4_0, _T.Q8_0, _F.MOSTLY_Q4_0),
    "q4_1": (_T.Q4_1, _T.Q8_0, _F.MOSTLY_Q4_1),
}


def save_gguf(
    config: ModelConfig,
    params: dict,
    out: str | os.PathLike,
    *,
    type: str = "f16",
    tokenizer: Any = None,
    generation_config: dict | None = None,
    base: Checkpoint | None = None,
    name: str | None = None,
) -> Path:
    """Write one `.gguf` file that llama.cpp opens; returns `out`.

    type          of the matrices: f32, f16, bf16, q8_0, q5_0, q5_1, q4_0 or q4_1. Norms, biases and routers are f32; a matrix whose rows
                  are not a multiple of 32 is f16; embedding and head are q8_0 at least
    params, base  as in `hf.save`

    The file is written beside `out` and renamed. Raises ModelError for a family, a rotary scheme or a tokenizer that llama.cpp's
    format has no words for, and when `out` exists.
    """
    out = Path(out).expanduser().absolute()
    if type not in TYPES:
        raise ModelError(f"{type!r} is not a GGUF type that can be written; there are {', '.join(TYPES)}")
    if out.exists():
        raise ModelError(f"{out} exists; nothing is overwritten. Give another name, or remove it")
    config, _, make = tensors_out(config, params, "float32", base)
    if config.model_type not in ARCHITECTURES:
        raise ModelError(f"a model of type {config.model_type} cannot be written as GGUF; there are {', '.join(ARCHITECTURES)}")
    architecture, extra = ARCHITECTURES[config.model_type]
    _refuse_shapes(config, architecture)
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    writer.add_name(name or out.stem)
    writer.add_file_type(TYPES[type][2])
    writer.add_quantization_version(2)
    _add_config(writer, config)
    extra(writer, config)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size, generation_config or {})
    with replacing(out) as scratch:
        _write(writer, scratch, _tensors(config, type, make))
    return out


def _refuse_shapes(c: ModelConfig, architecture: str) -> None:
    """What llama.cpp's loader has no place for, as tried with it."""
    if c.out_bias and architecture not in ("llama", "granite", "granitemoe", "gpt-oss"):
        raise ModelError(f"llama.cpp knows no bias of the attention's output in a {architecture} model; this one has attention_bias")
    if c.mlp_bias and architecture not in ("llama", "granite"):
        raise ModelError(f"llama.cpp knows no biases of the feed-forward part of a {architecture} model; this one has mlp_bias")
    computed = "gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu"
    if ACTIVATIONS[c.hidden_act] is not ACTIVATIONS[computed]:
        raise ModelError(f"llama.cpp computes {computed} in a {architecture} model; this one has hidden_act {c.hidden_act}")
    if c.num_heads * c.head_dim != c.hidden_size and architecture in ("qwen2", "qwen2moe", "olmo2", "olmoe", "phi3"):
        raise ModelError(f"llama.cpp takes hidden_size / num_attention_heads for the head_dim of a {architecture} model; not this one")


class _Tensor:
    """A tensor to be written: known before it is made."""

    def __init__(self, name: str, shape: tuple[int, ...], type: GGMLQuantizationType, make: Callable[[], np.ndarray]):
        self.name, self.shape, self.type, self.make = name, shape, type, make
        block, size = GGML_QUANT_SIZES[type]
        self.nbytes = math.prod(shape) // block * size


def _write(writer: GGUFWriter, path: Path, tensors: list[_Tensor]) -> None:
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(quantize(np.ascontiguousarray(tensor.make()), tensor.type))
    finally:
        writer.close()


def _tensors(config: ModelConfig, type: str, make: Callable[[str], np.ndarray]) -> list[_Tensor]:
    """Every tensor of the file, one layer's experts together."""
    rows = spec(config)
    places: dict[str, tuple[str, list[str]]] = {}  # GGUF name -> row, the Hugging Face tensors it holds
    for cell in cells(rows):
        row = rows[cell.path]
        gguf = row.gguf.format(layer=row.layers[cell.index[0]]) if cell.index else row.gguf
        places.setdefault(gguf, (cell.path, []))[1].append(cell.name)

    def tensor(gguf: str, path: str, names: list[str]) -> _Tensor:
        row = rows[path]
        shape = row.shape[1:] if row.layers else row.shape
        if row.is_matrix and shape[0] == 1:  # a vector there
            return _Tensor(gguf, shape[1:], _T.F32, lambda: make(names[0])[0])
        if row.is_experts:
            return _Tensor(gguf, shape, _type(row, shape, type), lambda: np.stack([make(name) for name in names]))
        return _Tensor(gguf, shape, _type(row, shape, type), lambda: to_gguf(config, path, make(names[0])))

    return _rope_tensors(config) + [tensor(gguf, path, names) for gguf, (path, names) in places.items()]


def _type(row: Row, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    matrix, table, _ = TYPES[type]
    if len(shape) == 1 or row.gguf.endswith(".bias") or row.gguf.startswith(("position_embd", "blk.{layer}.ffn_gate_inp")):
        return _T.F32
    wanted = table if "vocab" in row.axes else matrix
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _T.F16


# ---- metadata ----


def _add_config(writer: GGUFWriter, c: ModelConfig) -> None:
    writer.add_vocab_size(c.vocab_size)
    # Where llama.cpp has no sliding window it is right up to the window's length, so that is how long a text may be.
    limit = min([c.max_position_embeddings, *filter(None, c.layer_windows)]) if c.model_type in ("mistral", "mixtral", "phi3") else 0
    writer.add_context_length(limit or c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_layers)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    _add_rope(writer, c.ropes[0], truncate=c.model_type != "gpt_oss")
    if c.moe:
        writer.add_expert_count(c.moe.num_experts)
        writer.add_expert_used_count(c.moe.experts_per_token)


def _add_rope(writer: GGUFWriter, rope: Rope, truncate: bool) -> None:
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        if not math.isclose(rope.attention_factor, 0.1 * math.log(rope.factor) + 1, rel_tol=1e-6) or rope.truncate != truncate:
            raise ModelError("this model's yarn has an attention_factor or a truncate of its own, which GGUF cannot say")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    elif rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    elif rope.kind not in ("default", "llama3", "divisors"):
        raise ModelError(f"rope_type {rope.kind!r} cannot be written as GGUF; llama.cpp has no word for it")


def _rope_tensors(c: ModelConfig) -> list[_Tensor]:
    """Divisors of the rotary frequencies, which llama.cpp keeps as tensors."""
    rope, tensors = c.ropes[0], {}
    if rope.kind == "llama3":
        settings = {"factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        settings["original_max_position_embeddings"] = rope.original_max
        tensors["rope_freqs.weight"] = llama3_divisors(rope.theta, rope.pairs, settings)
    elif rope.kind == "divisors":
        tensors["rope_freqs.weight"] = np.asarray(rope.divisors, np.float32)
    elif rope.kind == "longrope":
        tensors["rope_factors_long.weight"] = np.asarray(rope.long_factor, np.float32)
        tensors["rope_factors_short.weight"] = np.asarray(rope.short_factor, np.float32)
    return [_Tensor(name, value.shape, _T.F32, lambda value=value: value) for name, value in tensors.items()]


def _plain(writer: GGUFWriter, c: ModelConfig) -> None:
    if any(c.layer_windows):
        writer.add_sliding_window(max(c.layer_windows))


def _phi3(writer: GGUFWriter, c: ModelConfig) -> None:
    writer.add_sliding_window(max(c.layer_windows))  # llama.cpp wants the key, 0 where there is none


def _qwen(writer: GGUFWriter, c: ModelConfig) -> None:
    if any(c.layer_windows):
        raise ModelError(f"a {c.model_type} model with use_sliding_window cannot be written as GGUF; llama.cpp has no window there")
    if c.moe:
        if len(c.stacks) > 1 or not c.moe.normalize:
            raise ModelError("llama.cpp runs Qwen 3 MoE with experts in every layer and norm_topk_prob only; this model differs")
        writer.add_expert_feed_forward_length(c.moe.intermediate_size)


def _gpt_oss(writer: GGUFWriter, c: ModelConfig) -> None:
    assert c.moe is not None
    if c.moe.clamp != (7.0, 1.702) or not c.qkv_bias or [bool(window) for window in c.layer_windows] != [
        layer % 2 == 0 for layer in range(c.num_layers)
    ]:
        raise ModelError("llama.cpp runs gpt_oss with attention_bias, swiglu_limit 7 and a window in every other layer, the first one on")
    writer.add_sliding_window(max(c.layer_windows))
    writer.add_expert_feed_forward_length(c.moe.intermediate_size)


def _qwen2_moe(writer: GGUFWriter, c: ModelConfig) -> None:
    if not c.qkv_bias:
        raise ModelError("llama.cpp wants biases of q, k and v in a qwen2moe model; this one has qkv_bias false")
    _plain_experts(writer, c)
    assert c.moe is not None
    writer.add_expert_feed_forward_length(c.moe.intermediate_size)
    writer.add_expert_shared_feed_forward_length(c.moe.shared_intermediate_size)


def _plain_experts(writer: GGUFWriter, c: ModelConfig) -> None:
    if any(c.layer_windows):
        raise ModelError(f"a {c.model_type} model with use_sliding_window cannot be written as GGUF; llama.cpp has no window there")
    if c.moe is None or len(c.stacks) > 1 or c.moe.normalize:
        raise ModelError(f"llama.cpp runs {c.model_type} with experts in every layer and without norm_topk_prob only; this model differs")


def _gemma2(writer: GGUFWriter, c: ModelConfig) -> None:
    # llama.cpp does not read the scale: the largest model's heads count as a share of the residual stream, all others' as they are.
    largest = c.num_layers == (46 if c.model_type == "gemma2" else 62)
    scalar = c.hidden_size // c.num_heads if largest else c.head_dim
    if not math.isclose(c.attention_scale, scalar**-0.5, rel_tol=1e-6):
        raise ModelError(f"llama.cpp takes {scalar} as query_pre_attn_scalar of a {c.model_type} of {c.num_layers} layers; not this one")
    period = 2 if c.model_type == "gemma2" else 6
    if [bool(window) for window in c.layer_windows] != [(layer + 1) % period != 0 for layer in range(c.num_layers)]:
        raise ModelError(f"llama.cpp runs {c.model_type} with a full layer every {period}; this model's layer_types differ")
    writer.add_sliding_window(max(c.layer_windows))
    if c.model_type == "gemma2" and not (c.logits_softcap and c.attention_softcap):
        raise ModelError("llama.cpp caps attention and logits of every gemma2 model; this one lacks attn_ or final_logit_softcapping")
    if c.logits_softcap:
        writer.add_final_logit_softcapping(c.logits_softcap)
    if c.attention_softcap:
        writer.add_attn_logit_softcapping(c.attention_softcap)


def _gemma3(writer: GGUFWriter, c: ModelConfig) -> None:
    _gemma2(writer, c)
    if c.ropes[1].kind != "default":
        raise ModelError("llama.cpp has no rotary scaling for the sliding layers of Gemma 3; this model has")
    writer.add_float32("gemma3.rope.freq_base_swa", c.ropes[1].theta)


def _granite(writer: GGUFWriter, c: ModelConfig) -> None:
    writer.add_attention_scale(c.attention_scale)
    writer.add_embedding_scale(c.embedding_multiplier)
    writer.add_residual_scale(c.residual_multiplier)
    writer.add_logit_scale(c.logits_scaling)


def _smollm3(writer: GGUFWriter, c: ModelConfig) -> None:
    if any(c.layer_windows) or [rope < 0 for rope in c.layer_ropes] != [(layer + 1) % 4 == 0 for layer in range(c.num_layers)]:
        raise ModelError("llama.cpp runs SmolLM3 without windows and without positions in every fourth layer; this model differs")


# model_type -> general.architecture, and what is written beyond the common part
ARCHITECTURES: dict[str, tuple[str, Callable[[GGUFWriter, ModelConfig], None]]] = {
    "llama": ("llama", _plain),
    "mistral": ("llama", _plain),
    "mixtral": ("llama", _plain),
    "gpt_oss": ("gpt-oss", _gpt_oss),
    "qwen2": ("qwen2", _qwen),
    "qwen2_moe": ("qwen2moe", _qwen2_moe),
    "qwen3": ("qwen3", _qwen),
    "qwen3_moe": ("qwen3moe", _qwen),
    "gemma": ("gemma", _plain),
    "gemma2": ("gemma2", _gemma2),
    "gemma3_text": ("gemma3", _gemma3),
    "olmo2": ("olmo2", _plain),
    "olmoe": ("olmoe", _plain_experts),
    "phi3": ("phi3", _phi3),
    "granite": ("granite", _granite),
    "granitemoe": ("granitemoe", _granite),
    "smollm3": ("smollm3", _smollm3),
}
assert ARCHITECTURES.keys() >= set(INTERLEAVED)

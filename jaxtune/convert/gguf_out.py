"""GGUF files out, tensor by tensor, with llama.cpp's metadata and the tokenizer."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize

from jaxtune.convert import gguf_layout, gguf_rope
from jaxtune.convert.gguf_architectures import ARCHITECTURES, keys_of
from jaxtune.convert.gguf_vocabulary import add_tokenizer
from jaxtune.convert.hf import tensors_out
from jaxtune.convert.names import cells
from jaxtune.convert.tensors import Checkpoint, check_finite
from jaxtune.disk import replacing
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
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
    keys = keys_of(config)
    writer = GGUFWriter(None, ARCHITECTURES[config.model_type].name)
    writer.add_type("model")
    writer.add_name(name or out.stem)
    writer.add_file_type(TYPES[type][2])
    writer.add_quantization_version(2)
    for key, value in keys.items():
        _add(writer, key, value)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size, generation_config or {})
    with replacing(out) as scratch:
        _write(writer, scratch, _tensors(config, type, make))
    return out


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    kinds[value.__class__](f"{writer.arch}.{key}", value)


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
            value = np.ascontiguousarray(tensor.make())
            check_finite(tensor.name, value)
            with np.errstate(over="ignore"):  # told by what follows
                packed = quantize(value, tensor.type)
            check_finite(tensor.name, packed)
            writer.write_tensor_data(packed)
    finally:
        writer.close()


def _tensors(config: ModelConfig, type: str, make: Callable[[str], np.ndarray]) -> list[_Tensor]:
    """Every tensor of the file, one layer's experts together."""
    rows = spec(config)
    places: dict[tuple[str, ...], tuple[str, list[str]]] = {}  # GGUF names -> row, the Hugging Face tensors they hold
    for cell in cells(rows):
        gguf = gguf_layout.names(cell.path, rows[cell.path], cell.index)
        places.setdefault(gguf, (cell.path, []))[1].append(cell.name)
    found = [
        _Tensor(name, value.shape, _T.F32, functools.partial(np.asarray, value)) for name, value in gguf_rope.rope_tensors(config).items()
    ]
    for gguf, (path, names) in places.items():
        row = rows[path]
        for number, (name, shape) in enumerate(zip(gguf, gguf_layout.shapes(config, path, row), strict=True)):
            value = functools.partial(_value, config, path, row, names, number, make)
            found.append(_Tensor(name, shape, _type(row, shape, type), value))
    return found


def _value(
    config: ModelConfig, path: str, row: Row, names: list[str], number: int, make: Callable[[str], np.ndarray]
) -> np.ndarray:
    """One tensor, of the Hugging Face tensors `names`."""
    if row.is_experts:
        return np.stack([make(name) for name in names])
    return gguf_layout.to_gguf(config, path, row, make(names[0]))[number]


def _type(row: Row, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    matrix, table, _ = TYPES[type]
    small = ("position_embd", "blk.{layer}.ffn_gate_inp", "blk.{layer}.ssm_conv1d")
    if len(shape) == 1 or row.init != "normal" or row.gguf.startswith(small):
        return _T.F32
    wanted = table if "vocab" in row.axes else matrix
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else _T.F16

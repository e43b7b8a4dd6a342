"""Write GGUF files tensor by tensor, with llama.cpp's metadata and the tokenizer."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from jaxtune.convert import gguf_layout, gguf_rope
from jaxtune.convert.gguf_architectures import architecture_of, keys_of
from jaxtune.convert.gguf_kquants import quantize
from jaxtune.convert.gguf_types import TYPES, Types
from jaxtune.convert.gguf_vocabulary import add_tokenizer
from jaxtune.convert.hf import tensors_out
from jaxtune.convert.names import cells
from jaxtune.convert.tensors import Checkpoint, check_finite
from jaxtune.disk import replacing
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.row import Row
from jaxtune.model.spec import spec


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
    """Write one `.gguf` file for llama.cpp; returns `out`.

    type          of the matrices: f32, f16, bf16, q8_0, q5_0, q5_1, q4_0, q4_1 (embedding and head are at least q8_0), or one of
                  llama.cpp's mixtures such as q4_k_m (`gguf_types.TYPES`). Norms, biases and routers are f32. A matrix whose row length is
                  not a multiple of a K-quant's 256 gets the next larger type with blocks of 32, as in llama.cpp; f16 if that does not fit
                  either
    params, base  as in `hf.save`

    The file is written under a temporary name and renamed. Raises ModelError for a family, a rotary scheme or a tokenizer that llama.cpp's
    format cannot express, and if `out` exists.
    """
    out = Path(out).expanduser().absolute()
    if type not in TYPES:
        raise ModelError(f"{type!r} is not a GGUF type that can be written; there are {', '.join(TYPES)}")
    if out.exists():
        raise ModelError(f"{out} exists; nothing is overwritten. Give another name, or remove it")
    config, _, make = tensors_out(config, params, "float32", base)
    architecture = architecture_of(config)
    keys = keys_of(config, architecture)
    writer = GGUFWriter(None, architecture.name)
    writer.add_type("model")
    writer.add_name(name or out.stem)
    writer.add_file_type(TYPES[type].file)
    writer.add_quantization_version(2)
    for key, value in keys.items():
        _add(writer, key, value)
    for key, names in _numbers(config).items():
        writer.add_array(key, [float(make(name).reshape(())) for name in names])
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size, generation_config or {})
    with replacing(out) as scratch:
        write(writer, scratch, _tensors(config, Types(config, architecture.name, type), make))
    return out


def _numbers(config: ModelConfig) -> dict[str, list[str]]:
    """Metadata keys with one number per layer, and the Hugging Face tensors that they come from."""
    found: dict[str, dict[int, str]] = {}
    for row in spec(config).values():
        if key := gguf_layout.number_key(row):
            found.setdefault(key, {}).update(zip(row.layers, row.hf_names(), strict=True))
    return {key: [names[layer] for layer in sorted(names)] for key, names in found.items()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    kinds[value.__class__](f"{writer.arch}.{key}", value)


class Tensor:
    """A tensor to be written: described before its values exist."""

    def __init__(self, name: str, shape: tuple[int, ...], type: GGMLQuantizationType, make: Callable[[], np.ndarray]):
        self.name, self.shape, self.type, self.make = name, shape, type, make
        block, size = GGML_QUANT_SIZES[type]
        self.nbytes = math.prod(shape) // block * size


def write(writer: GGUFWriter, path: Path, tensors: list[Tensor]) -> None:
    """Write the file: the writer's metadata, then each tensor in turn. ModelError for NaN and infinity."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.make())
            check_finite(tensor.name, value)
            with np.errstate(over="ignore"):  # refused below
                packed = quantize(value, tensor.type)
            check_finite(tensor.name, packed)
            writer.write_tensor_data(packed)
    finally:
        writer.close()


def _tensors(config: ModelConfig, types: Types, make: Callable[[str], np.ndarray]) -> list[Tensor]:
    """Every tensor of the file, one layer's experts together."""
    rows = spec(config)
    places: dict[tuple[str, ...], tuple[str, list[str]]] = {}  # GGUF names -> row, the Hugging Face tensors they contain
    for cell in cells({path: row for path, row in rows.items() if not gguf_layout.number_key(row)}):
        gguf = gguf_layout.names(config, cell.path, rows[cell.path], cell.index)
        places.setdefault(gguf, (cell.path, []))[1].append(cell.name)
    found = [
        Tensor(name, value.shape, GGMLQuantizationType.F32, functools.partial(np.asarray, value))
        for name, value in gguf_rope.rope_tensors(config).items()
    ]
    for gguf, (path, names) in places.items():
        row = rows[path]
        for number, (name, shape) in enumerate(zip(gguf, gguf_layout.shapes(config, path, row), strict=True)):
            value = functools.partial(_value, config, path, row, names, number, make)
            found.append(Tensor(name, shape, types.kind(name, shape, row), value))
    return found


def _value(
    config: ModelConfig, path: str, row: Row, names: list[str], number: int, make: Callable[[str], np.ndarray]
) -> np.ndarray:
    """One tensor, from the Hugging Face tensors `names`."""
    if row.is_experts or row.is_apart:
        return np.stack([make(name) for name in names])
    return gguf_layout.to_gguf(config, path, row, make(names[0]))[number]


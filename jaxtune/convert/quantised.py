"""Checkpoints quantised by other tools: which formats are read, and a file's quantised tensors as dense ones (`dense`).

bitsandbytes' stay quantised (convert/bitsandbytes.py); all others are dequantised tensor by tensor while reading.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxtune.convert.awq import AWQ
from jaxtune.convert.compressed import CompressedTensors
from jaxtune.convert.fp8 import FP8
from jaxtune.convert.gptq import GPTQ
from jaxtune.convert.mxfp4 import MXFP4
from jaxtune.convert.names import cells, spellings
from jaxtune.convert.packed import Format
from jaxtune.convert.tensors import Entry, main_dtype, read_entry
from jaxtune.errors import ModelError
from jaxtune.model.families import ModelConfig
from jaxtune.model.spec import spec

log = logging.getLogger("jaxtune")

BITSANDBYTES = "bitsandbytes"
FORMATS: dict[str, type[Format]] = {
    "mxfp4": MXFP4, "fp8": FP8, "fbgemm_fp8": FP8, "mxfp8": FP8, "compressed-tensors": CompressedTensors, "gptq": GPTQ, "awq": AWQ,
}  # fmt: skip
KEYS = ("quantization_config", "compression_config")  # of config.json; compressed-tensors once wrote the second
# Scales of activations and of a key-value cache: for kernels that multiply in 8 bits.
_OF_ACTIVATIONS = re.compile(r".*[._](activation_scale|(input|output|q|k|v)_(scale|zero_point|global_scale))")


def settings_of(hf: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """config.json's description of quantised tensors, with its `quant_method`; None for a dense model.

    Raises ModelError for anything but an object, and for an unsupported method.
    """
    inside = hf.get("text_config")
    places = [hf, inside] if isinstance(inside, Mapping) else [hf]
    settings = next((place[key] for place in places for key in KEYS if place.get(key)), None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"config.json says quantization_config={settings!r}; it has to be an object")
    method = settings.get("quant_method", BITSANDBYTES if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None)
    if not isinstance(method, str) or method not in (BITSANDBYTES, *FORMATS):
        can = f"{BITSANDBYTES}' nf4, fp4 and int8, {', '.join(FORMATS)} can be read"
        raise ModelError(f"config.json says quant_method {method!r}; {can}. Give the model that it was made from (quantization packs that)")
    return {**settings, "quant_method": method}


def format_of(hf: Mapping[str, Any]) -> Format | None:
    """The format of tensors that are dequantised while reading; None if there are none. ModelError for an unsupported one."""
    settings = settings_of(hf)
    return None if settings is None or settings["quant_method"] == BITSANDBYTES else FORMATS[settings["quant_method"]](settings)


def dense(entries: dict[str, Entry], hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Entry]:
    """The entries of a file, with one dense tensor for each quantised one; its dtype is that of the file's unquantised tensors.

    Raises ModelError for an unsupported format, and if parts of a tensor are missing or do not fit.
    """
    format = format_of(hf)
    if format is None:
        return entries
    if format.what != "mxfp4" and any(row.transposed and not row.part for row in spec(config).values()):
        raise ModelError(f"{config.model_type} models are not read from {format.what}; give the original model")
    found = {name: (shape, packed) for name, shape, packed in format.tensors(entries)}
    parts = {name for _, packed in found.values() for name in (*packed.parts, *packed.unused)}
    plain = {name: entry for name, entry in entries.items() if name not in parts}
    unused = [name for name in plain if _OF_ACTIVATIONS.fullmatch(name)]
    for name in (*unused, *_idle_biases(found, plain, config)):
        del plain[name]
    if not found:
        raise ModelError(
            f"config.json says that tensors are quantised as {format.what}, but none of them is; take quantization_config out of it"
        )
    dtype = np.dtype(main_dtype(plain.values()))
    result = plain | {name: Entry(next(iter(p.parts.values())).file, dtype, shape, 0, p) for name, (shape, p) in found.items()}
    log.info("%d tensors are quantised (%s); they are dequantised while loading, and saved as dense ones", len(found), format.what)
    if unused:
        log.info("%d scales of activations are not used in a dense model and are ignored: %s ...", len(unused), unused[0])
    return result


def _idle_biases(packed: Collection[str], plain: Mapping[str, Entry], config: ModelConfig) -> list[str]:
    """Zero biases that the model does not have: AutoGPTQ once added one to every module."""
    own = {spelling for cell in cells(spec(config)) for spelling in spellings(cell.name)}
    biases = [] if config.outer else [name.removesuffix("weight") + "bias" for name in packed]
    return [bias for bias in biases if bias in plain and bias not in own and not read_entry(bias, plain[bias]).any()]

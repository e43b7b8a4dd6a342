"""compressed-tensors (llm-compressor's files, of RedHatAI and Neural Magic): `W = (codes - zero) * scale`, X a module's name.

    float-, int- and naive-quantized   X.weight float8 or int8 [out, in]
    pack-quantized                     X.weight_packed int32 [out, words]: codes + 2^(bits-1), one after the other; X.weight_shape [2]
    nvfp4-, mxfp4-pack-quantized       X.weight_packed uint8 [out, in / 2], FP4 (E2M1), the low four bits the earlier number
    mxfp8-quantized                    X.weight float8 [out, in]

    X.weight_scale   `strategy` tensor: one; channel: [out, 1]; group: [out, in / group_size]; block: [ceil(out / bm), ceil(in / bn)];
                     of MX formats the exponent + 127; of nvfp4 float8, to be divided by X.weight_global_scale [1]
    X.weight_zero_point   as the scales; of pack-quantized packed along the outputs, [words, groups]
    X.weight_g_idx   int32 [in]: the group of each input (actorder: group); -1 if unused

`config_groups` in config.json says which modules are quantised how (`targets`); the file itself says which are not quantised. Read as by
the package's `decompress` (compressed_tensors 0.20.1; `g_idx` as in 0.9.4).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.convert.packed import (
    E2M1_PAIRS,
    FLOAT8,
    FLOATS,
    POWERS,
    Packed,
    Shape,
    checked_groups,
    from_float8,
    grid,
    group_size,
    matrix,
    part,
    refused,
    scaled,
    scales_of,
    unpack,
    whole_number,
    words,
    wrong,
)
from jaxtune.convert.tensors import Entry, read_entry

_INT8, _INT32, _INT64, _UINT8 = (np.dtype(t) for t in (np.int8, np.int32, np.int64, np.uint8))
_FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_CODES = {
    "float-quantized": FLOAT8, "int-quantized": (_INT8,), "naive-quantized": (*FLOAT8, _INT8), "mxfp8-quantized": FLOAT8,
    "pack-quantized": (_INT32,), "nvfp4-pack-quantized": (_UINT8,), "mxfp4-pack-quantized": (_UINT8,),
}  # fmt: skip
_BITS = {"pack-quantized": range(1, 9), **dict.fromkeys(_FP4, (4,))}


class Scheme(NamedTuple):
    """How the modules of one of `config_groups` are quantised."""

    targets: list[str]
    format: str
    bits: int
    symmetric: bool
    sides: tuple[int | None, int | None]  # rows and columns that share a scale; None: all
    ordered: bool  # groups of inputs are unordered

    def is_for(self, name: str, is_pattern: bool) -> bool:
        """Whether one of the targets is this module's name, or a pattern for it."""
        own = [target.removeprefix("re:") for target in self.targets if target.startswith("re:") == is_pattern]
        return any(re.match(target, name) for target in own) if is_pattern else name in own


class CompressedTensors:
    """`quant_method: compressed-tensors`."""

    def __init__(self, settings: Mapping[str, Any]):
        for key in ("sparsity_config", "transform_config"):
            said = settings.get(key) or {}
            if not isinstance(said, Mapping) or said.get("format", "dense") != "dense" or said.get("config_groups"):
                raise refused(key, said, "left out")
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise refused("config_groups", groups, "an object of objects")
        self.schemes = [_scheme(group, settings.get("format")) for group in groups.values() if group.get("weights")]
        self.what = "compressed-tensors, " + " and ".join(dict.fromkeys(scheme.format for scheme in self.schemes))

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Packed]]:
        """Name, shape and parts of each quantised matrix (see packed.Format)."""
        ends = (".weight_packed", ".weight_scale")
        found = {name.removesuffix(end) + ".weight": name for end in ends for name in entries if name.endswith(end)}
        found |= {name: name for name, entry in entries.items() if name.endswith(".weight") and entry.dtype in (*FLOAT8, _INT8)}
        for weight, name in found.items():
            scheme = self._scheme_of(weight.removesuffix(".weight"), name, entries[name])
            codes = weight + ("_packed" if scheme.format.endswith("pack-quantized") else "")
            part(entries, codes, name, _CODES[scheme.format])
            shape = _shape(entries, weight, codes, scheme)
            yield weight, shape, _packed(entries, weight, codes, shape, scheme)

    def _scheme_of(self, module: str, name: str, entry: Entry) -> Scheme:
        """The scheme that names the module, in preference to one with a pattern, and that to one with its class."""
        text = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", module)
        names = [module, *(re.sub(r"^model\.", stem, text) for stem in ("model.", "model.language_model.", "language_model.model."))]
        for is_pattern in (False, True):
            for scheme in self.schemes:
                if any(scheme.is_for(spelling, is_pattern) for spelling in names):
                    return scheme
        if of_class := [scheme for scheme in self.schemes if {"Linear", "Embedding"} & set(scheme.targets)]:
            return of_class[0]
        raise wrong(name, entry, "belongs to a module that is no target of config.json's config_groups; fetch the folder again")


def _scheme(group: Mapping[str, Any], format: Any) -> Scheme:
    format, weights, targets = group.get("format") or format, group["weights"], group.get("targets")
    if not isinstance(format, str) or format not in _CODES:
        raise refused("format", format, f"one of {', '.join(_CODES)}")
    if not isinstance(weights, Mapping):
        raise refused("weights", weights, "an object")
    try:
        patterns = isinstance(targets, list) and all(re.compile(target.removeprefix("re:")) for target in targets)
    except (AttributeError, re.error):
        patterns = False
    if not patterns:
        raise refused("targets", targets, "a list of names, classes and re: patterns")
    size = group_size(weights, -1) if weights.get("group_size") is not None else None
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    sides = {"tensor": (None, None), "channel": (1, None)}
    if size is not None:
        sides |= dict.fromkeys(("group", "tensor_group"), (1, None if size == -1 else size))
    if strategy == "block":
        block = weights.get("block_structure")
        block = block.split("x") if isinstance(block, str) else block
        if not isinstance(block, list) or len(block) != 2 or not all(str(side).isdecimal() and int(side) for side in block):
            raise refused("block_structure", block, "two sizes, [rows, columns]")
        sides[strategy] = (int(block[0]), int(block[1]))
    if not isinstance(strategy, str) or strategy not in sides:
        raise refused("strategy", strategy, "tensor, channel, block, or group or tensor_group with a group_size")
    bits = whole_number(weights, "num_bits", 8, _BITS.get(format, (8,)))
    ordered = weights.get("actorder") in (True, "group", "dynamic") and "group" in strategy
    return Scheme(targets, format, bits, bool(weights.get("symmetric", True)), sides[strategy], ordered)


def _shape(entries: Mapping[str, Entry], weight: str, codes: str, scheme: Scheme) -> Shape:
    """The shape of the matrix."""
    out, width = matrix(codes, entries[codes])
    if scheme.format != "pack-quantized":
        return out, 2 * width if scheme.format in _FP4 else width
    name = f"{weight}_shape"
    shape = tuple(read_entry(name, part(entries, name, codes, (_INT64, _INT32), [(2,)])[name]).tolist())
    if shape[0] != out or words(shape[1], scheme.bits) != width:
        holds = f"has shape {[out, width]}, which does not hold {list(shape)} codes ({name}) of {scheme.bits} bits"
        raise wrong(codes, entries[codes], holds)
    return shape


def _packed(entries: Mapping[str, Entry], weight: str, codes: str, shape: Shape, scheme: Scheme) -> Packed:
    block = (scheme.sides[0] or shape[0], scheme.sides[1] or shape[1])
    blocks = grid(shape, block)
    forms = [blocks, *([blocks[:1]] if blocks[1] == 1 else []), *([()] if blocks == (1, 1) else [])]
    scales = POWERS if scheme.format.startswith("mx") else (*FLOATS, *FLOAT8)
    parts = {"codes": codes, "scales": f"{weight}_scale"}
    wanted: dict[str, tuple] = {"scales": (scales, forms), "divisor": (FLOATS, [(1,), ()]), "groups": ((_INT32,), [shape[1:]])}
    if scheme.format == "nvfp4-pack-quantized":
        parts["divisor"] = f"{weight}_global_scale"
    if scheme.format == "pack-quantized":
        wanted["zeros"] = ((_INT32,), [(words(blocks[0], scheme.bits), blocks[1])])
    else:
        wanted["zeros"] = ((*FLOATS, *FLOAT8, _INT8, _INT32, _INT64), forms)
    if not scheme.symmetric or (f"{weight}_zero_point" in entries and scheme.format in ("int-quantized", "naive-quantized")):
        parts["zeros"] = f"{weight}_zero_point"
    if scheme.ordered or (f"{weight}_g_idx" in entries and scheme.sides[1] is not None):
        parts["groups"] = f"{weight}_g_idx"
    held = {name: part(entries, name, codes, *wanted[key])[name] for key, name in parts.items() if key != "codes"}
    order = f"{weight}_g_idx", entries.get(f"{weight}_g_idx")
    numbers = functools.partial(_numbers, scheme, shape, block, tuple(parts), order)
    return Packed({codes: entries[codes], **held}, numbers, tuple(f"{weight}_{end}" for end in ("shape", "zero_point", "g_idx")))


def _numbers(scheme: Scheme, shape: Shape, block: tuple[int, int], keys: tuple[str, ...], order: tuple, *arrays) -> np.ndarray:
    held, blocks = dict(zip(keys, arrays, strict=True)), grid(shape, block)
    codes, zeros, groups = held["codes"], held.get("zeros"), held.get("groups")
    if scheme.format in _FP4:
        values = E2M1_PAIRS[codes].reshape(shape)
    elif scheme.format == "pack-quantized":
        values = unpack(codes, scheme.bits, shape[1]).astype(np.float32)
        zeros = np.full(blocks, 1 << scheme.bits - 1) if zeros is None else unpack(zeros.T, scheme.bits, blocks[0]).T
    else:
        values = from_float8(codes) if codes.dtype in FLOAT8 else codes.astype(np.float32)
    scales = scales_of(held["scales"]).reshape(blocks)
    if "divisor" in held:
        scales = scales / held["divisor"].astype(np.float32).reshape(())
    zeros = None if zeros is None else zeros.astype(np.float32).reshape(blocks)
    groups = None if groups is None or (groups == -1).any() else checked_groups(groups, blocks[1], *order)
    return scaled(values, scales, block, zeros, groups)

"""GPTQ matrices (AutoGPTQ, GPTQModel): `W[o, i] = (q[i, o] - zero[g, o]) * scale[g, o]`, g the group of input i, X a module's name.

    X.qweight int32 [words of in, out]     codes of `bits` bits, one after the other along the inputs, lowest bit first
    X.qzeros int32 [groups, words of out]  zero points along the outputs; `checkpoint_format: gptq` stores them minus one (in `bits` bits)
    X.scales [groups, out]
    X.g_idx int32 [in]                     g; by default i // group_size (not with `desc_act`, which orders the inputs itself)

`sym: true` says that the zero point is 2^(bits-1); files that say `gptq` and store it unchanged (Qwen3.5-27B-GPTQ-Int4) are read correctly.
`dynamic`: some modules have other bits or groups, which follow from their shapes.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.convert.packed import (
    FLOATS,
    Packed,
    Shape,
    checked_groups,
    group_size,
    matrix,
    part,
    refused,
    scaled,
    unpack,
    whole_number,
    words,
    wrong,
)
from jaxtune.convert.tensors import Entry

_INT32 = (np.dtype(np.int32),)
BITS = (2, 3, 4, 8)


class GPTQ:
    """`quant_method: gptq`."""

    def __init__(self, settings: Mapping[str, Any]):
        self.bits, self.group = whole_number(settings, "bits", 4, BITS), group_size(settings, 128)
        self.format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if self.format not in ("gptq", "gptq_v2"):
            raise refused("checkpoint_format", self.format, "gptq or gptq_v2")
        self.symmetric, self.varies = settings.get("sym", True) is True, bool(settings.get("dynamic"))
        self.ordered = settings.get("desc_act") is True
        self.what = f"{self.format}, {self.bits} bits"

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Packed]]:
        """Name, shape and parts of each quantised matrix (see packed.Format)."""
        for name in [name for name in entries if name.endswith(".qweight")]:
            module, entry = name.removesuffix(".qweight"), entries[name]
            part(entries, name, name, _INT32)
            rows, out = matrix(name, entry)
            order = entries.get(f"{module}.g_idx")
            width = order.shape[0] if order and len(order.shape) == 1 else 32 * rows // self.bits
            bits = next((bits for bits in (self.bits, *BITS) if words(width, bits) == rows), None)
            if bits is None or (bits != self.bits and not self.varies):
                raise wrong(name, entry, f"has shape {list(entry.shape)}, which does not hold {width} inputs (g_idx) of {self.bits} bits")
            group = self.group if self.group > 0 else width
            groups = -(-width // group)
            if self.varies and (other := entries.get(f"{module}.scales")) and other.shape and other.shape[0] not in (0, groups):
                groups = other.shape[0]
                group = -(-width // groups)
            parts = {name: entry, **part(entries, f"{module}.qzeros", name, _INT32, [(groups, words(out, bits))])}
            parts |= part(entries, f"{module}.scales", name, FLOATS, [(groups, out)])
            if order is not None or self.ordered:
                parts |= part(entries, f"{module}.g_idx", name, _INT32, [(width,)])
            numbers = functools.partial(self._numbers, bits, (out, width), group, (f"{module}.g_idx", order))
            yield f"{module}.weight", (out, width), Packed(parts, numbers)

    def _numbers(self, bits: int, shape: Shape, group: int, order: tuple, codes, zeros, scales, groups=None) -> np.ndarray:
        values = unpack(codes.T, bits, shape[1]).astype(np.float32)
        zeros = unpack(zeros, bits, shape[0])
        if self.format == "gptq" and not (self.symmetric and (zeros == 1 << bits - 1).all()):
            zeros = zeros + 1 & (1 << bits) - 1
        groups = None if groups is None else checked_groups(groups, len(scales), *order)
        return scaled(values, scales.T.astype(np.float32), (1, group), zeros.T.astype(np.float32), groups)

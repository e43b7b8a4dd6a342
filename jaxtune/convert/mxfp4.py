"""Tensors in MXFP4 (OCP Microscaling Formats 1.0; GPT-OSS's experts), dequantised while reading.

    X_blocks uint8 [..., out, in / 32, 16]   two codes per byte, the low nibble first
    X_scales uint8 [..., out, in / 32]       a power of two for 32 numbers, its exponent + 127

A code has two bits of mantissa and a scale none, so bfloat16 holds the product exactly. X is `[..., in, out]`, as in transformers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.convert.packed import E2M1_PAIRS, Shape, wrong
from jaxtune.convert.tensors import Entry, read_part

_BLOCKS, _SCALES = "_blocks", "_scales"


class Blocks(NamedTuple):
    """One tensor of experts."""

    parts: dict[str, Entry]
    unused: tuple[str, ...] = ()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """`[index]` of the tensor, without reading other experts and outputs."""
        *lead, width, outputs = index
        blocks, scales = (read_part(name, entry, (*lead, outputs)) for name, entry in self.parts.items())
        numbers = np.ldexp(E2M1_PAIRS[blocks].reshape(*blocks.shape[:-1], 32), scales[..., None].astype(np.int32) - 127)
        return numbers.astype(ml_dtypes.bfloat16).reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)[..., width, :]


class MXFP4:
    """`quant_method: mxfp4`."""

    what = "mxfp4"

    def __init__(self, settings: Mapping[str, Any]):
        del settings  # the file says what is dense

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Blocks]]:
        """Name, shape and parts of each quantised tensor (see packed.Format)."""
        for blocks in [name for name in entries if name.endswith(_BLOCKS)]:
            name, entry = blocks.removesuffix(_BLOCKS), entries[blocks]
            scales = entries.get(name + _SCALES)
            if scales is None or entry.shape[:-1] != scales.shape or entry.shape[-1] != 16 or len(entry.shape) < 3:
                raise wrong(blocks, entry, f"and {name + _SCALES} are not MXFP4: scales [..., n] of blocks [..., n, 16]")
            *lead, out, groups, _ = entry.shape
            yield name, (*lead, 32 * groups, out), Blocks({blocks: entry, name + _SCALES: scales})

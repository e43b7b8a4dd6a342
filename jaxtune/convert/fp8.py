"""FP8 matrices (DeepSeek V3's and Qwen's `fp8`, AutoFP8's, `fbgemm_fp8`, `mxfp8`): `W = float8 * scale`, one scale per block.

    X float8 [..., out, in]            X_scale_inv or X_scale, a factor despite its name; float, or E8M0 (a power of two):
    per block                          [..., ceil(out / bm), ceil(in / bn)], `weight_block_size: [bm, bn]`
    per row, or for the whole matrix   [..., out, 1] or [..., out]; [..., 1, 1], [..., 1] or [...]

Blocks at the edge may be smaller, as in DeepSeek's `kv_a_proj_with_mqa`; transformers' `Fp8Dequantize` derives the block size from the
shapes of matrix and scales, and refuses such edges.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.convert.packed import FLOAT8, FLOATS, POWERS, Packed, Shape, from_float8, grid, part, refused, scaled, scales_of, wrong
from jaxtune.convert.tensors import Entry
from jaxtune.errors import ModelError

# suffixes of scales instead of the matrix's; the last two are DeepSeek V4's and Mistral Large 4's
_ENDS = (("", "_scale_inv"), ("", "_scale"), (".weight", ".scale"), (".weight", ".qscale_weight"))
_BLOCKS = {"fp8": [128, 128], "mxfp8": [1, 32]}  # if config.json does not say


class FP8:
    """`quant_method: fp8`, `fbgemm_fp8` or `mxfp8`."""

    def __init__(self, settings: Mapping[str, Any]):
        self.what = settings["quant_method"]
        self.block = block = settings.get("weight_block_size", _BLOCKS.get(self.what))
        if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise refused("weight_block_size", block, "two sizes, [rows, columns], or null")
        if settings.get("expert_dtype", "fp8") != "fp8":
            raise refused("expert_dtype", settings["expert_dtype"], "fp8")

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Packed]]:
        """Name, shape and parts of each quantised matrix (see packed.Format)."""
        for name, entry in entries.items():
            scale = next((found for found in _scale_names(name) if found in entries), None)
            if entry.dtype in FLOAT8:
                yield name, entry.shape, self._packed(entries, name, entry, scale or name + "_scale_inv")
            elif scale:
                raise wrong(name, entry, f"is {entry.dtype}, though it has a scale ({scale}); it has to be an 8-bit float. Fetch it again")
            elif matrix := next((matrix for matrix in _matrix_names(name) if matrix not in entries), None):
                raise ModelError(f"{entry.file}: tensor {matrix} is missing; {name} is its scale. Fetch the folder again")

    def _packed(self, entries: Mapping[str, Entry], name: str, entry: Entry, scale: str) -> Packed:
        if len(entry.shape) < 2 or 0 in entry.shape:
            raise wrong(name, entry, f"has shape {list(entry.shape)}, which is no matrix in 8-bit floats")
        *lead, rows, cols = entry.shape
        blocks = dict.fromkeys([(*lead, rows, 1), (*lead, rows)], (1, cols))
        blocks |= dict.fromkeys([(*lead, 1, 1), (*lead, 1), (*lead,)], (rows, cols))
        if self.block:
            blocks |= {(*lead, *grid(entry.shape, self.block)): tuple(self.block)}
        found = part(entries, scale, name, (*FLOATS, *POWERS), list(blocks))
        return Packed({name: entry, **found}, functools.partial(_numbers, blocks[found[scale].shape]))


def _scale_names(name: str) -> list[str]:
    """Possible names for the scale of a matrix, the usual one first."""
    return [name.removesuffix(end) + scale for end, scale in _ENDS if name.endswith(end)]


def _matrix_names(name: str) -> list[str]:
    """The matrix to which a tensor is the scale, judged by its name."""
    return [name.removesuffix(end) for _, end in _ENDS[:2] if name.endswith("weight" + end)]


def _numbers(block: tuple[int, int], codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    scales = scales if scales.ndim == codes.ndim else scales.reshape(*codes.shape[:-2], -1, 1)
    return scaled(from_float8(codes), scales_of(scales), block)

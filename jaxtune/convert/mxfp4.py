"""Tensors in MXFP4 (OCP's Microscaling Formats 1.0, of which GPT-OSS's experts come), read as the numbers they stand for.

    X_blocks uint8 [..., out, in / 32, 16]   two codes a byte, the low nibble the earlier one
    X_scales uint8 [..., out, in / 32]       a power of two for 32 numbers, its exponent + 127

A code has two bits of mantissa and a scale none, so bfloat16 holds the product exactly. X is `[..., in, out]`, as transformers has it.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.convert.tensors import Safetensors
from jaxtune.errors import ModelError

_BLOCKS, _SCALES = "_blocks", "_scales"
_CODES = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_CODES = np.concatenate([_CODES, -_CODES])
_PAIRS = np.stack([_CODES[np.arange(256) & 15], _CODES[np.arange(256) >> 4]], axis=-1)


def is_mxfp4(hf: Mapping[str, Any]) -> bool:
    """Whether config.json says that experts are stored so."""
    settings = hf.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"


class MXFP4:
    """A checkpoint whose tensors in MXFP4 are read as bfloat16."""

    def __init__(self, checkpoint: Safetensors):
        self.checkpoint, self.entries = checkpoint, dict(checkpoint.entries)
        self._packed: set[str] = set()
        for blocks in [name for name in checkpoint.entries if name.endswith(_BLOCKS)]:
            name, entry = blocks.removesuffix(_BLOCKS), self.entries.pop(blocks)
            scales = self.entries.pop(name + _SCALES, None)
            if scales is None or entry.shape[:-1] != scales.shape or entry.shape[-1] != 16 or len(entry.shape) < 3:
                raise ModelError(f"{entry.file}: {blocks} and {name + _SCALES} are not MXFP4: scales [..., n] of blocks [..., n, 16]")
            *lead, out, groups, _ = entry.shape
            self.entries[name] = entry._replace(dtype=np.dtype(ml_dtypes.bfloat16), shape=(*lead, 32 * groups, out))
            self._packed.add(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.read_part(name, ())

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]` without reading the rest; of a tensor in MXFP4 without reading other outputs."""
        if name not in self._packed:
            return self.checkpoint.read_part(name, index)
        *lead, width, outputs = (*index, *(slice(None),) * (len(self.entries[name].shape) - len(index)))
        blocks, scales = (self.checkpoint.read_part(name + part, (*lead, outputs)) for part in (_BLOCKS, _SCALES))
        numbers = np.ldexp(_PAIRS[blocks].reshape(*blocks.shape[:-1], 32), scales[..., None].astype(np.int32) - 127)
        return numbers.astype(ml_dtypes.bfloat16).reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)[..., width, :]

"""AWQ matrices (AutoAWQ's `gemm` layout): `W[o, i] = (q[i, o] - zero[g, o]) * scale[g, o]`, g = i // group_size, X a module's name.

X.qweight int32 [in, out / 8]     codes of 4 bits along the outputs, eight per word; from its lowest bits outputs 0 2 4 6 1 3 5 7
X.qzeros int32 [groups, out / 8]  zero points, in the same order
X.scales [groups, out]
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.convert.packed import FLOATS, Packed, Shape, group_size, matrix, part, refused, scaled, unpack, whole_number, wrong
from jaxtune.convert.tensors import Entry

_INT32 = (np.dtype(np.int32),)
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # the position of each output's code in a word


class AWQ:
    """`quant_method: awq`."""

    what = "awq"

    def __init__(self, settings: Mapping[str, Any]):
        whole_number(settings, "bits", 4, (4,))
        self.group = group_size(settings, 128)
        version = settings.get("version") or settings.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise refused("version", version, "gemm")
        if settings.get("backend") == "llm-awq":
            raise refused("backend", "llm-awq", "autoawq")
        if settings.get("zero_point", True) is not True:
            raise refused("zero_point", settings["zero_point"], "true")

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Packed]]:
        """Name, shape and parts of each quantised matrix (see packed.Format)."""
        if name := next((name for name in entries if name.endswith("act.scales")), None):
            raise wrong(name, entries[name], "scales activations, which a dense model has no place for. Give the original model")
        for name in [name for name in entries if name.endswith(".qweight")]:
            module, entry = name.removesuffix(".qweight"), entries[name]
            part(entries, name, name, _INT32)
            width, packs = matrix(name, entry)
            group = self.group if self.group > 0 else width
            groups = -(-width // group)
            zeros = part(entries, f"{module}.qzeros", name, _INT32, [(groups, packs)])
            scales = part(entries, f"{module}.scales", name, FLOATS, [(groups, 8 * packs)])
            yield f"{module}.weight", (8 * packs, width), Packed({name: entry, **zeros, **scales}, functools.partial(_numbers, group))


def _numbers(group: int, codes, zeros, scales) -> np.ndarray:
    values, zeros = (_in_order(words).T.astype(np.float32, order="C") for words in (codes, zeros))
    return scaled(values, scales.T.astype(np.float32), (1, group), zeros)


def _in_order(words: np.ndarray) -> np.ndarray:
    """Codes uint8 `[rows, outputs]`."""
    return unpack(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)[..., _PLACES].reshape(len(words), -1)

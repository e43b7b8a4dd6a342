"""Tensors that a file stores as several others, and what these formats have in common: codes, scales, zero points.

A format (fp8.py, compressed.py, gptq.py, awq.py, mxfp4.py; the table is in quantised.py) is created from config.json's description, and
finds the quantised tensors among a file's entries.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from jaxtune.convert.tensors import Entry, read_entry, read_part
from jaxtune.errors import ModelError

Shape = tuple[int, ...]
FLOATS = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
FLOAT8 = tuple(np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2))
POWERS = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu))  # powers of two: a scale's exponent + 127 (OCP's E8M0)
_FLOAT8_VALUES = {dtype: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in FLOAT8}
_E2M1 = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])
E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1)  # of a byte, the low four bits first


class Packed(NamedTuple):
    """A tensor computed from others: float32 `numbers(*arrays)`, `[..., rows, cols]`, from `parts` that have the same leading axes."""

    parts: dict[str, Entry]
    numbers: Callable[..., np.ndarray]
    unused: tuple[str, ...] = ()  # other tensors for it in the file, which its numbers do not need

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """`[index]` of the tensor, with a slice for each axis; of a layer's experts, no others than these are read."""
        lead = index[:-2]
        arrays = [read_part(name, entry, lead) if lead else read_entry(name, entry) for name, entry in self.parts.items()]
        return self.numbers(*arrays)[(..., *index[-2:])]


class Format(Protocol):
    """One tool's format, created from config.json's `quantization_config`; raises ModelError for unsupported settings."""

    what: str  # for a person

    def __init__(self, settings: Mapping[str, Any]): ...

    def tensors(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Shape, Any]]:
        """Name, shape and `Packed` (or something with the same interface) of each quantised tensor. ModelError for a damaged file."""
        ...


# ---- what a file holds ----


def part(
    entries: Mapping[str, Entry], name: str, of: str, dtypes: Collection[np.dtype], shapes: Sequence[Shape] | None = None
) -> dict[str, Entry]:
    """`{name: entry}` for one part of the tensor `of`. ModelError if it is missing, or has a wrong dtype or shape."""
    if name not in entries:
        raise ModelError(f"{entries[of].file}: tensor {name} is missing; {of} is packed and needs it. Fetch the folder again")
    entry = entries[name]
    if entry.dtype not in dtypes:
        raise wrong(name, entry, f"is {entry.dtype}, and has to be {' or '.join(str(d) for d in dtypes)}")
    if shapes is not None and entry.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise wrong(name, entry, f"has shape {list(entry.shape)}; {of} and config.json ask for {wanted}")
    return {name: entry}


def wrong(name: str, entry: Entry, what: str) -> ModelError:
    """The error for an unexpected tensor."""
    return ModelError(f"{entry.file}: tensor {name} {what}")


def matrix(name: str, entry: Entry) -> Shape:
    """The shape of packed codes, `[rows, cols]`."""
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise wrong(name, entry, f"has shape {list(entry.shape)}, which is no packed matrix")
    return entry.shape


# ---- what config.json says ----


def refused(key: str, value: Any, can: str) -> ModelError:
    """The error for an unsupported value of `quantization_config`."""
    return ModelError(f"config.json says {key}={value!r} in quantization_config; it has to be {can}, or give the original model")


def whole_number(settings: Mapping[str, Any], key: str, default: int, allowed: Collection[int]) -> int:
    """A number from config.json. ModelError unless it is one of `allowed`."""
    value = settings.get(key, default)
    if type(value) is not int or value not in allowed:
        raise refused(key, value, "one of " + ", ".join(map(str, allowed)) if len(allowed) > 1 else str(*allowed))
    return value


def group_size(settings: Mapping[str, Any], default: int) -> int:
    """How many inputs share a scale; -1: all."""
    size = settings.get("group_size", default)
    if type(size) is not int or (size != -1 and size < 1):
        raise refused("group_size", size, "a number of inputs, or -1 for all")
    return size


# ---- codes and scales ----


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes, uint8 `[..., count]`, from words `[..., n]` that hold them one after the other, from the lowest bit on."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        codes = np.stack([octets >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)
    else:
        single = np.unpackbits(octets, axis=-1, count=count * bits, bitorder="little").reshape(*octets.shape[:-1], count, bits)
        codes = np.packbits(single, axis=-1, bitorder="little")
    return codes.reshape(*octets.shape[:-1], -1)[..., :count]


def words(count: int, bits: int) -> int:
    """The number of 32-bit words for `count` codes."""
    return -(-count * bits // 32)


def from_float8(codes: np.ndarray) -> np.ndarray:
    """float32 from 8-bit floats; a table is eight times as fast as ml_dtypes' cast."""
    return _FLOAT8_VALUES[codes.dtype].take(codes.view(np.uint8), mode="clip")


def scales_of(stored: np.ndarray) -> np.ndarray:
    """float32 scales, from floats or powers of two."""
    return np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - 127) if stored.dtype in POWERS else stored.astype(np.float32)


def checked_groups(groups: np.ndarray, count: int, name: str, entry: Entry) -> np.ndarray:
    """The group of each column. ModelError unless there are that many."""
    if groups.min() < 0 or groups.max() >= count:
        raise wrong(name, entry, f"has groups {groups.min()} to {groups.max()}, and there are scales of {count}. Fetch it again")
    return groups


def grid(shape: Shape, block: tuple[int, int]) -> Shape:
    """The number of blocks of a matrix in each direction; the last ones may be smaller."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def scaled(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int], zeros: np.ndarray | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """`(values - zeros) * scales` in place: float32 `[..., rows, cols]`, one scale (and zero point) per block.

    groups  of each column, `[cols]`, if they are not in order (act-order); a block is then within one row.
    """
    if groups is not None and not np.array_equal(groups, np.arange(groups.size) // block[1]):
        scales, zeros, block = scales[..., groups], None if zeros is None else zeros[..., groups], (1, 1)
        values -= 0 if zeros is None else zeros
        values *= scales
        return values
    for operation, blocks in ((np.subtract, zeros), (np.multiply, scales)):
        if blocks is None:
            continue
        rows = np.repeat(blocks, block[0], axis=-2)[..., : values.shape[-2], :]
        for number in range(blocks.shape[-1]):
            own = values[..., number * block[1] : (number + 1) * block[1]]
            operation(own, rows[..., number : number + 1], out=own)
    return values

"""The GGUF container: metadata and tensors of a `.gguf` file, one tensor at a time.

The `gguf` package's own reader keeps the file mapped, takes seconds for a vocabulary and fails with a numpy error on a truncated file; the
container is simple enough to read here. The package's decoders of quantised blocks are used unchanged.
"""

import logging
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from gguf.quants import quant_shape_to_byte_shape

from jaxtune.errors import ModelError

log = logging.getLogger("jaxtune")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GGUFTensor(NamedTuple):
    """A tensor's place, type, and shape in numpy's order (GGUF lists the axes in reverse)."""

    file: Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        block, size = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    @property
    def dtype(self) -> np.dtype:
        """The dtype that `read` returns: the stored dtype, or float32 for what must be decoded."""
        return _PLAIN.get(self.type, np.dtype(np.float32))


class GGUFFile:
    """`metadata[key]` and `tensors[name]` of a file; `read(name)` decodes one tensor, exactly as the `gguf` package does."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        size = self.path.stat().st_size
        if size < 24:
            raise ModelError(f"{self.path} is not a GGUF file: it has {size} bytes")
        with self.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                self._parse(_Cursor(data), size)
            except (struct.error, IndexError, UnicodeDecodeError, KeyError) as error:
                raise ModelError(f"{self.path}: the header is cut or corrupt ({error!r}). Fetch the file again") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor, decoded: float32, or the stored float16 or bfloat16."""
        tensor = self.tensors[name]
        data = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.start)
        if tensor.type in _PLAIN:
            return data.view(tensor.dtype).reshape(tensor.shape)
        try:
            return dequantize(data.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.type)), tensor.type)
        except (NotImplementedError, ValueError) as error:
            what = f"{tensor.type.name} {list(tensor.shape)}"
            raise ModelError(f"{self.path}: tensor {name} is {what}, which the gguf package cannot decode") from error

    def _parse(self, cursor: "_Cursor", size: int) -> None:
        if (magic := cursor.take(4)) != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        if (version := cursor.number("I")) not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version} (or big-endian), which is not supported; there are 2 and 3")
        tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
        for _ in range(key_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("I"))
        raw = [_tensor_info(cursor, self.path) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ModelError(f"{self.path}: general.alignment is {alignment!r}; it has to be a whole number above 0. Fetch the file again")
        end = -(-cursor.place // alignment) * alignment
        base = end
        for name, kind, shape, offset in raw:
            tensor = GGUFTensor(self.path, kind, shape, base + offset)
            what = f"{self.path}: tensor {name} ({kind.name} {list(shape)})"
            if math.prod(shape) % GGML_QUANT_SIZES[kind][0] or tensor.start + tensor.nbytes > size:
                raise ModelError(f"{what} does not fit the file; it was cut. Fetch it again")
            if tensor.start != end:  # llama.cpp, too, wants them one behind the other
                raise ModelError(f"{what} begins at byte {tensor.start}, but the one before it ends at byte {end}. Fetch the file again")
            if name in self.tensors:
                raise ModelError(f"{what} is in the file twice. Fetch it again")
            self.tensors[name] = tensor
            end += -(-tensor.nbytes // alignment) * alignment
        if raw and size > end:
            self._check_rest(cursor, self.tensors[raw[-1][0]], size, end - base, alignment)
            log.warning("%s: %d bytes follow the last tensor; they are not read, as in llama.cpp", self.path, size - end)

    def _check_rest(self, cursor: "_Cursor", last: GGUFTensor, size: int, offset: int, alignment: int) -> None:
        """ModelError if the bytes after the last tensor are data that a damaged header hides: of another tensor, or of a wider type."""
        try:
            hidden = _tensor_info(cursor, self.path)[-1] == offset
        except (ModelError, struct.error, IndexError, UnicodeDecodeError):
            hidden = False
        rest, count = size - last.start, math.prod(last.shape)
        wider = any(0 <= rest - count // block * width < alignment for block, width in GGML_QUANT_SIZES.values())
        if hidden or wider:
            raise ModelError(f"{self.path} is {size} bytes long, but its header describes {last.start + last.nbytes}. Fetch it again")


def _tensor_info(cursor: "_Cursor", path: Path) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.string()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
    number = cursor.number("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise ModelError(f"{path}: tensor {name} has type {number}, which this gguf package does not know; a newer one may") from error
    return name, kind, shape, cursor.number("Q")


_COUNTS = ("attention.head_count", "attention.key_length", "embedding_length", "feed_forward_length", "block_count", "context_length")


class Metadata:
    """The keys of a file's architecture: `m("block_count")` is `llama.block_count`; ModelError for a missing required key."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture: str = file.metadata.get("general.architecture", "")

    def __call__(self, key: str) -> Any:
        """The value, which must be the same for all layers."""
        value = self.get(key)
        if value is None:
            raise ModelError(f"{self.file.path}: the metadata lacks {self.architecture}.{key}")
        if isinstance(value, list):
            value = [number for number in value if number] if key == "attention.head_count_kv" else value  # 0: a layer without attention
            if len(set(value)) != 1:
                raise ModelError(f"{self.file.path}: {self.architecture}.{key} differs from layer to layer; that is not supported")
            value = value[0]
        if key in _COUNTS and not (isinstance(value, int) and value > 0):
            raise ModelError(f"{self.file.path}: {self.architecture}.{key} is {value!r}; it has to be a whole number above 0")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value as stored, or `default`."""
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def has(self, *names: str) -> bool:
        """Whether the file holds one of these tensors."""
        return any(name in self.file.tensors for name in names)


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise IndexError(f"{count} bytes wanted at {self.place} of {len(self.data)}")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise KeyError(f"value type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        return [self.value(inner) for _ in range(count)]

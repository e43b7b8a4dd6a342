"""safetensors files, single and sharded, read and written one tensor at a time.

The `safetensors` package maps a file into memory or writes a whole dict at once, which makes a conversion use as much memory as the model.
The format is eight bytes of length, a JSON header and the tensors' bytes, so a reader that holds one tensor is short.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxtune.convert.sources import PICKLES, refuse_pickle
from jaxtune.errors import ModelError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the safetensors package's own limit


class Entry(NamedTuple):
    """A tensor's file, dtype, shape and first byte.

    packed  for a tensor that the file stores as several others (convert/packed.py): it is read as float32, and `dtype` is what to store it
            in
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    packed: Any = None

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """The loader's interface to a checkpoint: which tensors it has, under Hugging Face's names, and reading one of them."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Any:
        """The tensor as a numpy array, or as a quantised `Weight`."""
        ...


class Safetensors:
    """The tensors of a model folder (or of one file): `entries[name]`, `read(name)`."""

    def __init__(self, path: str | os.PathLike, stem: str = "model"):
        path = Path(path)
        self.entries = _read_header(path) if path.is_file() else _read_folder(path, stem)

    def read(self, name: str) -> np.ndarray:
        """One tensor, read into its own memory."""
        return read_entry(name, self.entries[name])

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """`read(name)[index]` without reading the rest; a quantised tensor is read whole, except for other experts."""
        return read_part(name, self.entries[name], index)


def read_entry(name: str, entry: Entry) -> np.ndarray:
    """A whole tensor, read into its own memory."""
    if entry.packed:
        return read_part(name, entry, ())
    data = np.fromfile(entry.file, np.uint8, entry.nbytes, offset=entry.start)
    if data.size != entry.nbytes:
        raise ModelError(f"{entry.file}: the file ends inside tensor {name}; it was cut or is still being written. Fetch it again")
    return data.view(entry.dtype).reshape(entry.shape)


def read_part(name: str, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor."""
    if entry.packed:
        return entry.packed.read((*index, *(slice(None),) * (len(entry.shape) - len(index))))
    data = np.memmap(entry.file, np.uint8, "r", entry.start, (entry.nbytes,)) if entry.nbytes else np.zeros(0, np.uint8)
    return np.array(data.view(entry.dtype).reshape(entry.shape)[index])


def main_dtype(entries: Iterable[Any]) -> str:
    """float32, bfloat16 or float16: the dtype of most bytes of these tensors."""
    sizes = {"float32": 0, "bfloat16": 0, "float16": 0}
    for entry in entries:
        if str(entry.dtype) in sizes:
            sizes[str(entry.dtype)] += entry.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _read_folder(folder: Path, stem: str) -> dict[str, Entry]:
    """The tensors of a folder's `model.safetensors`, or of the files that `model.safetensors.index.json` lists; the index decides if two
    files have the same tensor."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        pickles = sorted(file for file in folder.glob("*") if file.suffix in PICKLES and not file.name.startswith("training_args"))
        if pickles:
            raise refuse_pickle(pickles[0])
        raise ModelError(f"{folder} holds no {single.name} and no {index.name}; fetch the folder again, its weights too")
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) and "/" not in file and file not in (".", "..") for file in files):
        raise ModelError(f"{index}: weight_map is not a map from tensor names to files of this folder")
    if pickles := sorted(file for file in files if file.endswith(PICKLES)):
        raise refuse_pickle(folder / pickles[0])
    headers: dict[str, dict[str, Entry]] = {}
    for name, file in weight_map.items():
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file} is missing; {index.name} says that it holds {name}. Fetch it again")
        if file not in headers:
            headers[file] = _read_header(folder / file)
        if name not in headers[file]:
            raise ModelError(f"{folder / file} does not hold {name}, though {index.name} says so. Fetch the folder again")
    found = {name: entry for file in sorted(headers) for name, entry in headers[file].items()}
    return found | {name: headers[file][name] for name, file in weight_map.items()}


def _read_header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8 or length > _HEADER_LIMIT:
            raise ModelError(f"{file} is not a safetensors file, or is cut inside its header ({size} bytes). Fetch it again")
        text = stream.read(length)
    try:
        header = dict(json.loads(text))
        header.pop("__metadata__", None)
        entries = {name: _entry(file, 8 + length, size, name, info) for name, info in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{file} has a corrupt header ({error}). Fetch it again") from error
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            raise ModelError(f"{file}: tensor {name} begins at byte {entry.start}, but the one before it ends at {end}. Fetch it again")
        end += entry.nbytes
    if end != size:
        raise ModelError(f"{file} is {size} bytes long, but its header describes {end}. Fetch it again")
    return entries


def _entry(file: Path, base: int, size: int, name: str, info: dict) -> Entry:
    begin, end = info["data_offsets"]
    shape = tuple(info["shape"])
    if not all(type(number) is int for number in (begin, end, *shape)):
        raise TypeError(f"tensor {name} has a shape or place that is no whole number")
    if info["dtype"] not in DTYPES:
        raise ModelError(f"{file}: tensor {name} has dtype {info['dtype']}, which is not supported; there are {', '.join(DTYPES)}")
    dtype = DTYPES[info["dtype"]]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        said = f"{info['dtype']} {list(shape)}"
        raise ModelError(f"{file}: tensor {name} says {said} but takes {end - begin} bytes; the file is corrupt. Fetch it again")
    if base + end > size:
        raise ModelError(f"{file}: tensor {name} ends at byte {base + end}, but the file has {size}; it was cut. Fetch it again")
    return Entry(file, dtype, shape, base + begin)


def read_json(file: Path) -> dict:
    """A JSON object from a file; ModelError if it is missing, malformed or not an object."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; fetch or save its folder again") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}; fetch or save it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}, not a JSON object")
    return value


# ---- writing ----


class Plan(NamedTuple):
    """A tensor to be written: its dtype and shape are known before its values."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", str(text), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise ModelError(f"{text!r} is not a size; write 5GB, 500MB or a number of bytes")
    return int(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def in_shards(plans: Iterable[Plan], max_shard_size: str | int = "5GB") -> list[list[Plan]]:
    """The tensors of each file, in writing order: wide types first, so that each starts at a multiple of its size."""
    shards, room = [], 0
    limit = parse_size(max_shard_size)
    for plan in sorted(plans, key=lambda plan: natural(plan.name)):
        if not shards or (plan.nbytes > room):
            shards.append([])
            room = limit
        shards[-1].append(plan)
        room -= plan.nbytes
    return [sorted(shard, key=lambda plan: -plan.dtype.itemsize) for shard in shards]


def write_tensors(folder: Path, plans: Iterable[Plan], make: Callable[[str], np.ndarray], max_shard_size: str | int = "5GB") -> None:
    """`model.safetensors`, or shards of at most `max_shard_size` with their index; `make(name)` is called once per tensor, in order."""
    shards = in_shards(plans, max_shard_size)
    if len(shards) <= 1:
        write_file(folder / "model.safetensors", [plan for shard in shards for plan in shard], make)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, make)
        weight_map |= {plan.name: file for plan in shard}
    total = sum(plan.nbytes for shard in shards for plan in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_file(file: Path, plans: Iterable[Plan], make: Callable[[str], np.ndarray]) -> None:
    """One safetensors file, tensor by tensor."""
    # Wide types first: each tensor then starts at a multiple of its own size.
    plans = sorted(plans, key=lambda plan: -plan.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        header[plan.name] = {"dtype": _NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [offset, offset + plan.nbytes]}
        offset += plan.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for plan in plans:
            _write_tensor(stream, plan, make)


def _write_tensor(stream: BinaryIO, plan: Plan, make: Callable[[str], np.ndarray]) -> None:
    # A separate function, so that a tensor is freed before the next is made.
    array = np.asarray(make(plan.name), order="C")
    assert array.dtype == plan.dtype and array.shape == plan.shape, (plan, array.dtype, array.shape)
    check_finite(plan.name, array)
    stream.write(array.reshape(-1).view(np.uint8).data)


def check_finite(name: str, array: np.ndarray) -> None:
    """ModelError, naming the tensor, if it contains a NaN or an infinity, which would make the saved model useless."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or (sound := np.isfinite(array)).all():
        return
    what = "the weights went wrong in training (look at the run's loss, take an earlier checkpoint), or in the files they came from"
    if array.dtype == np.float16:
        what += "; or they are beyond float16, which ends at 65504: bfloat16 does not"
    raise ModelError(
        f"tensor {name} holds NaN or infinity at {int((~sound).sum()):,} of its {array.size:,} places, so it is not written: {what}"
    )


def write_json(file: Path, value: dict) -> None:
    """Indented JSON, as written by transformers."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def natural(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]

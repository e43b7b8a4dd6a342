"""Tokenised rows on disk, read through the page cache: a corpus may be larger than memory."""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.disk import naming, sha256
from jaxtune.errors import DataError
from jaxtune.locks import scratch_folder

SUMS = "sums.json"
FLAT = {"tokens": np.int32, "mask": np.uint8}
INDEX = dict.fromkeys(("starts", "lengths", "trained", "rows"), np.int64) | dict.fromkeys(("content", "groups", "strata"), np.uint64)
INDEX |= {"values": np.float64, "digests": np.uint64}


@dataclass(frozen=True)
class Documents:
    """Token ids and trained masks of many documents.

    Attributes:
        tokens: int32, the documents of each part end to end, one array per part.
        mask: uint8, 1 where the token is trained as a target, with the layout of `tokens`.
        part: int64 [n], the part (the data source) of each document.
        starts: int64 [n], where it begins in its part.
        lengths: int64 [n], its tokens.
        trained: int64 [n], its trained tokens.
        rows: int64 [n], the number of its row in its source, from 1.
        content: uint64 [n], hash of the row.
        groups: uint64 [n], hash of what a split keeps together: the row, or its field `data.split_by`.
        strata: uint64 [n], hash of the row's field `data.stratify`.
        values: float64 [n], or [n, L], the row's data besides its text: the margin of a pair, a class, a number, or L of them; otherwise 0.
        digests: uint64 [n], hash of the document's tokens and mask.
        info: for each part, its producer's ledger.
    """

    tokens: list[np.ndarray]
    mask: list[np.ndarray]
    part: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    rows: np.ndarray
    content: np.ndarray
    groups: np.ndarray
    strata: np.ndarray
    values: np.ndarray
    digests: np.ndarray
    info: list[dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, doc: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of one document."""
        part, start = self.part[doc], self.starts[doc]
        where = slice(start, start + self.lengths[doc])
        return self.tokens[part][where], self.mask[part][where]

    def select(self, docs: np.ndarray) -> "Documents":
        """Some of the documents, in the given order; tokens are not copied."""
        if len(docs) == len(self) and (docs == np.arange(len(self))).all():
            return self  # the index stays on disk
        return replace(self, **{name: getattr(self, name)[docs] for name in ("part", *INDEX)})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the documents: their number, lengths, values, tokens and masks, in order. Reads the index, not the tokens."""
        digest = hashlib.sha256()
        for name in ("lengths", "values", "digests"):
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Documents":
        """Open what `write` wrote, memory-mapped. DataError if one of its files is missing, truncated or changed."""
        try:
            found = {name: sha256(folder / name) for name in _names()}
            whole = json.loads((folder / SUMS).read_text()) == found
        except (FileNotFoundError, ValueError):
            whole = False
        if not whole:
            raise DataError(f"{folder} is damaged")
        flat: dict[str, Any] = {name: [_mapped(folder / f"{name}.bin", dtype)] for name, dtype in FLAT.items()}
        index: dict[str, Any] = {name: _mapped(folder / f"{name}.bin", dtype) for name, dtype in INDEX.items()}
        if len(index["values"]) > len(index["rows"]):
            index["values"] = index["values"].reshape(len(index["rows"]), -1)
        info = json.loads((folder / "info.json").read_text())
        return cls(**flat, part=np.zeros(len(index["rows"]), np.int64), **index, info=[info])

    @classmethod
    def join(cls, parts: list["Documents"]) -> "Documents":
        """The documents of several sources, one after another, with consecutive part numbers."""
        if len(parts) == 1:
            return parts[0]
        lists: dict[str, Any] = {name: [item for p in parts for item in getattr(p, name)] for name in ("tokens", "mask", "info")}
        offsets = np.cumsum([0] + [len(p.tokens) for p in parts])
        part = np.concatenate([p.part + offset for p, offset in zip(parts, offsets, strict=False)])
        index: dict[str, Any] = {name: np.concatenate([getattr(p, name) for p in parts]) for name in INDEX}
        return cls(part=part, **lists, **index)


def _names() -> list[str]:
    return [*(f"{name}.bin" for name in (*FLAT, *INDEX)), "info.json"]


def _mapped(file: Path, dtype: type) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)  # an empty file cannot be mapped


@dataclass(frozen=True)
class Entry:
    """One document to be stored; the last five fields as in `Documents`."""

    ids: list[int]
    mask: np.ndarray
    row: int
    content: int
    group: int
    stratum: int
    value: float | tuple[float, ...] = 0.0


def write(cache: Path, key: Callable[[], str], entries: Iterable[Entry], info: Callable[[], dict]) -> Documents:
    """Store documents, as they arrive, in a folder of `cache`, atomically.

    `key` (the folder's name) and `info` are called after the last document.
    """
    with naming(cache), scratch_folder(cache, "making") as scratch:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(scratch / f"{name}.bin", "wb")) for name in (*FLAT, *INDEX)}
            start = 0
            for entry in entries:
                tokens, mask = np.asarray(entry.ids, np.int32).tobytes(), np.asarray(entry.mask, np.uint8).tobytes()
                files["tokens"].write(tokens)
                files["mask"].write(mask)
                trained = len(mask) - mask.count(0)
                digest = int.from_bytes(hashlib.blake2b(tokens + mask, digest_size=8).digest(), "little")
                values = (start, len(mask), trained, entry.row, entry.content, entry.group, entry.stratum, entry.value, digest)
                for (name, dtype), value in zip(INDEX.items(), values, strict=True):
                    files[name].write(b"".join(map(_PACK[dtype], value)) if isinstance(value, tuple) else _PACK[dtype](value))
                start += len(mask)
        (scratch / "info.json").write_text(json.dumps(info()))
        (scratch / SUMS).write_text(json.dumps({name: sha256(scratch / name) for name in _names()}))
        folder = cache / key()
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just written the same content under the same key
                raise
    return Documents.load(folder)


_PACK = {np.int64: struct.Struct("=q").pack, np.uint64: struct.Struct("=Q").pack, np.float64: struct.Struct("=d").pack}

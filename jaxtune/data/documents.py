"""Tokenised rows on disk, read through the page cache: a corpus may be larger than memory."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

FLAT = {"tokens": np.int32, "mask": np.uint8}
INDEX = ("starts", "lengths", "trained", "rows", "keys")


@dataclass(frozen=True)
class Documents:
    """Token ids and trained masks of many documents.

    Attributes:
        tokens: int32, the documents of each part end to end, one array for each part.
        mask: uint8, 1 where the token is trained as a target, laid out as `tokens`.
        part: int64 [n], the part (the data source) of each document.
        starts: int64 [n], where it begins in its part.
        lengths: int64 [n], its tokens.
        trained: int64 [n], its trained tokens.
        rows: int64 [n], line or row number in its file.
        keys: uint64 [n], hash of the row's content, for splits that stay when rows are added.
        info: for each part, what its maker had to say (the ledger).
    """

    tokens: list[np.ndarray]
    mask: list[np.ndarray]
    part: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    info: list[dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, doc: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of one document."""
        part, start = self.part[doc], self.starts[doc]
        where = slice(start, start + self.lengths[doc])
        return self.tokens[part][where], self.mask[part][where]

    def select(self, docs: np.ndarray) -> "Documents":
        """Some of the documents, in the order given; tokens are not copied."""
        return replace(self, **{name: getattr(self, name)[docs] for name in ("part", *INDEX)})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the documents: their number, lengths, tokens and masks, in order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).data)
        for doc in range(len(self)):
            for array in self[doc]:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> "Documents":
        """Open what `write` wrote, tokens memory-mapped."""
        flat = {name: [np.memmap(folder / f"{name}.bin", dtype, "r")] for name, dtype in FLAT.items()}
        index = dict(zip(INDEX, np.load(folder / "index.npy"), strict=True))
        index["keys"] = index["keys"].view(np.uint64)
        info = json.loads((folder / "info.json").read_text())
        return cls(**flat, part=np.zeros(len(index["rows"]), np.int64), **index, info=[info])

    @classmethod
    def join(cls, parts: list["Documents"]) -> "Documents":
        """The documents of several sources, one after another."""
        lists = {name: [array for p in parts for array in getattr(p, name)] for name in ("tokens", "mask", "info")}
        offsets = np.cumsum([0] + [len(p.tokens) for p in parts])
        part = np.concatenate([p.part + offset for p, offset in zip(parts, offsets, strict=False)])
        return cls(**lists, part=part, **{name: np.concatenate([getattr(p, name) for p in parts]) for name in INDEX})


def write(folder: Path, documents: Iterable[tuple[int, int, list[int], np.ndarray]], info: Callable[[], dict]) -> Documents:
    """Store `(row number, key, token ids, mask)` in `folder`, all or nothing, in little memory.

    `info` is called when the last document has been made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        columns: dict[str, list[int]] = {name: [] for name in INDEX}
        start = 0
        with open(temporary / "tokens.bin", "wb") as tokens_file, open(temporary / "mask.bin", "wb") as mask_file:
            for row, key, tokens, mask in documents:
                tokens_file.write(np.asarray(tokens, np.int32).tobytes())
                mask_file.write(np.asarray(mask, np.uint8).tobytes())
                values = (start, len(tokens), int(np.count_nonzero(mask)), row, key)
                for name, value in zip(INDEX, values, strict=True):
                    columns[name].append(value)
                start += len(tokens)
        index = [np.asarray(columns[name], np.uint64 if name == "keys" else np.int64).view(np.int64) for name in INDEX]
        np.save(temporary / "index.npy", np.stack(index))
        (temporary / "info.json").write_text(json.dumps(info()))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process has just written the same content under the same key
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Documents.load(folder)

"""Detect what a file or folder really is, if its name is misleading."""

import re
from pathlib import Path

from jaxtune.disk import LFS
from jaxtune.errors import DataError

# The first bytes of files -> their usual suffixes, and what they are
SIGNS: dict[bytes, tuple[tuple[str, ...], str]] = {
    LFS: ((), "a Git LFS pointer instead of the file; fetch that with `git lfs pull`"),
    b"\x1f\x8b": ((".gz",), "compressed by gzip; let its name end in .gz"),
    b"\x28\xb5\x2f\xfd": ((".zst",), "compressed by zstd; let its name end in .zst"),
    b"PK\x03\x04": ((), "a zip archive; unpack it"),
    b"PAR1": ((".parquet",), "a Parquet file; let its name end in .parquet"),
    b"ARROW1": ((".arrow",), "an Arrow file; let its name end in .arrow"),
    b"\xff\xfe": ((), "UTF-16; save it as UTF-8"),
    b"\xfe\xff": ((), "UTF-16; save it as UTF-8"),
}
# Split names in file names and folder names (as in the datasets library)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")


def begins(path: Path) -> bytes:
    """The file's first bytes."""
    with open(path, "rb") as stream:
        return stream.read(max(map(len, SIGNS)))


def check_sign(path: Path) -> None:
    """DataError for a file that is of another type than its name says."""
    head = begins(path)
    for sign, (endings, what) in SIGNS.items():
        if head.startswith(sign) and not path.name.lower().endswith(endings):
            raise DataError(f"{path}: the file is {what}")


def of_split(path: str, files: list[Path], split: str | None, inside: Path | None = None) -> list[Path]:
    """The files that belong to one split, by their names (and by the folders `inside` one), so that nobody trains on a test set by mistake.

    As in the datasets library, files without a split in their names, and all that are named one by one, belong to the split `train`. Raises
    DataError for a split that does not exist, or if a folder has several and none is named.
    """
    named = [_split(file.relative_to(inside) if inside else Path(file.name)) for file in files]
    found = sorted(set(filter(None, named)))
    if split is None and (len(found) < 2 or inside is None):
        return files
    if split is None:
        example = files[named.index(found[0])]
        raise DataError(
            f"{path}: the folder holds files of the splits {', '.join(found)} ({example.name}, ...); say which: "
            f"{{path: {path}, split: {'train' if 'train' in found else found[0]}}}, or name the files"
        )
    wanted = SPLITS.get(split, split)
    if chosen := [file for file, name in zip(files, named, strict=True) if name == wanted]:
        return chosen
    if wanted == "train" and (not found or inside is None):
        return files
    there = f"there are files of {', '.join(found)}" if found else "no file's name contains a split, so all rows belong to train"
    raise DataError(f"{path}: no file is of the split {split}; {there}. Name one of those, or the files, or take a share: data.eval: 0.1")


def _split(file: Path) -> str | None:
    """The split that a path names; the file's own name comes first."""
    for part in reversed(file.parts):
        for word in re.split(r"[\W_\d]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None

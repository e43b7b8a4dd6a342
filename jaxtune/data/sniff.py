"""What a file or folder is in truth, where its name says something else."""

import re
from pathlib import Path

from jaxtune.disk import LFS
from jaxtune.errors import DataError

# How files begin -> the endings of their names, what they are
SIGNS: dict[bytes, tuple[tuple[str, ...], str]] = {
    LFS: ((), "a pointer of Git LFS and not the file; fetch that with `git lfs pull`"),
    b"\x1f\x8b": ((".gz",), "compressed by gzip; let its name end in .gz"),
    b"\x28\xb5\x2f\xfd": ((".zst",), "compressed by zstd; let its name end in .zst"),
    b"PK\x03\x04": ((), "a zip archive; unpack it"),
    b"PAR1": ((".parquet",), "a Parquet file; let its name end in .parquet"),
    b"ARROW1": ((".arrow",), "an Arrow file; let its name end in .arrow"),
    b"\xff\xfe": ((), "UTF-16; save it as UTF-8"),
    b"\xfe\xff": ((), "UTF-16; save it as UTF-8"),
}
# What folders call their splits, as a word of a file's name or of the folder it is in (the data sets library goes by them too)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")


def begins(path: Path) -> bytes:
    """The file's first bytes."""
    with open(path, "rb") as stream:
        return stream.read(max(map(len, SIGNS)))


def check_sign(path: Path) -> None:
    """DataError for a file that is of another kind than its name says."""
    head = begins(path)
    for sign, (endings, what) in SIGNS.items():
        if head.startswith(sign) and not path.name.lower().endswith(endings):
            raise DataError(f"{path}: the file is {what}")


def of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a folder that are of one split, where their names tell several apart: nobody trains on a test set by mistake.

    Raises DataError for a split that is not there, or if there are several and none is named.
    """
    named = [_split(file.relative_to(folder)) for file in files]
    found = sorted(set(filter(None, named)))
    if len(found) < 2 and split is None:
        return files
    if split is None:
        example = files[named.index(found[0])]
        raise DataError(
            f"{folder}: the folder holds files of the splits {', '.join(found)} ({example.name}, ...); say which: "
            f"{{path: {folder}, split: {'train' if 'train' in found else found[0]}}}, or name the files"
        )
    chosen = [file for file, name in zip(files, named, strict=True) if name == SPLITS.get(split, split)]
    if found and not chosen:
        raise DataError(f"{folder}: the folder holds no files of split {split}, only of {', '.join(found)}")
    return chosen or files


def _split(file: Path) -> str | None:
    """The split that a path names, the file's own name first."""
    for part in reversed(file.parts):
        for word in re.split(r"[\W_\d]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None

"""A result folder appears whole or not at all, and never in place of another."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxtune.errors import ModelError


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` when the block ends; removed when it fails.

    Raises ModelError when `out` exists and is not an empty folder.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty; nothing is overwritten. Give another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process that had this number
    scratch.mkdir()
    try:
        yield scratch
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

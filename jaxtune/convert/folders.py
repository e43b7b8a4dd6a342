"""Result folders appear atomically, and never replace an existing one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxtune.disk import make_folder, naming
from jaxtune.errors import ModelError
from jaxtune.locks import scratch_folder


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` when the block ends, removed if it fails.

    Raises ModelError if `out` exists and is not an empty folder.
    """
    out = check_new(out)
    make_folder(out.parent, error=ModelError)
    with naming(out), scratch_folder(out.parent, out.name) as scratch:
        yield scratch
        try:
            os.replace(scratch, out)
        except OSError:
            if not out.exists():
                raise
            raise ModelError(_refusal(out)) from None  # another process was faster


@contextlib.contextmanager
def new_file(out: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `out` to write into; its only file with `out`'s suffix is renamed to `out` when the block ends, everything else is
    removed.

    Raises ModelError if `out` exists.
    """
    out = check_new(out)
    if out.exists():
        raise ModelError(f"{out} is an empty folder, and a file is to be written; remove it, or give another name")
    make_folder(out.parent, error=ModelError)
    with naming(out), scratch_folder(out.parent, out.name) as scratch:
        yield scratch
        (file,) = scratch.glob(f"*{out.suffix}")
        os.replace(file, check_new(out))


def check_new(out: str | os.PathLike) -> Path:
    """`out` as an absolute path; raises the ModelError of `new_folder` without creating anything."""
    if not os.fspath(out):
        raise ModelError("the folder to write to has no name; give one")
    out = Path(out).expanduser().absolute()
    if os.path.lexists(out) and not out.exists():
        raise ModelError(f"{out} is a dangling link; give another folder, or remove the link")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(_refusal(out))
    return out


def _refusal(out: Path) -> str:
    what = "exists and is not empty" if out.is_dir() else "is a file"
    return f"{out} {what}; nothing is overwritten. Give another folder, or remove it"

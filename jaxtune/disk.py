"""Files and folders: creating them, writing them atomically, hashing them."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from jaxtune.errors import JaxtuneError


def sha256(path: str | os.PathLike) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LFS = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Whether a file is only a Git LFS pointer, as in a clone without git-lfs."""
    with open(path, "rb") as file:
        return file.read(len(LFS)) == LFS


def make_folder(folder: Path, what: str = "folder", error: type[JaxtuneError] = JaxtuneError) -> None:
    """Create the folder and its parents if needed; raise `error` where that is impossible (in /proc, under a dangling link)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, ValueError) as raised:  # ValueError: a name with a null byte
        raise error(f"{what} {str(folder)!r} cannot be created ({raised}); name another folder") from raised


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxtune` or `~/.cache/jaxtune`; JaxtuneError for a user without a home (in a container, for example)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtune"
    except RuntimeError as error:
        raise JaxtuneError("this user has no home folder to keep caches in; set HOME or XDG_CACHE_HOME to a folder") from error


_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile hides the system's reason


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in the error for a full disk: the system names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        if _SHORT.fullmatch(str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write into; it is renamed to `path` when the block ends, and removed if the block fails."""
    make_folder(path.parent)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")  # some writers depend on the suffix
    try:
        with naming(path):
            yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")

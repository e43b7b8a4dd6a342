"""Files and folders: made where they can be, there whole or not at all, known by their sha256."""

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
    """Whether a file is only what Git LFS left in the place of the file: a clone without git-lfs is full of them."""
    with open(path, "rb") as file:
        return file.read(len(LFS)) == LFS


def make_folder(folder: Path, what: str = "folder", error: type[JaxtuneError] = JaxtuneError) -> None:
    """The folder and those above it, where they are not there yet; `error` where none can be (in /proc, under a link to nowhere)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, ValueError) as raised:  # ValueError: a name with a null byte
        raise error(f"{what} {str(folder)!r} cannot be made ({raised}); name another folder") from raised


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxtune`, or `~/.cache/jaxtune`; JaxtuneError for a user without a home (of a container, say)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtune"
    except RuntimeError as error:
        raise JaxtuneError("this user has no home folder to keep caches in; set HOME or XDG_CACHE_HOME to a folder") from error


_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's tofile, which keeps the system's reason to itself


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk's error names what was being written: the system says it of no file, or of one with a passing name."""
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
    """A file beside `path` to write into; it takes that name when the block ends, and is removed if the block fails."""
    make_folder(path.parent)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")  # some writers go by the suffix
    try:
        with naming(path):
            yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")

"""Locks that a process cannot leave behind, and folders to write into: the system unlocks when a process ends, however it ends."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtune.disk import make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

YOUNG = 5.0  # seconds in which a folder may not be locked yet


def lock(path: Path) -> int:
    """Lock a file or folder that is there; it stays locked until what is returned, a file descriptor, is closed.

    Raises BlockingIOError where another process holds it, and another OSError where it cannot be locked.
    """
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what is open for writing
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "this system has no such locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `.NAME.*.partial` in `parent`, to be filled and renamed; removed if it is still there when the block ends.

    Those of killed processes are removed too: they are the ones that nobody holds locked.
    """
    for left in parent.glob(f".{glob.escape(name)}.*.partial"):
        with contextlib.suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > YOUNG:
                held = lock(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
    folder, held = parent / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.partial", None
    make_folder(folder)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            held = lock(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)

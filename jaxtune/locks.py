"""Locks and temporary folders that no process leaves behind: the system unlocks when a process ends, however it ends."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtune.disk import make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

YOUNG = 5.0  # seconds during which a new folder may not be locked yet


def lock(path: Path) -> int:
    """Lock an existing file or folder until the returned file descriptor is closed.

    Raises BlockingIOError if another process holds the lock, and another OSError if locking is impossible.
    """
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS only locks files opened for writing
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "this system has no such locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def _removed_at_sigterm(folder: Path) -> Iterator[None]:
    """Remove the folder at SIGTERM, then end the process as usual; does nothing if that signal already has a handler."""
    owner = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() == owner:  # a worker inherits the handler, but does not own the folder
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container ignores that signal

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `.NAME.*.partial` in `parent`, to be filled and renamed; removed if it still exists when the block ends or at SIGTERM.

    Folders of killed processes are removed too: they are the unlocked ones.
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
        with _removed_at_sigterm(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)

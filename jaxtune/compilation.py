"""What programs are compiled with, and the cache of compiled ones, which makes the second start quick.

jax writes an entry in place. One that is cut off (by a kill, by a full disk) is never written again: every start warns of it and compiles
anew. So what the last runs have written is looked through at the start, and what is not whole goes.
"""

import contextlib
import functools
import logging
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from jaxtune.config import Config
from jaxtune.disk import cache_folder

try:
    import zstandard
except ImportError:
    zstandard, DAMAGED = None, (zlib.error,)
else:
    DAMAGED = (zlib.error, zstandard.ZstdError)

F = TypeVar("F", bound=Callable)
log = logging.getLogger("jaxtune")
CHECKED = ".checked"  # its time: entries older than it are known to be whole
ZSTANDARD = b"\x28\xb5\x2f\xfd"


def in_32_bits(function: F) -> F:
    """The function without `jax_enable_x64`, which would widen every number that is given no dtype."""

    @functools.wraps(function)
    def narrow(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow  # type: ignore[return-value]


def enable_cache(config: Config) -> None:
    """Keep compiled programs on disk; a folder the user has set is left alone."""
    if not config.compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder() / "xla" if config.compilation_cache is True else Path(config.compilation_cache).expanduser()
    with contextlib.suppress(OSError):  # read-only: jax says so itself, and only where it matters
        remove_damaged(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def remove_damaged(folder: Path) -> None:
    """Remove entries that are not whole, of those written since this was last done."""
    if not folder.is_dir():
        return
    marker, now = folder / CHECKED, time.time_ns()
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    for entry in folder.glob("*-cache"):
        if entry.stat().st_mtime_ns >= since and not _is_whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)
            log.info("the compiled program %s was only half written, and is compiled again", entry.name.partition("-")[0])
    marker.touch()
    os.utime(marker, ns=(now, now))  # not later: another process may be writing


def _is_whole(entry: bytes) -> bool:
    """Whether all of a compressed entry is there."""
    try:
        if not entry.startswith(ZSTANDARD):
            zlib.decompress(entry)
        elif zstandard is not None:
            zstandard.ZstdDecompressor().decompress(entry)
    except DAMAGED:
        return False
    return True

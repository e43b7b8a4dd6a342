"""Compiler settings, and the cache of compiled programs, which makes a second start fast.

jax writes cache entries in place. A truncated entry (after a kill or on a full disk) is never rewritten: every start warns about it and
compiles again. So at the start, recently written entries are checked, and damaged ones are removed.
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
CHECKED = ".checked"  # its modification time: older entries have been checked
ZSTANDARD = b"\x28\xb5\x2f\xfd"


def in_32_bits(function: F) -> F:
    """The function without `jax_enable_x64`, which would widen every number that has no explicit dtype."""

    @functools.wraps(function)
    def narrow(*args, **kwargs):
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow  # type: ignore[return-value]


def enable_cache(config: Config) -> None:
    """Cache compiled programs on disk, unless the user has already set a cache folder."""
    if not config.compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder() / "xla" if config.compilation_cache is True else Path(config.compilation_cache).expanduser()
    with contextlib.suppress(OSError):  # read-only: jax reports it if it matters
        remove_damaged(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def remove_damaged(folder: Path) -> None:
    """Remove damaged entries among those written since the last check."""
    if not folder.is_dir():
        return
    marker, now = folder / CHECKED, time.time_ns()
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    for entry in folder.glob("*-cache"):
        if entry.stat().st_mtime_ns >= since and not _is_whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)
            log.info("the compiled program %s was written incompletely and is compiled again", entry.name.partition("-")[0])
    marker.touch()
    os.utime(marker, ns=(now, now))  # taken first: another process may be writing


def _is_whole(entry: bytes) -> bool:
    """Whether a compressed entry is complete."""
    try:
        if not entry.startswith(ZSTANDARD):
            zlib.decompress(entry)
        elif zstandard is not None:
            zstandard.ZstdDecompressor().decompress(entry)
    except DAMAGED:
        return False
    return True

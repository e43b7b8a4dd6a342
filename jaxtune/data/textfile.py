"""Read a plain or compressed text file line by line, and explain what may be wrong with it."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from jaxtune.errors import DataError


def open_text(path: Path) -> IO[str]:
    """The file as UTF-8 text, decompressed, without a byte order mark."""
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="")


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_Zstd(open(path, "rb"))) if path.suffix == ".zst" else open(path, "rb")


def _other_letters(path: Path) -> str:
    """The first line that is not UTF-8, and the offending byte."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: not UTF-8 (byte 0x{line[error.start]:02x} behind {line[: error.start].decode()[-20:]!r})"
    return "not UTF-8"


class _Zstd(io.RawIOBase):
    """The text of a .zst file, frame by frame; EOFError if it is truncated, which zstandard's own reader ignores."""

    def __init__(self, file: IO[bytes]):
        self.file, self.held, self.frame = file, b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.held:
            rest = self.frame.unused_data if self.frame and self.frame.eof else b""
            block = rest or self.file.read(1 << 17)
            if not block:
                if self.frame and not self.frame.eof:
                    raise EOFError("it ends in the middle")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.held = self.frame.decompress(block)
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline) for each line."""
    number = 0
    with readable(path, lambda: f", after line {number}" if number else ""), open_text(path) as stream:
        # JSON strings may contain a raw U+2028 and the like, so lines end at \n only, unlike in str.splitlines.
        for number, line in enumerate(stream, 1):
            yield number, line


@contextlib.contextmanager
def readable(path: Path, last: Callable[[], str]) -> Iterator[None]:
    """Turn errors of reading a text file into DataError; `last` names, after the file's name, the last good row or line."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(f"{path}, {_other_letters(path)}; save the file as UTF-8") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise DataError(f"{path}{last()}: the compressed file is damaged ({error}); fetch it again") from None

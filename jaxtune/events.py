"""Scalars as TensorBoard reads them: a file of `Event` messages, each framed as a TFRecord.

Sixty lines instead of tensorboardX, which imports torch wherever that is installed: 2.5 seconds before the first step. The formats:
tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, tensorflow/core/lib/io/record_writer.h.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_FLUSH = 10.0  # seconds


class Events:
    """A writer into `folder`. TensorBoard forgets what earlier writers of the folder said of steps from `start` on, unless that is None."""

    def __init__(self, folder: Path, start: int | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file, self._flushed = (folder / name).open("ab"), 0.0
        self._write(0, _bytes(3, b"brain.Event:2"))
        if start is not None:
            self._write(start, _bytes(7, _varint(1 << 3) + _varint(1)))  # SessionLog: START

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag."""
        with np.errstate(over="ignore"):  # inf
            numbers = {tag: np.float64(value).astype("<f4").tobytes() for tag, value in values.items()}
        self._write(step, _bytes(5, b"".join(_bytes(1, _bytes(1, tag.encode()) + _varint(2 << 3 | 5) + x) for tag, x in numbers.items())))

    def close(self) -> None:
        """Write what is left."""
        self._file.close()

    def _write(self, step: int, what: bytes) -> None:
        now = time.time()
        event = _varint(1 << 3 | 1) + struct.pack("<d", now) + _varint(2 << 3) + _varint(step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        if now - self._flushed > _FLUSH:
            self._file.flush()
            self._flushed = now


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _bytes(field: int, value: bytes) -> bytes:
    """A field of a message: a string, or a message inside it."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [n >> 1 ^ 0x82F63B78 * (n & 1) for n in table]
    return table


_CRC32C = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecords have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

"""Read the instructions of a compiled program from its serialised form, for programs that XLA cannot print.

`Compiled.as_text()` reconstructs the program and fails on what it does not know (jax 0.10.2: the asynchronous collectives of a v5p). The
serialised executable contains the same program as an `HloModuleProto`; its few relevant fields are decoded here from the bytes
(protobuf.dev/programming-guides/encoding, xla/service/hlo.proto, xla/xla_data.proto), which are one record of a Riegeli file
(github.com/google/riegeli, doc/riegeli_records_file_format.md), with a header every 64 KiB:

    HloModuleProto       3 computations, 6 entry_computation_id
    HloComputationProto  2 instructions, 5 id
    HloInstructionProto  2 opcode, 3 shape, 38 called_computation_ids
    ShapeProto           2 element_type, 3 dimensions, 4 tuple_shapes
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 16: 2}  # bytes by PrimitiveType: pred, s8, ... bf16
SIGNATURE, BLOCK, HEADER = bytes.fromhex("83af70d10d884a3f"), 1 << 16, 24  # of a Riegeli file, its blocks and their headers


class Instruction(NamedTuple):
    """An opcode, the bytes of each array of the result, and whether it runs in a loop."""

    opcode: str
    sizes: list[int]
    in_loop: bool


def instructions(executable: bytes, module: str) -> Iterator[Instruction]:
    """All instructions of the compiled module of that name (`jit_step`). ValueError if there is none."""
    executable = _without_block_headers(executable)
    start = executable.find(b"\x0a" + bytes([len(module)]) + module.encode() + b"\x12")
    if start < 0:
        raise ValueError(f"no module {module} in this executable")
    computations, entry = {}, None
    for number, value in _fields(executable, start):
        if number == 3:
            own = list(_fields(value))
            computations[next(part for key, part in own if key == 5)] = [dict(_fields(part)) for key, part in own if key == 2]
        elif number == 6:
            entry = value
            break
    once, new = set(), {entry}
    while new:  # what the entry calls, including fusions and asynchronous operations but not the bodies of loops
        once |= new
        calls = (one for number in new for one in computations[number] if one[2] != b"while")
        new = {called for one in calls for called in _packed(one.get(38, b""))} - once
    for number, found in computations.items():
        for one in found:
            yield Instruction(one[2].decode(), list(_sizes(one[3])), number not in once)


def _without_block_headers(data: bytes) -> bytes:
    if (start := data.find(SIGNATURE)) < 0:
        raise ValueError("this executable is not serialised as a Riegeli file")
    return b"".join(data[at + HEADER : at + BLOCK] for at in range(start, len(data), BLOCK))


def _sizes(shape: bytes) -> Iterator[int]:
    """Bytes of each array of a shape, with tuples flattened."""
    kind, dimensions = 0, []
    for number, value in _fields(shape):
        if number == 2:
            kind = value
        elif number == 3:
            dimensions += _packed(value)
        elif number == 4:
            yield from _sizes(value)
    if kind in SIZES:
        yield SIZES[kind] * math.prod(dimensions)


def _packed(data: bytes | int) -> list[int]:
    """Numbers of a repeated field: packed, or a single one."""
    if isinstance(data, int):
        return [data]
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _fields(data: bytes, at: int = 0) -> Iterator[tuple[int, int | bytes]]:
    """`(number, value)` of each field of a message: int for a varint, bytes for anything else."""
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case other:
                raise ValueError(f"a field of wire type {other}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at

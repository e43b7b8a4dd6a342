"""The objects of a JSON file one by one; a list is never in memory as a whole."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxtune.errors import DataError

BLOCK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\r\n]*")
_LAST_COMMA = re.compile(r",\s*[\]}]")
_TAIL = 16  # an error this close to the end of the window may be a truncated value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys may not be repeated: json would silently keep only the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def reason(text: str, error: json.JSONDecodeError) -> str:
    """A common cause of the error, if recognised; otherwise json's message."""
    comma = _LAST_COMMA.search(text, max(error.pos - 99, 0), error.pos + 99)
    if comma and comma.start() <= error.pos < comma.end():
        return "a comma too many"
    return "single quotes instead of double ones" if text[error.pos : error.pos + 1] == "'" else error.msg.removesuffix(" at")


class _Reader:
    """Values of a stream, decoded from a moving window."""

    def __init__(self, stream: IO[str], path: Path):
        self.stream, self.path = stream, path
        self.window, self.at = "", 0
        self.line, self.column = 1, 0  # of the window's first character

    def more(self) -> bool:
        """Read as much again as the window holds, so that a long value is not scanned repeatedly."""
        gone, held = self.window[: self.at], self.window[self.at :]
        block = self.stream.read(max(BLOCK, len(held)))
        if not block:
            return False
        self.line += gone.count("\n")
        self.column = self.column + len(gone) if "\n" not in gone else len(gone) - gone.rfind("\n") - 1
        self.window, self.at = held + block, 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self.window, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.more():
                return ""

    def take(self, *wanted: str) -> str:
        """The next character, which must be one of `wanted`."""
        found = self.peek()
        if found not in wanted or not found:
            self.fail(f"Expecting {' or '.join(map(repr, wanted))}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self.window) - _TAIL and not error.msg.startswith("Unterminated string")
                if whole or not self.more():
                    self.fail(reason(self.window, error), error.pos)
                continue
            except (RecursionError, ValueError) as error:  # deeply nested lists, or a number with thousands of digits
                self.fail(str(error), self.at)
            if end > len(self.window) - 3 and self.more():  # a number may continue: 1 may be the beginning of 1e+9
                continue
            self.at = end
            return value

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",", "]") == "]":
                return

    def fail(self, message: str, at: int, hint: str = "") -> None:
        """Raise an error for a place in the window."""
        before = self.window[:at]
        line = self.line + before.count("\n")
        column = len(before) - before.rfind("\n") if "\n" in before else self.column + len(before) + 1
        raise DataError(f"{self.path}, line {line}: not valid JSON, {message} at column {column}{hint}")

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            self.fail("Extra data", self.at, "; if it holds one object a line, name it .jsonl")


def read(path: Path, opened: Callable[[Path], IO[str]]) -> Iterator[Any]:
    """The values of the list that the file holds, or of the only list in the object it holds.

    Raises:
        DataError: not JSON, with line and column, or no such list.
    """
    with opened(path) as stream:
        reader = _Reader(stream, path)
        first = reader.peek()
        if first == "[":
            yield from reader.items()
            reader.end()
            return
        if first and first != "{":
            value = reader.value()
            reader.end()
            kind = "string" if isinstance(value, str) else "number" if isinstance(value, int | float) else "constant"
            raise DataError(f"{path}: a JSON file must hold a list of objects, this is a {kind}")
        lists = [at_list for at_list in _members(reader) if at_list] if first else []
    if first and len(lists) != 1:
        raise DataError(f"{path}: a JSON file must hold a list of objects, or an object with one such list")
    if first:
        with opened(path) as stream:  # the list is known to be the only one, so it can be streamed
            for at_list in _members(reader := _Reader(stream, path), read_lists=False):
                if at_list:
                    yield from reader.items()


def _members(reader: _Reader, read_lists: bool = True) -> Iterator[bool]:
    """Walk through the object that begins here; for each member whether it is a list, which the caller reads unless `read_lists`."""
    reader.take("{")
    while True:
        if reader.peek() != '"':
            reader.take('"', "}")
            break
        reader.value()
        reader.take(":")
        is_list = reader.peek() == "["
        if not is_list:
            reader.value()
        elif read_lists:
            for _ in reader.items():
                pass
        yield is_list
        if reader.take(",", "}") == "}":
            break
    reader.end()

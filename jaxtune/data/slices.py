"""A source's `split` for local files, in the syntax of the datasets library: `test`, `train[:10%]`, `train[-500:]+validation`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtune.errors import DataError

if TYPE_CHECKING:
    from jaxtune.data.files import Row

EXAMPLE = "write it like train[:10%] or train[100:200]"


def names(split: str | None) -> list[str | None]:
    """The splits that are used, in order; `[None]` if none is named."""
    return [None] if split is None else [part.partition("[")[0].strip() for part in split.split("+")]


def is_whole(split: str) -> bool:
    """All rows of one split."""
    return not {"[", "+"} & set(split)


def rows(split: str, of: Callable[[str], Iterator["Row"]], alone: bool) -> Iterator["Row"]:
    """The rows of each part, numbered anew; `of(name)` reads all rows of a split, `alone`: all are in one file. A part is read once to
    count it and once for its rows.

    Raises DataError for what the datasets library does not accept either, and for a part without rows.
    """
    from datasets import ReadInstruction

    index = 0
    for part in split.split("+"):
        (name,) = names(part)
        try:
            (taken,) = ReadInstruction.from_spec(part.strip()).to_absolute({name: sum(1 for _ in of(str(name)))})
        except (ValueError, AssertionError) as error:
            said = str(error).splitlines()[0].rstrip(".")
            raise DataError(f"split {part!r} is not a part of a data set ({said}); {EXAMPLE}") from None
        if taken.from_ >= taken.to:
            raise DataError(f"split {part!r} leaves no rows; {EXAMPLE}")
        for place, row in enumerate(of(str(name))):
            if place >= taken.to:
                break
            if place >= taken.from_:
                index += 1
                yield replace(row, index=index, alone=alone)

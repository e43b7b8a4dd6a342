"""Read rows from files: JSONL, JSON, CSV, Parquet, Arrow, hub data sets."""

import contextlib
import csv
import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtune.data import jsonfile, slices, sniff
from jaxtune.data.textfile import lines_of, open_text, readable
from jaxtune.errors import DataError

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "txt",
}  # fmt: skip
UNIT = {"jsonl": "line", "csv": "line", "tsv": "line", "txt": "line"}


@dataclass(frozen=True)
class Row:
    """One row and its place.

    Attributes:
        file: its file, or data set.
        number: counted from 1 in that file, in lines if the file has lines.
        unit: "line" or "row", what `number` counts.
        fields: the row itself.
        index: counted from 1 in its source, which may be several files.
        alone: the source is a single file.
    """

    file: str
    number: int
    unit: str
    fields: dict[str, Any]
    index: int = 0
    alone: bool = True

    @property
    def place(self) -> int | str:
        """The row's number; with its file if the source has several."""
        return self.number if self.alone else f"{self.file}:{self.number}"

    def fail(self, reason: str, name: str = "invalid", policy: str | None = None) -> "RowError":
        """The error that names this row."""
        return RowError(self, reason, name, policy)


class RowError(DataError):
    """A row that cannot be used.

    Attributes:
        row: the row.
        reason: why, and what to do about it.
        name: the kind of problem, as counted in the report.
        policy: the action, if already decided: `error` or `drop`.
    """

    def __init__(self, row: Row, reason: str, name: str, policy: str | None):
        super().__init__(f"{row.file}, {row.unit} {row.number}: {reason}")
        self.row, self.reason, self.name, self.policy = row, reason, name, policy


def find(path: str, split: str | None = None) -> list[Path] | None:
    """The files that a path, folder or glob names, limited to the splits that `split` uses; None if it can only be a hub id."""
    found: list[Path] = []
    for name in slices.names(split):
        files = _find(path, name)
        if files is None:
            return None
        found += files
    return list(dict.fromkeys(found))


def _find(path: str, split: str | None) -> list[Path] | None:
    if not path.strip():
        raise DataError("the path of the data is empty; name a file, folder, glob or hub id")
    here = Path(path).expanduser()
    if here.is_file():
        return sniff.of_split(path, [here], split)
    if here.is_dir():
        if (here / "dataset_info.json").exists():
            return sniff.of_split(path, [here], split)
        if (here / "dataset_dict.json").exists():
            inner = here / (split or "")
            return [inner if (inner / "dataset_info.json").exists() else here]
        files = sorted(p for p in here.rglob("*") if p.is_file() and _kind(p) and not _is_hidden(p.relative_to(here)))
        if not files:
            raise DataError(f"{path}: the folder holds none of {', '.join(KINDS)} files; name a file")
        return sniff.of_split(path, files, split, inside=here)
    if glob.has_magic(path):
        files = sorted(Path(p) for p in glob.glob(str(here), recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"{path}: no file matches; check the pattern and the folder the command is run in")
        return sniff.of_split(path, files, split)
    if "://" in path:
        raise DataError(f"{path}: rows are read from local files and from data sets of the hub (org/name), not from URLs; download it")
    if here.suffix or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise DataError(f"{path}: no such file; check the path, which is taken from the folder the command is run in ({Path.cwd()})")
    return None


def _is_hidden(path: Path) -> bool:
    """Whether a file in a folder does not belong to its rows: in .ipynb_checkpoints, for example, or left unfinished by a killed process.
    """
    return path.name == "dataset_infos.json" or any(part.startswith(".") for part in path.parts)


def rows(path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source: local files, or a hub data set with its subset and split, downloaded first unless `streaming`."""
    paths = find(path, split)
    if paths is None:
        return read_hub(path, name, split, streaming)
    if split is None or slices.is_whole(split):
        return read(paths)
    return slices.rows(split, lambda name: read(find(path, name) or []), alone=len(paths) == 1)


def content_hash(path: Path) -> str:
    """sha256 of a file, or of all files of an Arrow folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read(paths: list[Path]) -> Iterator[Row]:
    """The rows of a source's files, streamed."""
    index = 0
    for path in paths:
        for row in _read(path):
            index += 1
            yield replace(row, index=index, alone=len(paths) == 1)


def _read(path: Path) -> Iterator[Row]:
    kind = "folder" if path.is_dir() else _kind(path)
    if kind is None:
        raise DataError(f"{path}: cannot tell the format from the name; use one of {', '.join(KINDS)}, also with .gz or .zst")
    if kind != "folder":
        sniff.check_sign(path)
    empty = True
    for number, fields in READERS[kind](path):
        empty = False
        yield Row(str(path), number, UNIT.get(kind, "row"), fields)
    if empty:
        raise DataError(f"{path}: the file holds no rows; check that it was written, or name another file")


@contextlib.contextmanager
def _from_hub(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: neither a local file nor an accessible data set of the hub ({reason}); check the path, or the id and split"
        ) from None


def hub_version(path: str, name: str | None, split: str | None, streaming: bool) -> str:
    """A version of a hub data set: the fingerprint of its rows or, when streaming, the hash of its file names and commit."""
    import datasets

    with _from_hub(path):
        if not streaming:
            return datasets.load_dataset(path, name, split=split or "train")._fingerprint
        builder = datasets.load_dataset_builder(path, name)
        return f"{builder.hash} {builder.config_id} {split}"


def read_hub(path: str, name: str | None, split: str | None, streaming: bool = False) -> Iterator[Row]:
    """The rows of a hub data set."""
    import datasets

    with _from_hub(path):
        found = datasets.load_dataset(path, name, split=split or "train", streaming=streaming)
    for number, fields in enumerate(found, 1):
        yield Row(path, number, "row", _without_filling(fields), number)


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return KINDS.get(Path(name).suffix.lower())


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            fields = jsonfile.DECODER.decode(line)
        except json.JSONDecodeError as error:
            hint = "; the file looks like one JSON list: rename it to .json" if number == 1 and line.lstrip()[0] == "[" else ""
            reason = f"{jsonfile.reason(line, error)} at column {error.pos + 1}{hint}"
            raise DataError(f"{path}, line {number}: not valid JSON, {reason}") from None
        except (RecursionError, ValueError) as error:  # deeply nested lists, or a number with thousands of digits
            raise DataError(f"{path}, line {number}: the row cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise DataError(f'{path}, line {number}: a row must be a JSON object like {{"text": ...}}, this is a {kind_of(fields)}')
        yield number, fields


def _json(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    with readable(path, lambda: f", after row {number}" if number else ""):
        for number, fields in enumerate(jsonfile.read(path, open_text), 1):
            if not isinstance(fields, dict):
                raise DataError(f'{path}, row {number}: a row must be a JSON object like {{"text": ...}}, this is a {kind_of(fields)}')
            yield number, fields


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(1 << 30)
    lines = lines_of(path)
    reader = csv.DictReader((line for _, line in lines), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or ()
        if reader.fieldnames == []:
            raise DataError(f"{path}, line {reader.line_num}: an empty line, where the names of the columns have to be; remove it")
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0] and mark != delimiter), None)):
            instead = "let its name end in .tsv" if other == "\t" else "save it with ',' between columns, or with tabs as .tsv"
            raise DataError(f"{path}: the header {names[0]!r} has no {delimiter!r}; columns look separated by {other!r}: {instead}")
        for fields in reader:
            _check_names(path, names)
            if None in fields or None in fields.values():
                raise DataError(f"{path}, line {reader.line_num}: the row has another number of fields than the header, {len(names)}")
            yield reader.line_num, fields
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV, {error}") from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the header names {twice!r} twice; rename one of the columns, or remove it")


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            number = 0
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, _without_filling(fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's error, not Arrow's for malformed bytes
            raise
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); fetch it again") from None


def _dataset(path: Path) -> Iterator[tuple[int, dict]]:
    import datasets
    import pyarrow

    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        elif sniff.begins(path).startswith(b"ARROW1"):  # the indexed form that pyarrow, pandas and polars write
            with pyarrow.ipc.open_file(path.read_bytes()) as file:
                rows = datasets.Dataset(file.read_all())
        else:
            rows = datasets.Dataset.from_file(str(path))
        if isinstance(rows, datasets.Dataset):
            rows.data.validate(full=True)  # reading places beyond the file's end would end the process
    except Exception as error:
        raise DataError(f"{path}: not a readable Arrow data set ({str(error).splitlines()[0]}); save it again with save_to_disk") from None
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(
            f"{path}: holds the splits {', '.join(map(str, rows))}; name one of their folders, like {path / str(next(iter(rows)))}"
        )
    for number, fields in enumerate(rows, 1):
        yield number, _without_filling(fields)


def _without_filling(fields: Mapping) -> dict:
    """A row of Arrow's, whose structs have every key that any row's has: one that is None was not there (arguments of another tool)."""

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: own(part) for name, part in value.items() if part is not None}
        return [own(part) for part in value] if isinstance(value, list) else value

    return {name: own(value) for name, value in fields.items()}


def _text(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in lines_of(path):
        if number == 1 and line.startswith("{") and _is_object(line):
            raise DataError(f"{path}: the lines look like JSON objects, and a .txt file is trained on as it stands; rename it to .jsonl")
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def kind_of(value: Any) -> str:
    """JSON's name for the type of this value."""
    names = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), type(value).__name__)


READERS = {
    "jsonl": _jsonl, "json": _json, "csv": lambda p: _table(p, ","), "tsv": lambda p: _table(p, "\t"),
    "parquet": _parquet, "arrow": _dataset, "folder": _dataset, "txt": _text,
}  # fmt: skip

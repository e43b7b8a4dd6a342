import gzip
import json

import datasets
import pyarrow
import pytest
import zstandard

from jaxtune import data
from jaxtune.data.files import find, read
from jaxtune.data.files import rows as rows_of
from jaxtune.errors import DataError

ROWS = [{"prompt": f"Question {n}, “naïve”\u2028: ", "completion": "yes,\nit is"} for n in range(30)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def save(path, rows=ROWS):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(JSONL))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(JSONL))
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + JSONL)  # with a byte order mark
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        if path.suffix == ".parquet":
            table.to_parquet(str(path))
        elif path.suffix == ".arrow":
            table.save_to_disk(str(path.parent / "saved"))
            (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
        else:
            table.save_to_disk(str(path))


NAMES = ["r.jsonl", "r.jsonl.gz", "r.jsonl.zst", "r.json", "r.csv", "r.tsv", "r.parquet", "r.arrow", "folder"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_holds_the_same_rows(name, tmp_path):
    save(tmp_path / name)
    rows = list(read(find(str(tmp_path / name))))
    assert [row.fields for row in rows] == ROWS
    assert [row.index for row in rows] == list(range(1, 31))
    assert rows[0].unit == ("line" if name.endswith(("jsonl", "gz", "zst", "csv", "tsv")) else "row")


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "folder"])
def test_arguments_of_other_tools_are_not_there(name, tmp_path):
    """Arrow gives all structs of a column the same keys."""
    given = {"add": {"a": 1, "b": 2}, "weather": {"city": "Rome"}}
    calls = [{"tool_calls": [{"name": tool, "arguments": arguments}]} for tool, arguments in given.items()]
    save(tmp_path / name, calls)
    assert [row.fields for row in read(find(str(tmp_path / name)))] == calls


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_training_from_them_is_the_same(name, tmp_path, config, tokenizers):
    save(tmp_path / name)
    want = data.load(config(ROWS), tokenizers["chatml"]).train
    assert data.load(config(str(tmp_path / name)), tokenizers["chatml"]).train.fingerprint == want.fingerprint


def test_splits_of_a_folder_are_told_apart(tmp_path):
    for name in ("data/train-00000.jsonl", "data/train-00001.jsonl", "data/test-00000.jsonl", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"files of the splits test, train .*say which: {path: .*, split: train}"):
        find(str(tmp_path))
    assert [path.name for path in find(str(tmp_path), "train") or ()] == ["train-00000.jsonl", "train-00001.jsonl"]
    assert [path.name for path in find(str(tmp_path), "test") or ()] == ["test-00000.jsonl"]
    with pytest.raises(DataError, match=r"no file is of the split dev; there are files of test, train\. Name one of those"):
        find(str(tmp_path), "dev")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for split in (None, "train"):
        assert find(str(tmp_path / "rows.jsonl"), split) == [tmp_path / "rows.jsonl"]
    with pytest.raises(DataError, match="split validation; no file's name contains a split, so all rows belong to train"):
        find(str(tmp_path / "rows.jsonl"), "validation")


@pytest.mark.parametrize("split", ["train[:25%]", "train[-3:]", "test[1:2]+train[2:4]+test", "train[10:999]"])
def test_a_part_of_a_split_is_that_of_the_data_sets_library(split, tmp_path):
    for name, count in (("train", 11), ("test", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(count)))
    found = list(rows_of(str(tmp_path), split=split))
    files_of = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    assert [row.fields for row in found] == datasets.load_dataset("json", data_files=files_of, split=split).to_list()
    assert [row.index for row in found] == list(range(1, len(found) + 1)) and {row.alone for row in found} == {"+" not in split}


@pytest.mark.parametrize("split", ["train[:200%]", "train[x]", "train[5:2]", "train[20:]"])
def test_what_is_no_part(split, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 11)
    with pytest.raises(DataError, match=r"split 'train.*' (is not a part of a data set|leaves no rows).*write it like train\[:10%\]"):
        list(rows_of(str(tmp_path), split=split))


def test_a_split_of_an_arrow_folder(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert find(str(tmp_path / "saved"), "test") == [tmp_path / "saved" / "test"]
    with pytest.raises(DataError, match="holds the splits train, test; name one of their folders"):
        list(read(find(str(tmp_path / "saved")) or []))


def test_both_forms_of_arrow_files(tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    for name, form in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with form(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    assert [row.fields["text"] for row in read(find(str(tmp_path)) or [])] == ["a", "b"] * 2


def test_lines_of_a_text_file(tmp_path):
    (tmp_path / "r.txt").write_text("One\n\nTwo \n")
    assert [(row.number, row.fields) for row in read(find(str(tmp_path / "r.txt")))] == [(1, {"text": "One"}), (3, {"text": "Two "})]


def test_lines_are_counted_with_the_blank_ones(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    assert [row.number for row in read(find(str(tmp_path / "r.jsonl")))] == [1, 4]


def test_globs_and_folders_are_sources_of_several_files(tmp_path, config, tokenizers):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "many" / name).write_text(json.dumps({"prompt": f"{name} ", "completion": ""}) + "\n")
    (tmp_path / "many" / "README.md").write_text("no rows")
    assert [row.fields["prompt"] for row in read(find(str(tmp_path / "many" / "*.jsonl")))] == ["a.jsonl ", "b.jsonl "]
    rows = list(read(find(str(tmp_path / "many"))))
    assert [row.index for row in rows] == [1, 2, 3] and rows[2].place.endswith("deep/c.jsonl:1")
    loaded = data.load(config(str(tmp_path / "many" / "**" / "*.jsonl")), tokenizers["chatml"])
    assert [place.split("/")[-1] for place in loaded.ledger["train"][0]["problems"]["empty_answer"]] == [
        "a.jsonl:1",
        "b.jsonl:1",
        "c.jsonl:1",
    ]

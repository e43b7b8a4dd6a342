"""Corpora larger than memory: read, tokenised and planned as a stream, and trained from disk."""

import json
import tracemalloc

import numpy as np
import pytest

from jaxtune import data
from jaxtune.data import documents, files, screen
from jaxtune.data.report import report
from jaxtune.errors import ConfigError

ROWS = [{"prompt": f"Question {n}: ", "completion": f"yes {n}"} for n in range(60)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set of two files that is found like one on the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for number, rows in enumerate((ROWS[:40], ROWS[40:])):
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    find = files.find
    monkeypatch.setattr(files, "find", lambda path, split=None: None if path == str(folder) else find(path, split))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "downloaded"))
    return folder


def test_a_stream_of_the_hub_is_the_data_set_itself(hub, config, tokenizers):
    streamed = data.load(config(str(hub), streaming=True), tokenizers["chatml"]).train
    direct = data.load(config(ROWS, streaming=False), tokenizers["chatml"]).train
    assert streamed.fingerprint == direct.fingerprint
    for step in (0, 5, 100_000):
        assert (streamed.batch_at(step).tokens == direct.batch_at(step).tokens).all()


def test_the_second_run_reads_no_stream_and_a_changed_one_is_read_again(hub, config, tokenizers, monkeypatch):
    read, count = files.read_hub, []
    monkeypatch.setattr(files, "read_hub", lambda *args: (count.append(args), read(*args))[1])
    for _ in range(2):
        data.load(config(str(hub), streaming=True), tokenizers["chatml"])
    assert len(count) == 1
    (hub / "train-2.jsonl").write_text(json.dumps({"prompt": "One more: ", "completion": "yes"}) + "\n")
    assert len(data.load(config(str(hub), streaming=True), tokenizers["chatml"]).train.documents) == 61


def test_a_stream_is_read_up_to_its_limit(hub, config, tokenizers, monkeypatch):
    taken, read = [], files.read_hub
    monkeypatch.setattr(files, "read_hub", lambda *args: (taken.append(row.index) or row for row in read(*args)))
    loaded = data.load(config([{"path": str(hub), "limit": 7}], streaming=True), tokenizers["chatml"]).train
    assert loaded.documents.rows.tolist() == list(range(1, 8)) and len(taken) <= 8
    assert len(data.load(config([{"path": str(hub), "limit": 9}], streaming=True), tokenizers["chatml"]).train.documents) == 9


def test_rows_are_compared_only_as_far_as_memory_should_go(config, tokenizers, monkeypatch):
    rows = [*ROWS, ROWS[0], ROWS[1]]
    monkeypatch.setattr(screen, "STREAMED", 61)
    found = report(config(rows, streaming=True), tokenizers["chatml"])
    assert found.examined == 61 and found.problems["exact_duplicate"] == 1
    assert found.notes == ["Of the stream, the first 61 rows were compared with each other."]
    assert report(config(rows), tokenizers["chatml"]).problems["exact_duplicate"] == 2
    with pytest.raises(ConfigError, match="data.quality.near_duplicate compares rows with each other, in memory"):
        data.load(config(rows, streaming=True, quality={"near_duplicate": "drop"}), tokenizers["chatml"])


def test_storing_takes_no_memory_and_the_index_stays_on_disk(tmp_path):
    """200 000 documents of 50 tokens (13 MB with their index) with half a megabyte of memory."""
    entry = documents.Entry(list(range(50)), np.ones(50, np.uint8), 1, 2**63, 3, 4)
    tracemalloc.start()
    made = documents.write(tmp_path, lambda: "key", (entry for _ in range(40_000)), lambda: {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e5 and len(made) == 40_000
    assert all(isinstance(column, np.memmap) for column in (made.tokens[0], made.lengths, made.content))
    assert made.select(np.arange(40_000)) is made and made.lengths.sum() == 2_000_000 and made.content[-1] == 2**63

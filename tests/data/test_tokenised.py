"""The cache contains what would be made, and misses when anything changes; the ledger accounts for every row and token."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxtune import data
from jaxtune.data import encode, tokenised
from jaxtune.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": f"Answer {n}"}]} for n in range(20)]


@pytest.fixture
def made(monkeypatch):
    """How many rows have been encoded."""
    count = []
    original = encode.Encoder.pieces
    monkeypatch.setattr(encode.Encoder, "pieces", lambda self, row, example: (count.append(row.index), original(self, row, example))[1])
    return count


def test_a_second_run_reads_the_cache(config, tokenizers, made):
    one = data.load(config(ROWS), tokenizers["chatml"])
    two = data.load(config(ROWS), tokenizers["chatml"])
    assert len(made) == 20 and one.train.fingerprint == two.train.fingerprint and one.ledger == two.ledger


def change_a_row(keys, monkeypatch, tmp_path):
    keys["rows"] = [*ROWS[:-1], {"messages": [ROWS[-1]["messages"][0], {"role": "assistant", "content": "Answer 19!"}]}]


def change_the_template(keys, monkeypatch, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}")
    keys["chat_template"] = str(tmp_path / "t.jinja")


def change_the_code(keys, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenised, "MAKERS", tokenised.MAKERS[1:])


def change_a_library(keys, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenised.importlib.metadata, "version", lambda name: "99")


def change_a_setting(keys, monkeypatch, tmp_path):
    keys["train_on"] = "last"


@pytest.mark.parametrize("change", [change_a_row, change_the_template, change_the_code, change_a_library, change_a_setting])
def test_the_cache_misses(config, tokenizers, made, change, monkeypatch, tmp_path):
    data.load(config(ROWS), tokenizers["chatml"])
    keys = {"rows": ROWS}
    change(keys, monkeypatch, tmp_path)
    data.load(config(keys.pop("rows"), **keys), tokenizers["chatml"])
    assert len(made) == 40


def test_the_cache_misses_for_another_tokenizer(config, tokenizers, tokenizer_with, made):
    data.load(config(ROWS), tokenizers["chatml"])
    for change in (lambda t: t.add_tokens(["Question"]), lambda t: setattr(t, "chat_template", t.chat_template + " ")):
        other = tokenizer_with("chatml", None)
        change(other)
        before = len(made)
        data.load(config(ROWS), other)
        assert len(made) == before + 20


def test_every_module_that_makes_rows_is_part_of_the_key():
    """Whatever data/tokenised.py imports from its package, directly or indirectly, affects the tokens."""
    folder, seen, todo = Path(tokenised.__file__).parent, set(), ["tokenised"]
    while todo:
        name = todo.pop()
        seen.add(name)
        found = set(re.findall(r"from jaxtune\.data\.(\w+) import", (folder / f"{name}.py").read_text()))
        for line in re.findall(r"from jaxtune\.data import (.+)", (folder / f"{name}.py").read_text()):
            found |= {part.split(" as ")[0].strip() for part in line.split(",")}
        todo += found - seen
    assert seen - {"similar"} == set(tokenised.MAKERS), "similar only compares rows that have been made"


def test_padding_that_a_call_left_behind_is_no_change(config, tokenizer_with, made):
    tokenizer = tokenizer_with("chatml", None)
    data.load(config(ROWS), tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    data.load(config(ROWS), tokenizer)
    assert len(made) == 20


def lengths_of(tokenizer, rows):
    return [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]


TEXTS = [{"text": "word " * n} for n in (5, 40, 10, 90)]


def ledger_of(config, tokenizer, rows, **keys):
    loaded = data.load(config(rows, max_length=64, **keys), tokenizer)
    (ledger,) = loaded.ledger["train"]
    assert ledger["kept_tokens"] == loaded.train.tokens and ledger["trained_tokens"] == loaded.train.trained_tokens
    assert ledger["documents"] == len(loaded.train.documents) and ledger["rows"] == len(rows)
    return loaded.train.documents, ledger


def test_drop(config, tokenizers):
    tokenizer = tokenizers["chatml"]
    long = [n for n, length in enumerate(lengths_of(tokenizer, TEXTS), 1) if length > 64]
    documents, ledger = ledger_of(config, tokenizer, TEXTS, length_policy="drop")
    assert ledger["dropped"] == {"too_long": long} and len(long) == 2
    assert sorted([*documents.rows.tolist(), *long]) == [1, 2, 3, 4]
    assert ledger["tokens"] == sum(lengths_of(tokenizer, TEXTS))


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncate(config, tokenizers, side):
    tokenizer = tokenizers["llama3"]
    documents, ledger = ledger_of(config, tokenizer, TEXTS, length_policy="truncate", truncation_side=side)
    whole = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in TEXTS]
    for doc, ids in enumerate(whole):
        kept, mask = documents[doc]
        assert kept.tolist() == (ids[:64] if side == "right" else ids[-64:]) and mask.tolist() == [0] + [1] * (len(kept) - 1)
    assert ledger["cut"] == {str(n): len(ids) - 64 for n, ids in enumerate(whole, 1) if len(ids) > 64}
    assert sum(ledger["cut"].values()) == ledger["tokens"] - ledger["kept_tokens"]


def test_truncating_the_prompt_keeps_bos_and_the_answer(config, tokenizers):
    tokenizer = tokenizers["llama3"]
    rows = [{"prompt": "word " * 80 + "is:", "completion": " the answer"}]
    documents, _ = ledger_of(config, tokenizer, rows, length_policy="truncate", truncation_side="prompt")
    ids, mask = documents[0]
    assert len(ids) == 64 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[mask > 0]) == " the answer<|eot_id|>"
    with pytest.raises(DataError, match="its answer would lose tokens"):
        ledger_of(config, tokenizer, [{"prompt": "a ", "completion": "word " * 80}], length_policy="truncate", truncation_side="prompt")


def test_split_keeps_every_target(config, tokenizers):
    tokenizer = tokenizers["chatml"]
    documents, ledger = ledger_of(config, tokenizer, TEXTS, length_policy="split")
    whole = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in TEXTS]
    assert int(documents.trained.sum()) == sum(len(ids) - 1 for ids in whole), "all but the first token of each row"
    for row, ids in enumerate(whole, 1):
        parts = [documents[doc] for doc in np.flatnonzero(documents.rows == row)]
        assert [token for part, mask in parts for token, trained in zip(part, mask, strict=True) if trained] == ids[1:]
    assert ledger["parts"] == [n for n, ids in enumerate(whole, 1) if len(ids) > 64]


def test_rows_that_are_no_text_are_not_split(config, tokenizers):
    with pytest.raises(DataError, match="choose data.length_policy: drop or truncate"):
        data.load(config([{"prompt": "word " * 80, "completion": "b"}], max_length=64, length_policy="split"), tokenizers["chatml"])


def test_a_ledger_is_plain_json(config, tokenizers):
    ledger = data.load(config(TEXTS[:1], max_length=64), tokenizers["chatml"]).ledger
    assert json.loads(json.dumps(ledger)) == ledger


def test_a_refused_answer_leaves_the_other_rows_their_own_tokens(config, tokenizers):
    """The chosen answer of the second pair begins with BOS twice, for which its row is dropped; the third row stays the third."""
    pairs = [{"prompt": f"Question {n}: ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    pairs[1]["prompt"] = "<|begin_of_text|>Question 1: "
    settings = config(pairs, {"objective": "dpo"}, quality={"double_bos": "drop"})
    documents = data.load(settings, tokenizers["llama3"]).train.documents
    said = [tokenizers["llama3"].decode(documents[n][0], skip_special_tokens=True) for n in range(len(documents))]
    assert said == [f"Question {n}: {word} {n}" for n in (0, 2, 3) for word in ("good", "bad")]
    assert documents.rows.tolist() == [1, 1, 3, 3, 4, 4]

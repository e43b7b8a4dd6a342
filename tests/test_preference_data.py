"""The preference set: reproducible byte for byte, held out as documented, and not separable by length or words alone."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat import make_tokenizer

from jaxtune import data
from jaxtune.config import load_config

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "preference"
RULES = ("relevant", "answer first", "definite", "courteous")


@pytest.fixture(scope="module")
def rows():
    return {split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "eval")}


def answer(row, side):
    (turn,) = row[side]
    assert turn["role"] == "assistant"
    return turn["content"]


SIDES = ("chosen", "rejected")


def words(text):
    return Counter(re.findall(r"\w+|[^\w\s]", text.lower()))


def test_the_generator_writes_the_files_that_are_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_preference_data.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "tools" / "make_preference_data.py"), run_name="__main__")
    for split in ("train", "eval"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 300_000


@pytest.mark.parametrize("split", ["train", "eval"])
def test_length_tells_nothing(rows, split):
    for rule in RULES:
        more = [len(answer(row, "chosen")) - len(answer(row, "rejected")) for row in rows[split] if row["rule"] == rule]
        assert len(more) == len(rows[split]) / len(RULES)
        assert abs(sum(np.sign(more))) <= 1 and abs(np.mean(more)) < 0.5


def test_no_question_and_no_kind_rude_or_evasive_sentence_is_met_in_both_splits(rows):
    sentences = {}
    for split, of in rows.items():
        asked = {row["prompt"][1]["content"] for row in of}
        last = {re.split(r"(?<=[.!?]) ", answer(row, side))[-1] for row in of if row["rule"] == "courteous" for side in SIDES}
        first = {re.split(r"(?<=[.!?]) ", answer(row, "rejected"))[0] for row in of if row["rule"] in ("definite", "answer first")}
        sentences[split] = asked | last | first
        assert len({(str(row["prompt"]), answer(row, side)) for row in of for side in SIDES}) == 2 * len(of)
    assert not sentences["train"] & sentences["eval"]


def test_a_linear_model_of_the_words_is_well_below_what_can_be_reached(rows):
    """Logistic regression on the difference of the two answers' word counts; on the two rules that words cannot tell it is at chance."""
    place = {word: n for n, word in enumerate(sorted(set().union(*(words(answer(r, s)) for r in rows["train"] for s in SIDES))))}

    def features(of):
        out = np.zeros((len(of), len(place)))
        for number, row in enumerate(of):
            for sign, side in zip((1, -1), SIDES, strict=True):
                for word, count in words(answer(row, side)).items():
                    if word in place:
                        out[number, place[word]] += sign * count
        return out

    x, weights = features(rows["train"]), np.zeros(len(place))
    for _ in range(1000):
        weights += 0.5 * (x.T @ (1 / (1 + np.exp(x @ weights))) / len(x) - 0.001 * weights)
    score = features(rows["eval"]) @ weights
    right = np.where(np.abs(score) < 1e-9, 0.5, score > 0)
    of_rule = {rule: np.mean([r for r, row in zip(right, rows["eval"], strict=True) if row["rule"] == rule]) for rule in RULES}
    assert of_rule["answer first"] == 0.5 and abs(of_rule["relevant"] - 0.5) < 0.1
    assert np.mean(right) < 0.75


@pytest.mark.parametrize("objective", ["dpo", "orpo", "simpo", "kto"])
def test_the_configs_read_the_set_and_other_pairs(tmp_path, monkeypatch, objective):
    """As they are; and LLaMA-Factory's demo pairs, if available."""
    monkeypatch.chdir(ROOT)
    here = {"data.cache_dir": str(tmp_path), "data.max_length": 4096}  # a small tokenizer makes many tokens
    overrides = [f"{key}={value}" for key, value in here.items()]
    config = load_config(f"configs/{objective}.yaml", overrides)
    loaded = data.load(config, make_tokenizer("chatml"))
    assert config.objective == objective and len(loaded.train.documents) == 960 and len(loaded.eval.documents) == 320
    assert not loaded.ledger["train"][0]["problems"] and loaded.train.saved_tokens > 0.2 * loaded.train.tokens
    demo = ROOT.parent / "shared" / "data" / "dpo_en_demo.json"
    if demo.exists():
        config = load_config(f"configs/{objective}.yaml", [*overrides, f"data.train={demo}", "data.eval=0.1", "data.length_policy=drop"])
        loaded = data.load(config, make_tokenizer("chatml"))
        rows = [np.unique(side.documents.rows) for side in (loaded.train, loaded.eval)]
        dropped = loaded.ledger["train"][0]["dropped"]
        assert set(dropped) == {"too_long"} and len(rows[0]) + len(rows[1]) + len(dropped["too_long"]) == 300
        assert not set(np.concatenate(rows).tolist()) & set(dropped["too_long"])

"""Prompts of grpo and rloo: what the model reads, what rewards see, which prompts a step uses."""

import json

import numpy as np
import pytest
from chat import make_tokenizer

from jaxtune import data
from jaxtune.config import load_config
from jaxtune.errors import ConfigError, DataError

ROWS = [{"prompt": f"one two {word}", "answer": word, "level": n} for n, word in enumerate("fox dog the quick brown lazy over".split())]
OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("chatml")


@pytest.fixture
def load(tmp_path, tokenizer):
    """The training prompts of some rows."""

    def make(rows, keys=None, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"train": str(file), "max_length": 256, "cache_dir": str(tmp_path / "cache")} | settings
        config = {"model": "none", "objective": "grpo", "num_generations": 2, "per_device_train_batch_size": 4, "data": given}
        return data.load(load_config(config | (keys or {})), tokenizer).train

    return make


def text(tokenizer, prompts, number=0):
    return tokenizer.decode(prompts.ids(number))


def test_a_system_turn_that_the_template_drops(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1].content }}")
    with pytest.raises(DataError, match=r"line 1: the chat template drops message 1 \(system\)"):
        load([{"prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}], "answer": ""}] * 4)


def test_texts_and_turns_as_the_model_reads_them(load, tokenizer):
    user, assistant = {"role": "user", "content": "one two"}, {"role": "assistant", "content": "the quick"}
    assert text(tokenizer, load(ROWS)) == "one two fox"
    assert text(tokenizer, load([{"prompt": [user]}])).endswith(f"one two<|im_end|>\n{OPENING}")
    assert text(tokenizer, load([{"prompt": [user, assistant]}])).endswith(f"{OPENING}the quick")  # gone on with
    prompts = load(ROWS, system="be brief")
    assert text(tokenizer, prompts).endswith(f"one two fox<|im_end|>\n{OPENING}") and "be brief" in text(tokenizer, prompts)
    assert prompts.originals[0] == [{"role": "user", "content": "one two fox"}]


def test_columns_reach_rewards_under_the_names_of_the_rows(load):
    prompts = load([{"question": "one", "answer": "a"}, {"question": "two", "hint": 3}], columns={"prompt": "question"})
    assert prompts.originals == ["one", "two"]
    assert prompts.fields == [{"answer": "a", "hint": None}, {"answer": None, "hint": 3}]


def test_a_function_makes_prompts_and_columns(load, tmp_path, monkeypatch):
    (tmp_path / "made_rows.py").write_text("def made(row):\n    return {'prompt': row['q'] + '?', 'answer': row['a'].split('#')[-1]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    prompts = load([{"q": "one", "a": "x#7"}], format="made_rows.made")
    assert prompts.originals == ["one?"] and prompts.fields == [{"answer": "7"}]


def test_each_prompt_is_asked_once_an_epoch_and_steps_share_a_rollout(load):
    prompts = load(ROWS, {"num_iterations": 3})
    assert (prompts.rollouts_per_epoch, prompts.steps_per_epoch) == (4, 12)
    assert sorted(sum((prompts.prompts_at(n) for n in range(4)), [])) == list(range(7)) and len(prompts.prompts_at(3)) == 1
    assert sorted(sum((prompts.prompts_at(n) for n in range(4, 8)), [])) == list(range(7))
    assert [prompts.prompts_at(n) for n in range(4)] != [prompts.prompts_at(n) for n in range(4, 8)]
    assert prompts.rows_at(2) == prompts.rows_at(0) != prompts.rows_at(3)


def test_a_rollout_of_fewer_prompts_has_empty_rows(load):
    prompts = load(ROWS)
    batch = prompts.layout.batches([[3, 4]], [[5], [6, 7]], np.array([1.0, -1.0]), np.array([True, True]), 2)
    assert batch.tokens.shape[:3] == (1, 1, 2) and not batch.segments[0, 0, 1].any() and batch.weights.sum() == 3
    masked = prompts.layout.batches([[3, 4]], [[5], [6, 7]], np.array([1.0, -1.0]), np.array([True, False]), 2)
    assert masked.weights.sum() == 1 and set(masked.answers.numbers[0, 0, 0]) == {0, 1, 2} and masked.rollout.tokens[0, 0, 0, 0] == 0.5


def test_long_prompts(load, tokenizer):
    rows = [{"prompt": "one two " + "fox " * 40}]
    with pytest.raises(DataError, match=r"its prompt alone has \d+\), max_length is 16; raise data.max_length"):
        load(rows, max_length=16)
    assert text(tokenizer, load(rows, max_length=16, length_policy="truncate")).endswith("fox ")
    with pytest.raises(ConfigError, match=r"data.streaming keeps no rows"):
        load(ROWS, streaming=True)


def test_a_tokenizer_that_ends_every_text(tmp_path):
    """An answer does not follow the token that ends a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("chatml")
    ends = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {ends}", special_tokens=[(ends, tokenizer.eos_token_id)])
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    rows = {"train": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")}
    prompts = data.load(load_config({"model": "none", "objective": "grpo", "data": rows}), tokenizer).train
    assert tokenizer("one")["input_ids"][-1] == tokenizer.eos_token_id != prompts.ids(0)[-1]
    assert tokenizer.decode(prompts.ids(0)) == "one two fox"

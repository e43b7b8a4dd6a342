"""Scoring texts: accepted inputs, their order, the command."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune.convert import heads
from jaxtune.errors import ConfigError, DataError, ModelError

CHAT = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
STEPS = {"prompt": "one two", "completions": ["three", "four five"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`lm`, a language model, and scorers made from it: `reward`, `classes`, `steps`."""
    folder = tmp_path_factory.mktemp("score")
    tiny.write_chat_model(folder / "lm", tiny.LLAMA | {"num_hidden_layers": 2})
    for name, head in {
        "reward": heads.Head(("reward",)), "classes": heads.Head(("bad", "good", "odd"), problem_type="single_label_classification"),
        "steps": heads.Head(("wrong", "right"), "token"),
    }.items():  # fmt: skip
        model = heads.attach(jt.load(folder / "lm"), head, jax.random.key(0))
        jt.save(model.config, model.params, folder / name, tokenizer=model.tokenizer)
    return folder


@pytest.fixture(scope="module")
def reward(folder):
    return jt.load(folder / "reward")


def test_the_ways_to_say_a_text(reward):
    same = [CHAT, (CHAT[:1], "three"), (CHAT[:1], CHAT[1:]), {"messages": CHAT}, {"prompt": CHAT[:1], "completion": "three", "label": True}]
    scores = jt.score(reward, same)
    assert scores.shape == (5,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, scores[0], atol=1e-6)
    plain = jt.score(
        reward, [("one", " two"), {"prompt": "one", "completion": " two"}, "one two<|im_end|>", "one two", {"text": "one two"}]
    )
    np.testing.assert_allclose(plain, [plain[0]] * 3 + [plain[3]] * 2, atol=1e-6)
    assert abs(plain[0] - plain[3]) > 1e-3


def test_order_and_batches_change_nothing(reward):
    texts = ["one " * n for n in (3, 40, 1, 17, 5, 9)]
    alone = [float(jt.score(reward, text)[0]) for text in texts]
    for size in (None, 1, 4):
        np.testing.assert_allclose(jt.score(reward, texts, batch_size=size), alone, atol=1e-5)
    assert jt.score(reward, []).shape == (0,)


def test_classes_and_steps(folder, reward):
    model = jt.load(folder / "classes")
    assert jt.score(model, ["one", "two"]).shape == (2, 3) and model.hf_config["label2id"] == {"bad": 0, "good": 1, "odd": 2}
    steps = jt.load(folder / "steps")
    two, one = jt.score(steps, [STEPS, STEPS | {"completions": ["three"], "labels": [True]}])
    assert two.shape == (2,) and one == pytest.approx(two[:1], abs=1e-6) and 0 < two[0] != two[1] < 1
    for wrong, texts, said in (
        (steps, ["one"], "judges step by step"), (reward, [STEPS], "judges whole texts"),
        (reward, [{"prompt": "one"}], "which is not one text"),
        (reward, [{"prompt": "one", "chosen": "a", "rejected": "b"}], "of pairs one answer at a time: --columns completion=chosen"),
        (reward, [3], "it is int; a text is"), (reward, ["one", "two " * 300], "text 2: it has 302 tokens"), (reward, [""], "it is empty"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            jt.score(wrong, texts)


def test_language_models_do_not_score_and_scorers_do_not_write(folder, reward):
    with pytest.raises(ModelError, match="no head to score with"):
        jt.score(jt.load(folder / "lm"), ["one"])
    with pytest.raises(ModelError, match="no head to score with"):
        jt.load_scorer(folder / "lm")
    with pytest.raises(ModelError, match="writes no text; score texts with jt.score"):
        jt.generate(reward, "one")
    with pytest.raises(ConfigError, match="has a scoring head of 1 labels for a sequence, but 2 for a token are asked for"):
        heads.attach(reward, heads.Head(("wrong", "right"), "token"), jax.random.key(0))
    with pytest.raises(ConfigError, match="but a language model is needed"):
        heads.attach(reward, None, jax.random.key(0))
    adapter = jt.init_adapter(jax.random.key(1), reward, jt.LoraConfig(r=2))
    jt.save_adapter(adapter, reward, folder / "adapter")
    with pytest.raises(ModelError, match="has a scoring head, and this is a language model"):
        jt.load_adapter(folder / "adapter", jt.load(folder / "lm"))
    with pytest.raises(ConfigError, match="scoring head is more than low-rank parts"):
        jt.mix({"a": adapter}, ["a"])


def test_the_command(folder, reward, tmp_path):
    rows = [{"messages": CHAT, "id": 7}, {"prompt": "one", "completion": " two"}]
    tiny.write_rows(tmp_path, rows)
    command = [sys.executable, "-m", "jaxtune.score", str(folder / "reward"), "--data", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{key: value for key, value in row.items() if key != "score"} for row in printed] == rows
    np.testing.assert_allclose([row["score"] for row in printed], jt.score(reward, rows), atol=1e-6)


def test_the_command_names_the_line_of_a_row_that_is_no_text(folder, tmp_path, monkeypatch):
    tiny.write_rows(tmp_path, [{"text": "one"}, {"prompt": "one", "chosen": " a", "rejected": " b"}])
    monkeypatch.setattr(sys, "argv", ["score", str(folder / "reward"), "--data", str(tmp_path / "rows.jsonl")])
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the row has prompt, chosen, rejected"):
        jt.score.main()

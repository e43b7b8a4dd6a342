"""Runs that train a scoring head: their results, and how `evaluate` compares them with the base."""

import json

import numpy as np
import pytest
import tiny

import jaxtune as jt
from jaxtune.errors import ConfigError, ModelError
from jaxtune.train import train

WORDS = "one two three hello there fox dog quick brown lazy".split()
PAIRS = [{"prompt": f"Say {word}.", "chosen": f" {word}", "rejected": f" {WORDS[n - 3]} no"} for n, word in enumerate(WORDS)]
TEXTS = [{"text": f"{word} {n} is {kind}", "label": kind} for n, word in enumerate(WORDS) for kind in ("good", "bad")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_chat_model(folder / "model", tiny.LLAMA | {"num_hidden_layers": 1})
    for name, rows in (("pairs", PAIRS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder, tmp_path, rows, **keys):
    data = {"train": str(folder / f"{rows}.jsonl"), "eval": 0.4, "max_length": 32, "cache_dir": str(tmp_path / "cache")}
    return {
        "model": str(folder / "model"), "output_dir": str(tmp_path / "run"), "data": data, "lora": {"r": 4}, "max_steps": 6,
        "per_device_train_batch_size": 1, "learning_rate": 1e-2, "compilation_cache": False, "report_to": [], "save_strategy": "no",
    } | keys  # fmt: skip


def test_a_reward_adapter_over_a_packed_base(folder, tmp_path):
    result = train(settings(folder, tmp_path, "pairs", objective="reward", method="qlora", center_rewards_coefficient=0.01))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["tuned"]["loss"] < report["base"]["loss"] and report["base"].keys() == report["tuned"].keys() > {"accuracy", "margin"}
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    texts = [(row["prompt"], row["chosen"]) for row in PAIRS]
    scorer = jt.load_scorer(tmp_path / "run", quantization="nf4-dq")
    np.testing.assert_allclose(jt.score(scorer, texts), jt.score(result.model, texts, result.trainable), atol=1e-5)
    jt.export(tmp_path / "run", tmp_path / "merged", merge=True, dtype="float32")
    np.testing.assert_allclose(jt.score(tmp_path / "merged", texts), jt.score(scorer, texts), atol=1e-5)
    with pytest.raises(ModelError, match="scores texts, and GGUF files are supported for language models only; export it with --format hf"):
        jt.export(tmp_path / "run", tmp_path / "gguf", format="gguf")
    assert not (tmp_path / "gguf").exists()
    asked = jt.evaluate(folder / "model", folder / "pairs.jsonl", tmp_path / "run" / "adapter", max_length=32)
    scores = {side: jt.score(tmp_path / "run", [(row["prompt"], row[side]) for row in PAIRS]) for side in ("chosen", "rejected")}
    assert asked.tuned["accuracy"] == pytest.approx((scores["chosen"] > scores["rejected"]).mean())
    assert asked.tuned["margin"] == pytest.approx((scores["chosen"] - scores["rejected"]).mean(), abs=1e-4)


def test_a_classifier_of_its_own(folder, tmp_path):
    train(settings(folder, tmp_path, "texts", objective="classification", method="full", id2label=["bad", "good"], max_steps=12))
    model = jt.load(tmp_path / "run" / "model")
    assert model.hf_config["architectures"] == ["LlamaForSequenceClassification"] and model.hf_config["label2id"] == {"bad": 0, "good": 1}
    asked = jt.evaluate(folder / "model", folder / "texts.jsonl", tuned=tmp_path / "run" / "model", max_length=32)
    said = jt.score(model, [row["text"] for row in TEXTS]).argmax(-1)
    assert asked.tuned["accuracy"] == pytest.approx(
        np.mean([("bad", "good")[n] == row["label"] for n, row in zip(said, TEXTS, strict=True)])
    )
    assert asked.tuned["accuracy"] > 0.7 and asked.tuned["loss"] < asked.base["loss"]


def test_answers_are_not_asked_of_a_model_that_scores(folder, tmp_path):
    with pytest.raises(ConfigError, match="evaluate.metric is of answers that a model writes"):
        train(settings(folder, tmp_path, "pairs", objective="reward", evaluate={"metric": ["f1"]}))

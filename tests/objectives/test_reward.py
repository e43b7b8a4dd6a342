"""Reward and classification losses: TRL's and transformers' numbers (goldens), where a text is scored, and that padding does not count."""

from pathlib import Path

import jax
import numpy as np
import pytest
import reward_cases as cases
import tiny

import jaxtune as jt
from jaxtune import data
from jaxtune.config import load_config
from jaxtune.convert import heads
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.reward import answer_scores

GOLDEN = np.load(Path(__file__).parent.parent / "goldens" / "objectives" / "reward.npz")


@pytest.mark.parametrize("name", cases.CASES)
def test_value_and_gradient_are_trls(name):
    loss, gradient, _ = cases.ours(name, {key: GOLDEN[f"{name}/{key}"] for key in ("scores", "said")})
    assert loss == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], rtol=1e-5, atol=1e-6)


def test_metrics_are_of_the_texts_there_are():
    """Chosen scores 1, -2, rejected 0, 3; the other places of the rows are empty."""
    scores = np.array([[1.0], [-2.0]] + [[5.0]] * 5 + [[0.0], [3.0]] + [[4.0]] * 5)
    *_, metrics = cases.ours("reward", {"scores": scores, "said": np.zeros(7)})
    assert metrics == pytest.approx(
        {"accuracy": 6 / 7, "margin": (1 - 5 + 5) / 7, "min_reward": -2, "max_reward": 5, "mean_reward": scores.mean()}
    )
    *_, metrics = cases.ours(
        "multi_label", {"scores": np.array([[1.0, -1, 2]] * 7), "said": np.array([[1.0, 0, 1]] * 3 + [[1.0, 0, 0]] * 4)}
    )
    assert metrics == pytest.approx({"accuracy": (3 + 4 * 2 / 3) / 7, "exact_match": 3 / 7})


# ---- over a model ----

WORDS = "the quick brown fox jumps over lazy dog then it says hello there".split()
PAIRS = [
    {
        "prompt": " ".join(WORDS[: 3 + n % 5]),
        "chosen": " " + " ".join(WORDS[n : n + 2 + n % 3]),
        "rejected": " " + WORDS[-1 - n],
        "margin": n / 5,
    }
    for n in range(7)
] + [{"prompt": "one two three", "chosen": "", "rejected": " four", "margin": 0.0}]  # an answer of nothing but its end token


@pytest.fixture(scope="module", params=["pads with another token", "pads with EOS"])
def scorer(request, tmp_path_factory):
    """A reward model; transformers scores an answer's EOS, or the token before it if texts are padded with EOS."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = tiny.write_chat_model(folder, tiny.LLAMA | {"num_hidden_layers": 2})
    if request.param == "pads with EOS":
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    model = heads.attach(jt.load(folder), heads.Head(("reward",)), jax.random.key(0))
    assert model.hf_config["pad_token_id"] == tokenizer.pad_token_id and "head" not in model.params
    model.params["score"] = model.params["score"] * 20
    return model


def scores_and_gradient(model, tmp_path, **keys):
    """Scores of every answer in the order of the rows, the loss, and its gradient, over one epoch of one micro-batch."""
    tiny.write_rows(tmp_path, PAIRS)
    rows = {"train": str(tmp_path / "rows.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache"), "shuffle": False} | keys
    config = load_config({"model": "m", "objective": "reward", "per_device_train_batch_size": 8, "data": rows, "max_grad_norm": 0})
    source = data.load(config, model.tokenizer).train
    assert source.steps_per_epoch == 1
    batch = jax.tree.map(lambda x: x[0], source.batch_at(0))

    def loss(params):
        made = OBJECTIVES["reward"](config, model.config, params, {}, batch)
        return made.total / made.weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    read = jax.jit(lambda batch: answer_scores(model.config, model.params, batch)[0][..., 0])
    scores = source.each_answer(lambda batch: np.asarray(read(jax.tree.map(lambda x: x[0], batch))))
    order = np.argsort(np.repeat(source.documents.rows[::2], 2) * 2 + np.tile([0, 1], len(PAIRS)), kind="stable")
    return scores[order], float(value), gradient


def test_a_text_has_one_score_however_it_lies_in_rows(scorer, tmp_path):
    """Alone (as in transformers: tests/oracle), beside the other answer to its prompt, packed, and with its own prompt."""
    alone = jt.score(scorer, [(row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")])
    (scores, loss, gradient), *others = (
        scores_and_gradient(scorer, tmp_path, packing=packing, shared_prompts=share)
        for packing, share in ((False, True), (False, False), (True, True))
    )
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    assert np.std(alone) > 0.1
    gaps = alone[::2] - alone[1::2] - [row["margin"] for row in PAIRS]
    assert loss == pytest.approx(np.logaddexp(0, -gaps).mean(), rel=1e-5)
    for other, other_loss, other_gradient in others:
        np.testing.assert_allclose(other, alone, atol=1e-5)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for left, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5 * max(1.0, float(np.abs(left).max())))


def test_the_empty_answer_of_a_model_that_pads_with_eos_is_scored_at_the_end_of_its_prompt(scorer):
    with_answer, without = jt.score(scorer, [("one two three", ""), "one two three"])
    assert (with_answer == pytest.approx(without, abs=1e-6)) == (scorer.tokenizer.pad_token == scorer.tokenizer.eos_token)

"""Reward models against TRL's trainer: tokens, losses, gradients through a whole model, and adapters that open in PEFT."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_cases as cases

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
peft_library = pytest.importorskip("peft")

import tiny  # noqa: E402
from datasets import Dataset  # noqa: E402
from oracle import trl_rewards  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer  # noqa: E402
from trl import RewardTrainer  # noqa: E402
from trl.trainer.reward_trainer import DataCollatorForPreference  # noqa: E402

import jaxtune as jt  # noqa: E402
from jaxtune import data, peft  # noqa: E402
from jaxtune.config import load_config  # noqa: E402
from jaxtune.convert import heads  # noqa: E402
from jaxtune.data.steps import step_tokens  # noqa: E402
from jaxtune.objectives import OBJECTIVES  # noqa: E402

WORDS = "the quick brown fox jumps over lazy dog then it says hello there".split()


def said(start, count):
    return " " + " ".join(WORDS[start : start + count])


def turn(role, text):
    return {"role": role, "content": text}


PLAIN = [{"prompt": said(n, 3), "chosen": said(n, 2 + n % 3), "rejected": said(n + 2, 1 + n % 4), "margin": n / 3} for n in range(6)]
CHAT = [
    {
        "prompt": [turn("user", row["prompt"])], "chosen": [turn("assistant", row["chosen"])],
        "rejected": [turn("assistant", row["rejected"])],
    }
    for row in PLAIN
]  # fmt: skip
STEPS = [
    {"prompt": said(n, 3), "completions": [said(k, 2) for k in range(1 + n % 3)], "labels": [k != n for k in range(1 + n % 3)]}
    for n in range(6)
]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder; its tokenizer pads with the token that ends an answer, as SmolLM2's does."""
    folder = tmp_path_factory.mktemp("rewards") / "model"
    tokenizer = tiny.write_chat_model(folder, tiny.LLAMA | {"tie_word_embeddings": True, "num_hidden_layers": 2})
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def run(folder, tmp_path, rows, **keys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train": str(tmp_path / "rows.jsonl"), "max_length": 128, "shuffle": False, "cache_dir": str(tmp_path / "cache")}
    config = load_config({"model": str(folder), "method": "full", "per_device_train_batch_size": 8, "data": settings} | keys)
    model = heads.attach(jt.load(folder), heads.head_of(config), jax.random.key(1))
    model.params["score"] = model.params["score"] * 20
    jt.save(model.config, model.params, tmp_path / "scorer", tokenizer=model.tokenizer)
    model = jt.load(tmp_path / "scorer")  # whose config.json names the padding token, which the embedding learns nothing of
    return config, model, data.load(config, model.tokenizer).train


def loss_and_gradient(config, model, source):
    batch = jax.tree.map(lambda x: x[0], source.batch_at(0))

    def loss(params):
        made = OBJECTIVES[config.objective](config, model.config, params, {}, batch)
        return made.total / made.weight, made.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    return float(value), gradient, {name: float(total / weight) for name, (total, weight) in metrics.items()}


def assert_same_gradient(ours, theirs):
    """Of head, queries and embedding."""
    grads = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    q = np.stack([grads[f"model.layers.{n}.self_attn.q_proj.weight"] for n in range(2)])
    embed = np.asarray(ours["embed"]), grads["model.embed_tokens.weight"]
    for one, other in ((ours["score"], grads["score.weight"]), (ours["layers"]["0"]["q"], q), embed):
        assert np.abs(other).max() > 1e-4
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max() + 1e-7)


@pytest.mark.parametrize("name", cases.CASES)
def test_losses_gradients_and_metrics_are_theirs(name):
    (loss, gradient, metrics), (want, want_gradient, want_metrics) = cases.ours(name), trl_rewards.theirs(name)
    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6)
    assert {key: metrics[key] for key in want_metrics if key in metrics} == pytest.approx(
        {key: value for key, value in want_metrics.items() if key != "num_tokens"}, rel=1e-5, abs=1e-6
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [PLAIN, CHAT], ids=["plain with margins", "chat"])
def test_a_step_is_trls_from_rows_to_gradients(language_model, tmp_path, rows):
    config, model, source = run(language_model, tmp_path, rows, objective="reward", center_rewards_coefficient=0.02)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    settings = type("Arguments", (), {"dataset_num_proc": None, "max_length": None})
    prepared = RewardTrainer._prepare_dataset(None, Dataset.from_list(rows), tokenizer, settings, "train")
    assert [source.documents[2 * n + side][0].tolist() for n in range(6) for side in (0, 1)] == [
        ids for row in prepared for ids in (row["chosen_ids"], row["rejected_ids"])
    ]
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer", dtype=torch.float32).eval()
    keys = {"chosen_ids", "rejected_ids", "margin"}
    batch = DataCollatorForPreference(tokenizer.pad_token_id)([{k: v for k, v in row.items() if k in keys} for row in prepared])
    trainer = trl_rewards.trainer(config)
    want = trainer.compute_loss(scorer, batch)
    want.backward()
    loss, gradient, metrics = loss_and_gradient(config, model, source)
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)
    for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward"):
        assert metrics[name] == pytest.approx(float(trainer._metrics["train"][name][0]), rel=1e-4, abs=1e-5), name
    assert_same_gradient(gradient, scorer)


@pytest.mark.filterwarnings("ignore")
def test_a_step_over_steps_is_that_of_transformers_token_classifier(language_model, tmp_path):
    """TRL's PRMTrainer (up to TRL 0.28) gives this model its tokens and labels, and leaves the loss to it."""
    config, model, source = run(language_model, tmp_path, STEPS, objective="stepwise_reward")
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    rows = []
    for row in STEPS:
        ids, ends = step_tokens(tokenizer, row["prompt"], row["completions"], "\n")
        alone = [tokenizer.bos_token_id, *tokenizer(row["prompt"])["input_ids"]]
        for step in row["completions"]:
            alone += tokenizer(step)["input_ids"] + tokenizer("\n")["input_ids"]
        assert ids == alone and all(tokenizer.decode(ids[end]) == "\n" for end in ends)
        rows.append((ids, [int(row["labels"][ends.index(n)]) if n in ends else -100 for n in range(len(ids))]))
    width = max(len(ids) for ids, _ in rows)
    ids, labels, mask = (torch.tensor([row + [fill] * (width - len(row)) for row in column]) for column, fill in (
        ([i for i, _ in rows], 0), ([m for _, m in rows], -100), ([[1] * len(i) for i, _ in rows], 0)))  # fmt: skip
    scorer = AutoModelForTokenClassification.from_pretrained(tmp_path / "scorer", dtype=torch.float32).eval()
    want = scorer(input_ids=ids, attention_mask=mask, labels=labels).loss
    want.backward()
    loss, gradient, _ = loss_and_gradient(config, model, source)
    assert loss == pytest.approx(float(want.detach()), rel=1e-5)
    assert_same_gradient(gradient, scorer)
    np.testing.assert_allclose(gradient["score_bias"], scorer.score.bias.grad.numpy(), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_adapters_with_heads_open_in_peft_and_pefts_here(language_model, tmp_path):
    texts = ["the quick", "the quick brown fox jumps over the lazy dog"]
    model = heads.attach(jt.load(language_model), heads.Head(("reward",)), jax.random.key(0))
    adapter = peft.init_adapter(jax.random.key(1), model, jt.LoraConfig(r=4))
    adapter = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), adapter)
    jt.save_adapter(adapter, model, tmp_path / "ours")

    def base():
        return AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1, dtype=torch.float32)

    def scores(of):
        with torch.no_grad():
            return [float(of(torch.tensor([model.tokenizer(text)["input_ids"]])).logits) for text in texts]

    opened = peft_library.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    np.testing.assert_allclose(jt.score(model, texts, adapter), scores(opened), atol=1e-5)
    np.testing.assert_allclose(jt.score(tmp_path / "ours", texts), scores(opened), atol=1e-5)
    settings = peft_library.LoraConfig(
        r=3, task_type="SEQ_CLS", modules_to_save=["score"], target_modules="all-linear", init_lora_weights=False
    )
    made = peft_library.get_peft_model(base(), settings).eval()
    made.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(jt.score(tmp_path / "theirs", texts), scores(made), atol=1e-5)
    jt.export(tmp_path / "ours", tmp_path / "merged", merge=True)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(scores(whole), scores(opened), atol=1e-5)
    assert jnp.abs(jnp.asarray(scores(opened)) - jt.score(model, texts)).max() > 0.05

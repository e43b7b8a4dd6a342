"""Runs of grpo, rloo and ppo: sampled answers, exact resume, devices, uninformative groups, unusable prompts."""

import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
import tiny

import jaxtune as jt
from jaxtune import data, parallel
from jaxtune.config import MeshConfig, load_config
from jaxtune.convert import heads
from jaxtune.convert.load import open_model
from jaxtune.data.rollout_prompts import Layout
from jaxtune.errors import ConfigError, DataError
from jaxtune.model import decoder
from jaxtune.objectives import OBJECTIVES
from jaxtune.peft import compose, init_adapter
from jaxtune.peft.lora_init import on_original_base
from jaxtune.rewards import RewardError, find_rewards
from jaxtune.rollout import Rollouts, _shuffled
from jaxtune.runlog import RunLog
from jaxtune.startup import load_for_training
from jaxtune.step import init_state, make_step
from jaxtune.train import save_result, train

WORDS = "one two three hello there fox dog quick".split()


def low(completion_ids):
    """Higher for tokens of the vocabulary's first half: something that a few steps can teach."""
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    tiny.write_chat_model(folder / "model", tiny.LLAMA | {"num_hidden_layers": 1})
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {word}.", "answer": word}) + "\n" for word in WORDS))
    turns = ({"prompt": [{"role": "user", "content": f"Say {word}."}], "answer": word} for word in WORDS)
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """Make a config: LoRA, eight answers per step, two per prompt."""

    def make(**changes):
        rows = {"train": str(folder / "rows.jsonl"), "max_length": 32, "cache_dir": str(folder / "cache")} | changes.pop("data", {})
        return {
            "model": str(folder / "model"), "objective": "grpo", "output_dir": str(tmp_path / "run"), "data": rows, "lora": {"r": 4},
            "max_steps": 4, "per_device_train_batch_size": 1, "num_generations": 2, "max_completion_length": 8, "learning_rate": 1e-2,
            "logging_steps": 1, "compilation_cache": False, "save_steps": 100,
        } | changes  # fmt: skip

    return make


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_raises_the_reward_and_leaves_its_folder(config, folder, tmp_path):
    rows = {"eval": str(folder / "rows.jsonl")}
    keys = {"per_device_train_batch_size": 4, "num_generations": 8, "lr_scheduler_type": "constant", "log_completions": True, "data": rows}
    train(config(max_steps=25, eval_steps=25, **keys), reward_funcs=[low])
    log = metrics(tmp_path / "run")
    steps = [row for row in log if "loss" in row]
    rewards = [row["reward"] for row in steps]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1, rewards
    assert {
        "reward_std", "rewards/low/mean", "rewards/low/std", "frac_reward_zero_std", "completions/mean_length", "entropy", "grad_norm",
        "completions/clipped_ratio", "completions/mean_terminated_length", "clip_ratio/region_mean", "num_tokens", "learning_rate",
    } <= steps[0].keys()  # fmt: skip
    assert "eval_reward" in log[-1] or "eval_reward" in log[-2]
    told = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(told) == 25 * 32 and told[0]["step"] == 1 and told[-1].keys() == {"step", "prompt", "completion", "rewards", "advantage"}
    assert {"adapter", "reward.png", "loss.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "run" / "rollouts").exists()  # one step per rollout: nothing needs to be kept


def test_the_loss_log_holds_no_text(config, tmp_path):
    ended = train(config(max_steps=1), reward_funcs=[lambda completions: [0.0] * len(completions)])
    assert not (tmp_path / "run" / "completions.jsonl").exists()
    assert all(not leaf.any() for path, leaf in _leaves(ended.trainable) if path.endswith(".b")), "equal rewards have taught something"
    row = metrics(tmp_path / "run")[0]
    assert row["grad_norm"] == 0 and row["loss"] == 0 and row["frac_reward_zero_std"] == 1 and row["entropy"] > 0


TWO_MINI_BATCHES = {"per_device_train_batch_size": 2, "num_mini_batches": 2}


def _leaves(tree):
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    ("after", "keys"),
    [
        # two slices of a rollout, each used twice: stopped when the weights that sampled the answers are gone
        (2, {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "max_steps": 6}),
        (1, {"objective": "rloo", "method": "full", "data": {"shared_prompts": False}}),  # a rollout for each step
        # mini-batches that differ each time
        (3, {"objective": "ppo", "lora": {"r": 4, "lora_dropout": 0.2}, "num_ppo_epochs": 2, "max_steps": 6} | TWO_MINI_BATCHES),
    ],
)
def test_a_signal_saves_and_resume_is_exact(config, tmp_path, monkeypatch, after, keys):
    """Law 5, for batches that depend on weights."""
    settings = config(**keys)
    whole = train(settings | {"output_dir": str(tmp_path / "whole")}, reward_funcs=[low])
    advance = RunLog.advance

    def stop(self, step, *args):
        advance(self, step, *args)
        if step == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", stop)
    part = train(settings, reward_funcs=[low])
    assert after <= part.step < settings["max_steps"] and part.interrupted
    monkeypatch.undo()
    resumed = train(settings | {"resume": True}, reward_funcs=[low])
    for left, right in zip(jax.tree.leaves(whole.trainable), jax.tree.leaves(resumed.trainable), strict=True):
        np.testing.assert_array_equal(left, right)
    logs = [metrics(tmp_path / name) for name in ("whole", "run")]
    timeless = [[{key: value for key, value in row.items() if key != "tokens_per_second"} for row in log] for log in logs]
    assert timeless[0] == timeless[1]
    assert max(row["grad_norm"] for row in logs[0]) > 0
    kept = [int(path.stem) for path in (tmp_path / "whole" / "rollouts").glob("*.npz")]
    assert all(number >= settings["max_steps"] // 4 for number in kept)  # from the last checkpoint on, and not those before it


# ---- a rollout by itself ----


def rollouts(folder, mesh, rewards=(low,), **keys):
    """(rollouts, state, base) of a random adapter, on a mesh."""
    run = load_config(keys | {"model": str(folder / "model")})
    model = heads.attach_value(run, jt.load(folder / "model"), [], mesh)
    adapter = init_adapter(jax.random.key(1), model, run.lora)
    adapter = jax.device_put(adapter, parallel.trainable_shardings(mesh, model.config, adapter))
    base = jax.device_put(model.params, parallel.param_shardings(mesh, model.config, model.params))
    rows = data.load(run, model.tokenizer, parallel.data_parallel(mesh))
    made = Rollouts(run, model, mesh, rows, find_rewards(run, rewards), folder, 10)
    return made, init_state(adapter, optax.sgd(1.0), 0), base


def test_devices_draw_and_judge_the_same(config, folder):
    """Law 4: eight devices with one answer each, and one device with eight."""
    found = []
    for devices, each in ((1, 8), (8, 1)):
        mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:devices])
        made, state, base = rollouts(folder, mesh, **config(per_device_train_batch_size=each, num_iterations=2, beta=0.1))
        batch, told = made._draw(0, 0, state, base)
        step = jax.jit(make_step(made.config, made.model.config, OBJECTIVES["grpo"], optax.sgd(1.0), mesh=mesh))
        moved = state.replace(trainable=jax.tree.map(lambda x: x * 1.01, state.trainable))  # so that ratios are not 1
        after, measured = step(moved, base, parallel.put(jax.tree.map(lambda x: x[0], batch), mesh))
        change = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.trainable, moved.trainable)
        found.append((batch, told, change, {name: float(value) for name, value in measured.items()}))
    (one, said, change, measured), (many, same, other, again) = found
    assert max(np.abs(x).max() for x in jax.tree.leaves(change)) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), change, other)
    assert measured.pop("tokens") < again.pop("tokens")  # shared prompts are computed once
    assert measured == pytest.approx(again, abs=1e-4)
    assert one.tokens.shape[-2] == 4 and many.tokens.shape[-2] == 8  # two answers share a prompt's row, or each has its own
    assert said == pytest.approx(same)
    largest, drawn = (x.replace(capacity=None) for x in (made.train.largest(), jax.tree.map(lambda x: x[0], many)))
    assert jax.tree.structure(largest) == jax.tree.structure(drawn)
    assert all(a.shape[:2] == b.shape[:2] and a.shape >= b.shape for a, b in zip(*map(jax.tree.leaves, (largest, drawn)), strict=True))
    order = [np.sort(x.rollout.old_logps[x.weights > 0]) for x in (one, many)]
    np.testing.assert_allclose(*order, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.answers.values.ravel(), many.answers.values.ravel(), atol=1e-5)


def test_rloo_takes_the_reference_into_the_reward(config, folder):
    """`advantage = r - beta log(p / p_ref)` minus the mean of that over the other answers; on the base itself there is no difference."""
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    made, state, base = rollouts(folder, mesh, **config(objective="rloo", beta=0.5, per_device_train_batch_size=8))
    moved = state.replace(trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
    batch, told = made._draw(0, 0, moved, base)
    assert batch.rollout.ref_logps is None and abs(told["kl"]) > 1e-3
    assert jax.tree.structure(batch.replace(capacity=None)) == jax.tree.structure(made.train.largest().replace(capacity=None))
    old, ref, _ = jax.device_get(made.score(moved.trainable, base, parallel.put(jax.tree.map(lambda x: x[0], batch), mesh)))
    numbers, tokens = batch.answers.numbers[0], batch.tokens[0]
    judged = [
        [low([tokens[0, row][here].tolist()])[0] - 0.5 * (old - ref)[0, row][here].sum() for here in (numbers[0, row] == n for n in (1, 2))]
        for row in range(4)
    ]
    want = [[a - b, b - a] for a, b in judged]
    np.testing.assert_allclose(batch.answers.values[0, 0], want, rtol=1e-4, atol=1e-5)


def test_weights_cut_over_devices_draw_the_same(config, folder):
    """Eight answers on one device, and on a mesh of eight with every axis that rows and weights may be sharded over."""
    drawn = []
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        devices = jax.devices()[:1] if mesh == MeshConfig() else jax.devices()
        keys = config(per_device_train_batch_size=8 // (1 if len(devices) == 1 else 4))
        made, state, base = rollouts(folder, parallel.make_mesh(mesh, devices), **keys)
        drawn.append([answer.tokens for answer in made._answers(made.train, [0, 3, 5, 6], (1, 2), state, base)[0]])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 8 and len({tuple(tokens) for tokens in drawn[0]}) > 4


def test_what_functions_see_and_a_reward_model(config, folder):
    """Prompts of turns, the rows' columns, and a reward model beside; drawn again the answers are the same, at another step others."""
    model = heads.attach(jt.load(folder / "model"), heads.Head(("reward",)), jax.random.key(0))
    jt.save(model.config, model.params, folder / "judge", tokenizer=model.tokenizer)
    seen = {}

    def f(prompts, completions, completion_ids, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [float(len(ids)) for ids in completion_ids]

    rows = {"train": str(folder / "chat.jsonl"), "max_length": 128}
    keys = config(data=rows, reward_model=str(folder / "judge"), per_device_train_batch_size=8)
    made, state, base = rollouts(folder, parallel.make_mesh(MeshConfig(), jax.devices()[:1]), [f], **keys)
    batch, told = made._draw(0, 0, state, base)
    assert seen["prompts"][0] == seen["prompts"][1] == [{"role": "user", "content": f"Say {seen['answer'][0]}."}]
    assert [len(said) for said in seen["completions"]] == [1] * 8 and seen["completions"][0][0]["role"] == "assistant"
    assert told["rewards/judge/std"] > 0 and told["reward"] == pytest.approx(told["rewards/f/mean"] + told["rewards/judge/mean"])
    text = made.reader.tokenizer.decode(batch.tokens[0, 0][batch.segments[0, 0] == 1])
    assert text.endswith("<|im_start|>assistant\n") and f"Say {seen['answer'][0]}." in text
    drawn = [made._draw(number, number, state, base)[0].tokens for number in (0, 1)]
    np.testing.assert_array_equal(drawn[0], batch.tokens)
    assert drawn[1].shape != batch.tokens.shape or (drawn[1] != batch.tokens).any()


def test_answers_are_drawn_from_the_policy(config, folder):
    """Where the policy is moved, other answers come; log-probabilities are those of `temperature`."""
    import jax.numpy as jnp

    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    made, state, base = rollouts(folder, mesh, **config(per_device_train_batch_size=8, num_iterations=2, temperature=0.5))
    moved = state.replace(trainable=jax.tree.map(lambda x: x + 0.3, state.trainable))
    batch = made._draw(0, 0, moved, base)[0]
    assert (batch.tokens.shape != made._draw(0, 0, state, base)[0].tokens.shape) or (
        batch.tokens != made._draw(0, 0, state, base)[0].tokens
    ).any()
    row = jax.tree.map(lambda x: x[0, 0, 0], batch)
    first = row.segments == 2  # the first answer; its prompt is segment 1
    document = np.concatenate([row.tokens[row.segments == 1], row.tokens[first]])
    logits = decoder.forward(made.model.config, compose(base, moved.trainable), jnp.asarray(document[None]))[0] / 0.5
    count = int(first.sum())
    logp = jax.nn.log_softmax(logits)[-count - 1 : -1][np.arange(count), document[-count:]]
    np.testing.assert_allclose(row.rollout.old_logps[first], logp, rtol=1e-4, atol=1e-4)


# ---- values ----


def test_values_and_returns_of_tokens(config, folder):
    """Of drawn answers in rows of two: the values are those of the tokens before, returns with lam 1 the KL's share and score to come."""
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])
    keys = config(objective="ppo", per_device_train_batch_size=8, lam=1.0, kl_coef=0.3, missing_eos_penalty=0.25, num_mini_batches=2)
    made, state, base = rollouts(folder, mesh, **keys)
    moved = state.replace(trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
    batch, told = made._draw(0, 0, moved, base)
    assert jax.tree.structure(jax.tree.map(lambda x: x[0], batch).replace(capacity=None)) == jax.tree.structure(
        made.train.largest().replace(capacity=None)
    )
    scored, params = made._scored(batch, moved, base), compose(base, moved.trainable)
    ends = made.reader.stop_tokens
    states_of = jax.jit(lambda tokens: decoder.hidden(made.model.config, params, tokens).hidden_BTD)
    for row in np.ndindex(batch.tokens.shape[:3]):
        one = jax.tree.map(lambda x: x[row], batch)  # noqa: B023
        for number in (1, 2):
            here = one.answers.numbers == number
            answer, prompt = one.tokens[here], one.tokens[one.segments == 1]
            document = np.concatenate([prompt, answer])
            states = states_of(np.pad(document, (0, 48 - len(document)))[None])[0, len(prompt) - 1 : len(document) - 1]
            np.testing.assert_allclose(one.rollout.values[here], decoder.values(params, states), rtol=1e-4, atol=1e-5)
            rewards = -0.3 * (scored.old - scored.ref)[row][here].astype(float)
            rewards[-1] += low([answer.tolist()])[0] - 0.25 * (answer[-1] not in ends)
            np.testing.assert_allclose(one.rollout.returns[here], np.cumsum(rewards[::-1])[::-1], rtol=1e-4, atol=1e-4)
    spread = batch.rollout.advantages[batch.weights > 0]
    assert abs(spread.mean()) < 1e-5 and spread.std(ddof=1) == pytest.approx(1, abs=1e-5) and abs(told["objective/kl"]) > 1e-3
    made._current = (0, batch, {})
    epochs = [[made.batch_at(2 * epoch + part, moved, base)[0].tokens for part in (0, 1)] for epoch in (0, 1)]
    assert np.shape(epochs) == (2, *batch.tokens.shape) and (np.array(epochs[0]) != epochs[1]).any()
    np.testing.assert_array_equal(*(np.sort(np.reshape(epoch, (-1, batch.tokens.shape[-1])), axis=0) for epoch in epochs))


def test_mini_batches_are_the_same_on_any_devices(config):
    """Law 4: rows of two answers on one device, or of one answer on each of eight, are shuffled to the same halves."""
    found = []
    for each, devices in ((16, 1), (2, 8)):
        layout = Layout(load_config(config(objective="ppo") | TWO_MINI_BATCHES | {"per_device_train_batch_size": each}), devices)
        answers = [[50 + n] for n in range(16)]
        batch = layout.batches([[n + 3] for n in range(8)], answers, np.zeros(16), np.ones(16, bool), 1)
        mixed = _shuffled(batch, layout.prompts, (0, 1))
        found.append([sorted(mixed.tokens[half][mixed.weights[half] > 0].tolist()) for half in (0, 1)])
    assert found[0] == found[1] and max(found[0][0]) > 57  # not simply the first eight


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_value_head_is_kept_beside_what_is_trained_and_gone_on_with(config, folder, tmp_path, method):
    """PEFT's and transformers' files are those of a language model; a run that goes on from them has the head again."""
    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:1])

    def begun(**keys):
        run = load_config(config(objective="ppo", method=method) | keys)
        return load_for_training(run, open_model(run.model), mesh)

    model, trainable = begun()
    trainable = jax.tree.map(lambda x: x + 0.25, trainable)
    run = load_config(config(objective="ppo", output_dir=str(tmp_path)))
    out = save_result(run, model, trainable, tmp_path)
    assert "value" not in jt.load(out if method == "full" else folder / "model").params
    if method == "lora":
        plain = jt.load_adapter(out, jt.load(folder / "model"))
        assert plain.wholes == () and plain.params.keys() == trainable.params.keys()
        assert on_original_base(model.config, trainable, trainable).saved == trainable.saved  # PiSSA's last step is of pairs alone
    (_, again) = begun(model=str(out)) if method == "full" else begun(init_adapter=str(out))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, (again, trainable)))
    assert (compose(model.params, again)["value"] == 0.25).all()


# ---- what cannot be ----


def test_a_reward_function_that_fails_stops_the_run(config, tmp_path):
    def bad(completions):
        return [1.0]

    with pytest.raises(RewardError, match="the reward function bad must return a list with one number, or None, for each of the 8 answers"):
        train(config(), reward_funcs=[bad])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "needs a reward, and none is named"),
        ({"reward_funcs": ["f1"], "num_generations": 3}, "do not make whole groups of num_generations"),
        ({"reward_funcs": ["f1"], "num_generations": 1}, "num_generations is 1, but has to be at least 2"),
        ({"reward_funcs": ["f1"], "temperature": 0}, "temperature is 0, but has to be above 0"),
        ({"reward_funcs": ["f1"], "max_completion_length": 300}, "max_position_embeddings is 256; lower max_completion_length"),
        ({"reward_funcs": ["f1"], "loss_type": "cispo"}, "write epsilon_high: 5.0"),
        ({"reward_funcs": ["f1"], "steps_per_generation": 3, "gradient_accumulation_steps": 2}, "has to be a multiple of gradient_accumul"),
        ({"objective": "sft", "reward_funcs": ["f1"]}, "is a key of objective (stepwise_reward or )?grpo or rloo or ppo"),
        ({"objective": "ppo", "reward_funcs": ["f1"], "method": "prompt_tuning"}, "prompt_tuning trains no value head; write method: lora"),
    ],
)
def test_what_the_keys_may_not_be(config, keys, said):
    with pytest.raises((ConfigError, DataError), match=said):
        train(config(**keys))


def test_rows_that_are_no_prompts(config, folder):
    (folder / "other.jsonl").write_text('{"text": "one two"}\n')
    with pytest.raises(DataError, match="the field 'prompt' is missing"):
        train(config(reward_funcs=["f1"], data={"train": str(folder / "other.jsonl")}))

"""PPO: TRL's numbers (goldens), token advantages by definition, and rows in which answers share a prompt."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ppo_cases as cases
import pytest
import tiny

from jaxtune.config import load_config
from jaxtune.data.batch import Rollout
from jaxtune.data.rollout_prompts import Layout
from jaxtune.errors import ConfigError
from jaxtune.model import decoder
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.advantages import ppo

GOLDEN = np.load(Path(__file__).parent.parent / "goldens" / "objectives" / "ppo.npz")


@pytest.mark.parametrize("name", cases.CASES)
def test_value_and_gradient_are_trls(name):
    loss, gradient, _ = cases.ours(name, {key: GOLDEN[f"{name}/{key}"] for key in cases.given(name)})
    assert loss == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], rtol=1e-5, atol=1e-6)
    assert np.abs(GOLDEN[f"{name}/gradient"]).max() > 1e-3


# ---- advantages ----


def run(**keys):
    return load_config({"model": "none", "objective": "ppo", "max_completion_length": 4, "num_generations": 4} | keys)


@pytest.mark.parametrize("keys", [{"gamma": 0.9, "lam": 0.7}, {"lam": 0.0}, {"lam": 1.0, "kl_coef": 0.5}])
def test_advantages_are_sums_of_what_was_not_expected(keys):
    """`sum_k (gamma lam)^k (r_t+k + gamma V_t+k+1 - V_t+k)`, written out; for lam 1 the return is the sum of the future rewards."""
    config, x = run(**keys), cases.given("k1")
    lengths = x["mask"].sum(1)
    found = ppo(config, x["scores"], lengths, x["old"], x["ref"], x["values"])
    raw = []
    for n, length in enumerate(lengths):
        reward = config.kl_coef * (x["ref"] - x["old"])[n, :length]
        reward[-1] += x["scores"][n]
        expected = np.append(x["values"][n, :length], 0.0)
        surprise = reward + config.gamma * expected[1:] - expected[:-1]
        for t in range(length):
            advantage = sum((config.gamma * config.lam) ** k * surprise[t + k] for k in range(length - t))
            raw.append(advantage)
            assert found.returns[n, t] == pytest.approx(advantage + expected[t])
            if config.lam == 1:
                assert found.returns[n, t] == pytest.approx(reward[t:].sum())
    np.testing.assert_allclose(found.advantages[x["mask"]], (raw - np.mean(raw)) / np.std(raw, ddof=1), rtol=1e-6)
    assert not found.advantages[~x["mask"]].any() and not found.returns[~x["mask"]].any()


# ---- a whole batch ----

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
ANSWERS = [[11, 12, 2], [13, 2], [14, 15, 16, 17], [18], [19, 20], [21, 22, 23, 2], [24, 2], [25, 26, 27]]


def test_answers_that_share_a_prompt_are_learnt_from_as_documents_apart():
    """Loss and gradient of rows of four answers equal those computed document by document, at temperature 0.7."""
    config = run(per_device_train_batch_size=8, temperature=0.7, vf_coef=0.3, kl_coef=0.0)
    model_config = from_hf(tiny.LLAMA | {"num_hidden_layers": 1})
    model_config = model_config.__class__(**vars(model_config) | {"value_head": True})
    params = init_params(jax.random.key(0), model_config)
    params["value"] = jax.random.normal(jax.random.key(1), params["value"].shape) * 0.3
    batch = Layout(config, 1).batches(PROMPTS, ANSWERS, np.zeros(8), np.ones(8, bool), 5)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), batch)
    rng, there = np.random.default_rng(0), np.asarray(batch.answers.numbers) > 0
    of_tokens = rng.normal(0, 1, (4, there.sum())).astype(np.float32)  # log-ratio to the sampling policy, advantage, return, old value

    documents = [PROMPTS[number // 4] + answer for number, answer in enumerate(ANSWERS)]
    tokens = jnp.asarray([document + [0] * (9 - len(document)) for document in documents])
    mask = np.array([[len(d) - len(a) <= t < len(d) for t in range(9)] for d, a in zip(documents, ANSWERS, strict=True)])[:, 1:]

    def logps_and_values(params):
        states = decoder.hidden(model_config, params, tokens).hidden_BTD[:, :-1]
        logps = jax.nn.log_softmax(decoder.logits(model_config, params, states) / 0.7)
        return jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0][mask], decoder.values(params, states)[mask]

    old = jax.jit(logps_and_values)(params)[0] + 0.2 * of_tokens[0]

    def by_hand(params):
        (logps, values), (_, advantages, returns, before) = logps_and_values(params), of_tokens
        ratio, near = jnp.exp(logps - old), jnp.clip(values, before - 0.2, before + 0.2)
        policy = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        return (policy + 0.15 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)).mean()

    def placed(x):
        out = np.zeros(there.shape, np.float32)
        out[there] = x
        return jnp.asarray(out)

    rollout = Rollout(batch.rollout.tokens, placed(old), None, *map(placed, of_tokens[1:]))

    def by_rows(params):
        made = OBJECTIVES["ppo"](config, model_config, params, {}, batch.replace(rollout=rollout))
        return made.total / made.weight

    (want, wanted), (found, gradient) = (jax.jit(jax.value_and_grad(of))(params) for of in (by_hand, by_rows))
    assert found == pytest.approx(float(want), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6), gradient, wanted)
    assert np.abs(gradient["value"]).max() > 1e-3


# ---- layout ----


@pytest.mark.parametrize(
    ("each", "accumulation", "mini_batches", "shape"),
    [(8, 1, 1, (1, 1, 8)), (8, 1, 2, (2, 1, 4)), (2, 4, 2, (2, 2, 2)), (4, 2, 4, (4, 1, 2)), (8, 3, 2, (2, 3, 4))],
)
def test_a_drawing_is_cut_into_mini_batches(each, accumulation, mini_batches, shape):
    """TRL's batch is the rollout, whatever it is split into: each * accumulation answers."""
    config = run(per_device_train_batch_size=each, gradient_accumulation_steps=accumulation, num_mini_batches=mini_batches)
    layout = Layout(config, 1)
    assert layout.prompts * 4 == each * accumulation and layout.repeats == 4 * mini_batches
    assert (layout.slices, layout.micro_batches, layout.rows * layout.together) == shape


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_mini_batches": 3}, r"num_mini_batches is 3, but has to divide .* = 8 \* 1"),
        ({"num_generations": 0}, "num_generations is 0, but has to be at least 1"),
        ({"lam": 1.5}, "lam is 1.5, but has to be at most 1"),
        ({"cliprange": 0.0}, "cliprange is 0, but has to be above 0"),
        ({"beta": 0.1}, "beta is a key of objective .*grpo"),
        ({"kl_coef": 0.0, "sync_ref_model": True}, "write kl_coef above 0"),
        ({"objective": "grpo", "vf_coef": 0.2}, "vf_coef is a key of objective ppo"),
    ],
)
def test_what_the_keys_may_not_be(keys, said):
    with pytest.raises(ConfigError, match=said):
        run(**keys)


def test_defaults_are_trls():
    config = load_config({"model": "none", "objective": "ppo", "method": "full"})
    assert (config.learning_rate, config.temperature, config.num_generations, config.kl_coef) == (3e-6, 0.7, 1, 0.05)

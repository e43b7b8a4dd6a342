"""GRPO and RLOO: TRL's numbers (goldens), the policy gradient, and rows in which answers share a prompt."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import policy_cases as cases
import pytest
import tiny

from jaxtune.config import load_config
from jaxtune.config.objectives import LOSS_TYPES
from jaxtune.data.batch import Rollout
from jaxtune.data.rollout_prompts import Layout, bucket
from jaxtune.errors import ConfigError
from jaxtune.model import decoder
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params
from jaxtune.objectives import OBJECTIVES
from jaxtune.objectives.advantages import ADVANTAGES, spread
from jaxtune.objectives.grpo import LOSSES, SampledAnswers, grpo_loss, logps_of

GOLDEN = np.load(Path(__file__).parent.parent / "goldens" / "objectives" / "policy.npz")
KEYS = ("logps", "old", "ref", "entropy", "advantages", "mask")


@pytest.mark.parametrize("name", cases.CASES)
def test_value_and_gradient_are_trls(name):
    loss, gradient, _ = cases.ours(name, {key: GOLDEN[f"{name}/{key}"] for key in KEYS})
    assert loss == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], rtol=1e-5, atol=1e-6)


def test_the_config_knows_every_loss_of_the_table():
    tried = {name for case in cases.CASES for name in cases.config(case).loss_type}
    assert {*LOSS_TYPES["grpo"], *LOSS_TYPES["rloo"]} == set(LOSSES) == tried


# ---- whole batches ----

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
ANSWERS = [[11, 12, 2], [13, 2], [14, 15, 16, 17], [18], [19, 20], [21, 22, 23, 2], [24, 2], [25, 26, 27]]
ADVANTAGE = np.array([1.0, -0.5, 0.25, -0.75, 0.5, 0.3, -1.0, 0.2])


def run(**keys):
    return load_config(
        {"model": "none", "objective": "grpo", "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4} | keys
    )


@pytest.fixture(scope="module")
def model():
    config = from_hf(tiny.LLAMA | {"num_hidden_layers": 1})
    return config, init_params(jax.random.key(0), config)


def batch_of(config, advantages=ADVANTAGE):
    batch = Layout(config, 1).batches(PROMPTS, ANSWERS, advantages, np.ones(len(ANSWERS), bool), max(map(len, PROMPTS)))
    return jax.tree.map(lambda x: jnp.asarray(x[0, 0]), batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(config, model_config, params, base, batch):
    def loss(params):
        made = OBJECTIVES[config.objective](config, model_config, params, base, batch)
        return made.total / made.weight

    return jax.value_and_grad(loss)(params)


def value_and_gradient(config, model, batch, base=None):
    value, gradient = compiled(config, model[0], model[1], model[1] if base is None else base, batch)
    return float(value), gradient


def assert_like(tree, other, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), tree, other)


def test_shared_prompts_change_nothing(model):
    shared, apart = (batch_of(run(data={"shared_prompts": share})) for share in (True, False))
    assert shared.tokens.shape[0] == 2 and apart.tokens.shape[0] == 8 and shared.parents is not None and apart.parents is None
    (a, grad), (b, other) = value_and_gradient(run(), model, shared), value_and_gradient(run(), model, apart)
    assert a == pytest.approx(b, abs=1e-6)
    assert_like(grad, other)


@pytest.fixture(scope="module")
def policy_gradient(model):
    """`sum_i c_i sum_t grad log p(y_it)`, each document in its own row, at temperature 0.7."""
    documents = [PROMPTS[number // 4] + answer for number, answer in enumerate(ANSWERS)]
    tokens = np.array([document + [0] * (9 - len(document)) for document in documents])
    mask = np.array([[len(d) - len(a) <= t < len(d) for t in range(9)] for d, a in zip(documents, ANSWERS, strict=True)])

    def total(params, c):
        logits = decoder.forward(model[0], params, jnp.asarray(tokens))[:, :-1] / 0.7
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        return (c[:, None] * logp * mask[:, 1:]).sum()

    return jax.jit(jax.grad(total))


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_on_policy_it_is_the_policy_gradient(model, policy_gradient, loss_type):
    """`-mean_i A_i mean_t grad log p(y_it)`; cispo's mean is over the tokens of all answers."""
    lengths = np.array([len(a) for a in ANSWERS])
    sizes = {"grpo": 8 * lengths, "cispo": np.full(8, lengths.sum())}[loss_type]
    config = run(loss_type=loss_type, temperature=0.7, epsilon_high=5.0)
    ours = value_and_gradient(config, model, batch_of(config))[1]
    assert_like(ours, policy_gradient(model[1], jnp.asarray(-ADVANTAGE / sizes)))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_without_answers_teaches_nothing(loss_type):
    """The last rollout of an epoch may have too few prompts for all of its steps."""
    config = run(objective="rloo") if loss_type == "rloo" else run(loss_type=loss_type, epsilon_high=5.0)
    of_answers, of_tokens = jnp.zeros((1, 2)), jnp.zeros((1, 4))
    nobody = SampledAnswers(of_tokens, of_tokens, jnp.zeros((1, 2, 4), bool), of_answers, of_answers, of_answers, of_tokens)
    loss = grpo_loss(config, nobody)
    assert loss.total / loss.weight == 0


def test_equal_entropies_at_the_quantile_are_above_it():
    """As for the first tokens of answers to one prompt; the quantile itself, in float32, may be a rounding error above these."""
    entropy = jnp.array([[10.0] * 10 + [10.698092] * 4 + [11.0] * 5], jnp.float32)
    one = jnp.ones((1, 1))

    def loss(logp):
        made = SampledAnswers(logp, entropy, jnp.ones((1, 1, 19), bool), one, one, 19 * one)
        return grpo_loss(run(top_entropy_quantile=0.4), made).total

    taught = jax.jit(jax.grad(loss))(-entropy)[0] != 0
    np.testing.assert_array_equal(taught, [False] * 10 + [True] * 9)


def test_equal_rewards_teach_nothing(model):
    rewards = np.full((8, 1), 0.7)
    found = ADVANTAGES["grpo"](run(), rewards, np.ones(1), 4)
    assert not found.advantages.any()
    _, gradient = value_and_gradient(run(), model, batch_of(run(), found.advantages))
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_kl_term_is_that_of_the_reference(model):
    """Without advantages the loss is beta times the KL estimate; log-probabilities computed beforehand give the same."""
    config, reference = run(beta=0.5, loss_type="grpo"), init_params(jax.random.key(1), model[0])
    batch = batch_of(config, np.zeros(8))
    value, gradient = value_and_gradient(config, model, batch, reference)
    assert value > 1e-3
    found = jax.jit(lambda batch: logps_of(config, model[0], reference, batch))(batch)
    known = jnp.zeros(batch.tokens.shape).at[jnp.arange(2)[:, None], found.index_BN].set(found.logp_BN)
    before = batch.replace(rollout=Rollout(batch.rollout.tokens, None, known))
    again, same = value_and_gradient(config, model, before)
    assert value == pytest.approx(again, rel=1e-6)
    assert_like(gradient, same)
    assert value_and_gradient(config, model, batch)[0] == 0  # the policy is its own reference


def test_the_kl_of_rloo_is_in_the_reward_alone(model):
    """A batch with the reference's log-probabilities gives the same loss and gradient as one without."""
    batch = batch_of(run(objective="rloo"))
    old = jnp.where(batch.weights > 0, -4.5, 0.0)
    (a, grad), (b, other) = (
        value_and_gradient(run(objective="rloo", beta=0.5), model, batch.replace(rollout=Rollout(batch.rollout.tokens, old, ref)))
        for ref in (None, old - 1)
    )
    assert a == b and abs(a) > 1e-3
    assert_like(grad, other)


# ---- layout ----


@pytest.mark.parametrize(
    ("each", "devices", "accumulation", "together", "shape"),
    [(8, 1, 1, 4, (1, 1, 2)), (2, 2, 2, 2, (1, 2, 2)), (1, 8, 1, 1, (1, 1, 8)), (6, 2, 2, 2, (1, 2, 6)), (4, 1, 3, 4, (1, 3, 1))],
)
def test_rows_of_a_rollout(each, devices, accumulation, together, shape):
    config = run(per_device_train_batch_size=each, gradient_accumulation_steps=accumulation)
    layout = Layout(config, devices)
    count = each * devices * accumulation
    assert layout.together == together and layout.prompts * 4 == count
    prompts, answers = [[3, 4]] * layout.prompts, [[n + 5] for n in range(count)]
    batch = layout.batches(prompts, answers, np.arange(count) + 1.0, np.ones(count, bool), 2)
    assert batch.tokens.shape[:3] == shape and (batch.weights.sum() == count) and batch.answers.values.sum() == count * (count + 1) / 2
    assert sorted(batch.tokens[batch.weights > 0]) == [n + 5 for n in range(count)]


def test_answers_that_do_not_make_groups():
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size \(3\).* = 3 answers, which do not make whole groups"):
        Layout(run(per_device_train_batch_size=3), 1)


def test_few_lengths():
    assert [bucket(n) for n in (1, 33, 49, 65, 97, 129, 1000)] == [32, 48, 64, 96, 128, 192, 1024]


def test_leave_one_out():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 1.0, np.nan, 2.0])[:, None]
    found = ADVANTAGES["rloo"](run(objective="rloo"), rewards, np.array([2.0]), 4)
    np.testing.assert_allclose(found.advantages, [4 / 3, -4 / 3, -4 / 3, 4 / 3, 3, -3, 0, 0], atol=1e-12)
    kl = np.array([10.0, 0, 0, 0, 0, 0, 0, 0])
    with_kl = ADVANTAGES["rloo"](run(objective="rloo", beta=0.1), rewards, np.array([2.0]), 4, kl)
    np.testing.assert_allclose(with_kl.advantages[:2], [4 / 3 - 1, -4 / 3 + 1 / 3], atol=1e-12)
    assert spread(np.array([1.0, np.nan, 3.0])) == pytest.approx(2**0.5)

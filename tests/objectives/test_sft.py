"""SFT: the loss from the full logits, noise only in training, the routers' loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune.data.batch import Batch
from jaxtune.model.decoder import forward, hidden
from jaxtune.model.families import from_hf
from jaxtune.model.moe import load_balancing_loss
from jaxtune.objectives.sft import sft

TOKENS = np.random.default_rng(0).integers(0, 90, (2, 9)).astype(np.int32)
WEIGHTS = np.ones((2, 9), np.float32)
WEIGHTS[:, :3] = 0
BATCH = Batch(TOKENS, WEIGHTS, np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)), np.ones((2, 9), np.int32))


def settings(**keys):
    return types.SimpleNamespace(**{"neftune_noise_alpha": None, "router_aux_loss_coef": 0.0, "loss_type": None} | keys)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def model(request):
    golden = references.load(request.param)
    config = from_hf(golden.config)
    return config, references.tree(config, golden.tensors)


def test_loss_is_the_mean_over_trained_tokens(model):
    config, params = model
    out = sft(settings(), config, params, params, BATCH)
    logp = jax.nn.log_softmax(forward(config, params, TOKENS)[:, :-1])
    nll = -jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1)[..., 0] * WEIGHTS[:, 1:]
    np.testing.assert_allclose(out.total / out.weight, nll.sum() / WEIGHTS.sum(), rtol=1e-5)


def test_dft_weighs_each_token_by_its_own_probability(model):
    """TRL's `dft_loss`: `-(p log p)` with the first p detached, so the gradient is that of p."""
    config, params = model
    logp = jax.nn.log_softmax(forward(config, params, TOKENS)[:, :-1])
    p = jnp.exp(jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1)[..., 0]) * WEIGHTS[:, 1:]
    total, grads = jax.value_and_grad(lambda params: sft(settings(loss_type=("dft",)), config, params, params, BATCH).total)(params)
    np.testing.assert_allclose(total, -(p * jnp.log(jnp.where(p > 0, p, 1))).sum(), rtol=1e-5)

    def likelihood(params):
        logp = jax.nn.log_softmax(forward(config, params, TOKENS)[:, :-1])
        return -(jnp.exp(jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1)[..., 0]) * WEIGHTS[:, 1:]).sum()

    np.testing.assert_allclose(grads["norm"], jax.grad(likelihood)(params)["norm"], rtol=1e-3, atol=1e-6)


def test_noise_is_for_training(model):
    config, params = model
    quiet = sft(settings(), config, params, params, BATCH).total
    noisy = settings(neftune_noise_alpha=5.0)
    assert sft(noisy, config, params, params, BATCH).total == quiet
    one, again, other = (sft(noisy, config, params, params, BATCH, jax.random.key(seed)).total for seed in (0, 0, 1))
    assert one == again != other and one != quiet


def test_noise_is_of_the_longest_row(model, monkeypatch):
    """`alpha / sqrt(L D)`, with L the tokens of the batch's longest row, however far the data's rows are padded."""
    config, params = model
    names = "tokens", "weights", "positions", "segments"
    padded = BATCH.replace(**{name: np.pad(getattr(BATCH, name), ((0, 0), (0, 9))) for name in names})
    bounds = []
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype, low, high: bounds.append(float(high)) or jnp.zeros(shape, dtype))
    for batch in (BATCH, padded):
        sft(settings(neftune_noise_alpha=5.0), config, params, params, batch, jax.random.key(0))
    longest = (np.asarray(BATCH.segments) > 0).sum(axis=1).max()
    np.testing.assert_allclose(bounds, 5 / np.sqrt(longest * config.hidden_size), rtol=1e-5)


def test_the_routers_loss_is_added(model):
    config, params = model
    plain, added = (sft(settings(router_aux_loss_coef=coef), config, params, params, BATCH) for coef in (0.0, 0.5))
    aux = hidden(config, params, TOKENS, BATCH.positions, BATCH.segments).aux
    expected = 0.0 if aux is None else 0.5 * load_balancing_loss(aux)
    np.testing.assert_allclose((added.total - plain.total) / plain.weight, expected, atol=1e-5)
    assert (aux is None) == (config.moe is None) == ("aux_loss" not in added.metrics)
    if config.moe is not None:
        own = sft(settings(router_aux_loss_coef=None), config, params, params, BATCH)
        np.testing.assert_allclose((own.total - plain.total) / plain.weight, 2 * expected * config.moe.aux_loss_coef, atol=1e-5)

"""Log-probabilities in chunks against all logits at once: values, and gradients to hidden states, head and embedding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune.data.batch import Batch
from jaxtune.model.decoder import forward, logits, output_head
from jaxtune.model.families import from_hf
from jaxtune.model.spec import init_params
from jaxtune.objectives.logprobs import by_chunks, token_logprobs

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 96, (3, 17)).astype(np.int32)
WEIGHTS = (RNG.random((3, 17)) < 0.5).astype(np.float32) * RNG.random((3, 17)).astype(np.float32)
WEIGHTS[:, 0] = 0
BATCH = Batch(TOKENS, WEIGHTS, np.broadcast_to(np.arange(17, dtype=np.int32), (3, 17)), np.ones((3, 17), np.int32))


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request):
    tied = request.param == "tied"
    config = from_hf(tiny.LLAMA | {"tie_word_embeddings": tied, "initializer_range": 0.3})
    config = dataclasses.replace(config, head_bias=not tied)
    params = init_params(jax.random.key(0), config)
    return config, params if tied else params | {"head_bias": jax.random.normal(jax.random.key(1), (config.vocab_size,))}


def plain(config, params, batch):
    """Everything from the full logits: logp, entropy, correct, collision and mean logit of each token, `[B, T - 1]`."""
    logits = forward(config, params, batch.tokens)[:, :-1]
    logp = jax.nn.log_softmax(logits)
    target = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    probs = jnp.exp(logp)
    correct = (logp.argmax(-1) == batch.tokens[:, 1:]) * 1.0
    return target, -(probs * logp).sum(-1), correct, jnp.log(jnp.square(probs).sum(-1)), logits.mean(-1)


@pytest.mark.parametrize("chunk", [1, 6, 512])
@pytest.mark.parametrize("capacity", [None, 16])
def test_values(model, chunk, capacity):
    config, params = model
    out = token_logprobs(dataclasses.replace(config, logits_chunk=chunk), params, BATCH.replace(capacity=capacity))
    trained = np.asarray(out.weights_BN) > 0
    assert trained.sum() == (WEIGHTS > 0).sum()
    found = out.logp_BN, out.entropy_BN, out.correct_BN, out.collision_BN, out.mean_logit_BN
    for ours, full in zip(found, plain(config, params, BATCH), strict=True):
        np.testing.assert_allclose(np.asarray(ours)[trained], np.asarray(full)[WEIGHTS[:, 1:] > 0], atol=2e-5)
        assert np.all(np.asarray(ours)[~trained] == 0)
    np.testing.assert_array_equal(np.asarray(out.weights_BN)[trained], WEIGHTS[WEIGHTS > 0])


@pytest.mark.parametrize("trained", ["everything", "norm alone"])
def test_gradients(model, trained):
    """With the head trained (its gradient needs the logits again) and frozen (the derivative kept in the forward pass does)."""
    config, params = model
    config = dataclasses.replace(config, logits_chunk=6)

    def put(tree):
        return params | tree

    def ours(tree):
        out = token_logprobs(config, put(tree), BATCH)
        return jnp.tanh(out.logp_BN * out.weights_BN).sum()

    def full(tree):
        return jnp.tanh(plain(config, put(tree), BATCH)[0] * WEIGHTS[:, 1:]).sum()

    tree = params if trained == "everything" else {"norm": params["norm"]}
    left, right = jax.grad(ours)(tree), jax.grad(full)(tree)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(right))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)


def test_bfloat16_is_summed_in_float32(model):
    config, params = model
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = token_logprobs(dataclasses.replace(config, dtype="bfloat16", logits_chunk=6), low, BATCH)
    assert out.logp_BN.dtype == jnp.float32
    exact = plain(config, jax.tree.map(lambda x: x.astype(jnp.float32), low), BATCH)[0]
    trained = np.asarray(out.weights_BN) > 0
    np.testing.assert_allclose(np.asarray(out.logp_BN)[trained], np.asarray(exact)[WEIGHTS[:, 1:] > 0], atol=0.15)


def test_logits_of_untrained_places_are_never_made(model):
    """The compiled program contains no array of all positions by the vocabulary, nor of a row's by it."""
    config, params = model
    config = dataclasses.replace(config, logits_chunk=3)
    text = jax.jit(lambda p, b: token_logprobs(config, p, b).logp_BN).lower(params, BATCH.replace(capacity=5)).as_text()
    assert "3x17x96" not in text and "3x5x96" not in text and "3x1x96" not in text and "2x1x96" in text


@pytest.mark.parametrize("live", [0, 1, 7, 51])
def test_chunks_are_as_many_as_the_trained_tokens_fill(model, live):
    """However these are spread over the rows; places without a chunk are 0."""
    config, params = model
    chunks = []

    def statistics(logits, beside, fixed):
        jax.debug.callback(lambda: chunks.append(logits.shape))
        return logits[..., 0], logits

    config = dataclasses.replace(config, logits_chunk=4)
    live_BN = jnp.zeros(51).at[RNG.permutation(51)[:live]].set(1.0).reshape(3, 17)
    hidden_BND = jnp.asarray(RNG.standard_normal((3, 17, config.hidden_size)), jnp.float32)
    (first,) = by_chunks(config, statistics, output_head(params), hidden_BND, live_BN, ())
    full = logits(config, output_head(params), hidden_BND)[..., 0]
    np.testing.assert_allclose(first * live_BN, full * live_BN, atol=1e-5)
    jax.effects_barrier()
    assert len(chunks) == -(-live // 4)

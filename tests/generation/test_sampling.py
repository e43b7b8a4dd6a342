import jax
import numpy as np
import pytest

from jaxtune.errors import ConfigError
from jaxtune.generation import sampling
from jaxtune.generation.sampling import Sampling, choose, filtered


def _logits(rows=5, vocabulary=300, scale=3.0, seed=0):
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * scale).astype(np.float32)


def _softmax(logits):
    odds = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2, 17, 300, 5000])
def test_top_k_keeps_the_k_largest(k):
    logits = _logits()
    kth = np.sort(logits, axis=-1)[:, ::-1][:, min(k, 300) - 1]
    assert np.array_equal(sampling.top_k(logits, k), np.where(logits >= kth[:, None], logits, -np.inf))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, scale):
    logits = _logits(scale=scale)
    order = np.argsort(-logits, axis=-1)
    probs = np.take_along_axis(_softmax(logits), order, axis=-1)
    before = np.cumsum(probs, axis=-1) - probs
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, order, before < p, axis=-1)
    assert np.array_equal(sampling.top_p(logits, p), np.where(kept, logits, -np.inf))


@pytest.mark.parametrize("p", [1e-3, 0.1, 1.0])
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(p):
    logits = _logits()
    probs = _softmax(logits)
    assert np.array_equal(sampling.min_p(logits, p), np.where(probs >= p * probs.max(-1, keepdims=True), logits, -np.inf))


def test_equal_logits_stay_together():
    logits = np.log(np.asarray([[0.4, 0.2, 0.2, 0.2]], np.float32))
    assert np.isfinite(sampling.top_k(logits, 2)).all()
    assert np.isfinite(sampling.top_p(logits, 0.5)).all()
    assert np.isfinite(sampling.top_p(logits, 0.4)).tolist() == [[True, False, False, False]]


def test_filters_pass_over_what_is_gone_already():
    logits = np.asarray([[2.0, -np.inf, 1.0, -np.inf]], np.float32)
    assert np.isfinite(sampling.top_k(logits, 2)).tolist() == [[True, False, True, False]]
    assert np.isfinite(sampling.top_p(logits, 0.999)).tolist() == [[True, False, True, False]]
    assert np.isfinite(sampling.min_p(logits, 0.01)).tolist() == [[True, False, True, False]]


def test_repetition_penalty_lowers_what_was_seen():
    logits = np.asarray([[3.0, -3.0, 3.0, -3.0]], np.float32)
    seen = np.asarray([[True, True, False, False]])
    np.testing.assert_allclose(sampling.repetition_penalty(logits, seen, 1.5), [[2.0, -4.5, 3.0, -3.0]])


def test_filters_are_applied_in_transformers_order():
    logits, seen = _logits(scale=1.0), _logits(seed=1) > 2.0
    result = filtered(Sampling.create(0.8, 40, 0.9, 0.2, 1.4), logits, seen)
    steps = [sampling.repetition_penalty(logits, seen, 1.4) / 0.8]
    for narrow in (lambda x: sampling.top_k(x, 40), lambda x: sampling.top_p(x, 0.9), lambda x: sampling.min_p(x, 0.2)):
        steps.append(narrow(steps[-1]))
    assert np.allclose(result, steps[-1], rtol=1e-6)
    kept = [int(np.isfinite(step).sum()) for step in steps]
    assert kept == sorted(set(kept), reverse=True)  # every filter had an effect


def test_greedy_takes_the_first_of_the_largest():
    logits = np.asarray([[0.0, 5.0, 5.0], [1.0, 0.0, -1.0]], np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(Sampling.create(), logits, keys).tolist() == [1, 0]
    assert choose(Sampling.create(top_k=2, top_p=0.1), logits, keys).tolist() == [1, 0]


def test_draws_follow_the_filtered_distribution():
    logits = np.log(np.asarray([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
    how, draws = Sampling.create(temperature=0.8, top_p=0.9), 20_000
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = np.asarray(choose(how, np.broadcast_to(logits, (draws, 5)), keys))
    expected = _softmax(np.asarray(filtered(how, logits[None]))[0][None])[0]
    counts = np.bincount(tokens, minlength=5)
    assert counts[expected == 0].sum() == 0
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4 * deviation).all()


def test_a_draw_depends_on_its_own_key_only():
    logits, keys = _logits(rows=4), jax.random.split(jax.random.key(1), 4)
    together = choose(Sampling.create(1.0), logits, keys)
    alone = [int(choose(Sampling.create(1.0), logits[row : row + 1], keys[row : row + 1])[0]) for row in range(4)]
    assert together.tolist() == alone


def test_rows_of_a_batch_have_settings_of_their_own():
    """Each is sampled as by itself, bit for bit, including greedy ones."""
    settings = [(), (0.7, 5), (1.3, 0, 0.8), (0.9, 0, 1, 0.1), (0, 0, 1, 0, 1.5)]
    each = [Sampling.create(*one) for one in settings]
    logits, keys, seen = _logits(scale=0.5), jax.random.split(jax.random.key(2), 5), _logits(seed=1) > 2.0
    together = Sampling.of_rows(each)
    rows = filtered(together, logits, seen)
    for n, one in enumerate(each):
        assert np.array_equal(rows[n : n + 1], filtered(one, logits[n : n + 1], seen[n : n + 1]))
        assert choose(together, logits, keys, seen)[n] == choose(one, logits[n : n + 1], keys[n : n + 1], seen[n : n + 1])[0]
    assert Sampling.of_rows(each[:1] * 3) == Sampling()  # nothing that no row uses


def test_numbers_change_without_compiling_again():
    step = jax.jit(choose)
    keys = jax.random.split(jax.random.key(0), 5)
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.3, 50, 0.5)):
        step(Sampling.create(temperature, top_k, top_p), _logits(), keys)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_numbers_outside_their_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        Sampling.create(**setting)

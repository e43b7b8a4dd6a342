import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model.rope import Rope, cos_sin, rotate

F = 1000.0 ** -(np.arange(0, 12, 2) / 12)  # of Rope(12, 1000.0)


def from_hf(**scaling):
    hf = dict(model_type="llama", rope_theta=1000.0, max_position_embeddings=64, rope_scaling=scaling)
    return Rope.from_hf(hf, 12)


def test_linear_and_divisors_divide():
    assert np.allclose(from_hf(type="linear", factor=4.0).frequencies(), F / 4)
    assert np.allclose(Rope(12, 1000.0, "divisors", divisors=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)).frequencies(), F / np.arange(1, 7))


def test_dynamic_keeps_short_texts_and_stretches_theta_for_long_ones():
    rope = from_hf(type="dynamic", factor=4.0)
    assert np.allclose(rope.frequencies(), F)
    lengths = jnp.asarray([[10, 64, 128]])
    short, full, long = np.asarray(rope.frequencies(lengths))[0]
    assert np.allclose(short, F) and np.allclose(full, F)
    theta = 1000.0 * (4.0 * 128 / 64 - 3.0) ** (12 / 10)
    assert np.allclose(long, theta ** -(np.arange(0, 12, 2) / 12))


def test_llama3_keeps_short_waves_and_slows_long_ones():
    rope = from_hf(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    wave, f = 2 * np.pi / F, rope.frequencies()
    assert np.allclose(f[wave < 16], F[wave < 16]) and np.allclose(f[wave > 64], F[wave > 64] / 8)
    between = (wave > 16) & (wave < 64)
    assert between.any() and ((f < F) & (f > F / 8))[between].all()


def test_yarn_turns_the_first_dimensions_as_before_and_slows_the_last():
    rope = from_hf(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0)
    f = rope.frequencies()
    assert np.isclose(f[0], F[0]) and np.isclose(f[-1], F[-1] / 4)
    assert np.isclose(rope.attention_factor, 0.1 * np.log(4.0) + 1)
    assert from_hf(type="yarn", factor=4.0, attention_factor=1.5).attention_factor == 1.5
    both = from_hf(type="yarn", factor=4.0, mscale=2.0, mscale_all_dim=1.0).attention_factor
    assert np.isclose(both, (0.2 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1))


def test_longrope_chooses_by_the_length_of_each_text():
    short, long = [1.0 + i / 10 for i in range(6)], [2.0 + i for i in range(6)]
    rope = from_hf(type="longrope", short_factor=short, long_factor=long, original_max_position_embeddings=16)
    assert np.isclose(rope.attention_factor, np.sqrt(1 + np.log(4.0) / np.log(16.0)))
    assert np.allclose(rope.frequencies(), F / short)
    found = np.asarray(rope.frequencies(jnp.asarray([[16, 17]])))[0]
    assert np.allclose(found[0], F / short) and np.allclose(found[1], F / long)


def test_a_texts_frequencies_do_not_depend_on_its_neighbours():
    rope = from_hf(type="dynamic", factor=4.0)
    rope = Rope(rope.dim, rope.theta, rope.kind, rope.factor, original_max=5)
    positions = np.concatenate([np.arange(9), np.arange(4), np.zeros(2)])[None].astype(np.int32)
    segments = np.asarray([[1] * 9 + [2] * 4 + [0] * 2])
    cos, _ = cos_sin((rope,), positions, segments)
    for piece in (slice(0, 9), slice(9, 13)):
        alone, _ = cos_sin((rope,), positions[:, piece], segments[:, piece])
        assert np.array_equal(cos[:, :, piece], alone)


@pytest.mark.parametrize("dim", [0, 7, 8, 12])  # 7: eight turn, as in transformers
def test_rotate_turns_pairs_of_the_first_dimensions_and_leaves_the_rest(dim):
    half = (dim + 1) // 2
    end = 2 * half
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 5, 2, 12)).astype(np.float32)
    positions = np.arange(5)[None]
    ropes = (Rope(dim, 100.0),) if dim else ()
    cos, sin = cos_sin(ropes, positions, np.ones((1, 5), np.int32))
    assert cos.shape == (len(ropes) + 1, 1, 5, half)
    turned, still = np.asarray(rotate(x, cos[0], sin[0])), np.asarray(rotate(x, cos[-1], sin[-1]))
    assert np.array_equal(still, x) and np.array_equal(turned[..., end:], x[..., end:])
    f = 100.0 ** -(np.arange(0, dim, 2) / max(dim, 1))
    z = (x[..., :half] + 1j * x[..., half:end]) * np.exp(1j * positions[0][:, None] * f)[None, :, None]
    assert np.allclose(turned[..., :half], z.real, atol=1e-5) and np.allclose(turned[..., half:end], z.imag, atol=1e-5)

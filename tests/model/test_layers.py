import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxtune.model.layers import NORMS

BF16 = ml_dtypes.bfloat16


def normalized(x, eps):
    x = x.astype(np.float32)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps))


# In bfloat16, transformers' Llama rounds before it multiplies by the scale, Gemma and OLMo 2 after.
FORMULAS = {
    "rms": lambda x, w: (normalized(x, 1e-5).astype(BF16) * w).astype(BF16),
    "rms_float32": lambda x, w: (normalized(x, 1e-5) * w.astype(np.float32)).astype(BF16),
    "rms_offset": lambda x, w: (normalized(x, 1e-5) * (1 + w.astype(np.float32))).astype(BF16),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_norms_round_where_transformers_does(name):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(BF16) for shape in ((64, 48), (48,)))
    found = np.asarray(NORMS[name](jnp.asarray(x), jnp.asarray(w), None, 1e-5))
    wanted = {other: formula(x, w) for other, formula in FORMULAS.items()}
    assert found.dtype == BF16
    assert (found == wanted[name]).mean() > 0.999  # rsqrt and 1 / sqrt differ in the last bit, and that bit rarely reaches bfloat16
    assert all((found == wanted[other]).mean() < 0.95 for other in FORMULAS if other != name)


def test_layer_norm_is_computed_in_float32():
    rng = np.random.default_rng(1)
    x, w, b = (rng.standard_normal(shape).astype(BF16) for shape in ((64, 48), (48,), (48,)))
    x32 = x.astype(np.float32) + 3
    wanted = normalized(x32 - x32.mean(-1, keepdims=True), 1e-5) * w.astype(np.float32) + b.astype(np.float32)
    assert np.allclose(NORMS["layer"](jnp.asarray(x32), jnp.asarray(w), jnp.asarray(b), 1e-5), wanted, atol=1e-5)
    low = NORMS["layer"](jnp.asarray(x32.astype(BF16)), jnp.asarray(w), jnp.asarray(b), 1e-5)
    assert low.dtype == jnp.bfloat16 and np.allclose(np.asarray(low, np.float32), wanted, atol=0.1)

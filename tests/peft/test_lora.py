"""LoRA's hand-written backward pass against autodiff through the two products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.peft.lora import LoRA

RNG = np.random.default_rng(0)
X, A, B, OUT = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 12), (3, 12), (7, 3), (2, 5, 7)))
SCALE = jnp.float32(0.7)


def plain(x, a, b):
    return SCALE.astype(x.dtype) * ((x @ a.astype(x.dtype).T) @ b.astype(x.dtype).T)


def ours(x, a, b):
    return LoRA(base=jnp.zeros((7, 12)), a=a, b=b, scale=SCALE).apply(x)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("leading", [(2, 5), (10,)], ids=str)
def test_gradients(dtype, tolerance, leading):
    x, out = X.reshape(*leading, 12).astype(dtype), OUT.reshape(*leading, 7)

    def through(function, x):
        return jax.grad(lambda *args: (function(*args).astype(jnp.float32) * out).sum(), (0, 1, 2))(jnp.asarray(x), A, B)

    left, right = through(ours, x), through(plain, np.asarray(x, np.float32))
    assert [g.dtype for g in left] == [x.dtype, jnp.float32, jnp.float32]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=tolerance * float(jnp.abs(other).max()))

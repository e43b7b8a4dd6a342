"""Rows times their experts' matrices: against numpy, row by row; and how much memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.model import quant
from jaxtune.model.ragged import ragged
from jaxtune.model.weight import grouped

# rows of each expert: some without any, all rows with one, fewer rows than experts, more blocks than one turn has
SIZES = {"uneven": [3, 0, 60, 1, 0, 36], "one": [0, 0, 40, 0], "few rows": [0, 1] * 3 + [0] * 20, "even": [300] * 4}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes, monkeypatch):
    monkeypatch.setattr("jaxtune.model.ragged.CACHED", 3 * 4 * 8 * 12)  # three matrices a turn
    rng, E, N = np.random.default_rng(0), len(sizes), sum(sizes)
    x_NI, w_EOI, dy_NO = (rng.standard_normal(shape).astype(np.float32) for shape in ((N, 8), (E, 12, 8), (N, 12)))
    expert_N = np.repeat(np.arange(E), sizes)
    y_NO, back = jax.vjp(lambda x, w: ragged(x, w, jnp.asarray(sizes)), *map(jnp.asarray, (x_NI, w_EOI)))
    dx_NI, dw_EOI = back(jnp.asarray(dy_NO))
    np.testing.assert_allclose(y_NO, np.einsum("ni,noi->no", x_NI, w_EOI[expert_N]), atol=1e-5)
    np.testing.assert_allclose(dx_NI, np.einsum("no,noi->ni", dy_NO, w_EOI[expert_N]), atol=1e-5)
    wanted = np.zeros_like(w_EOI)
    np.add.at(wanted, expert_N, np.einsum("no,ni->noi", dy_NO, x_NI))
    np.testing.assert_allclose(dw_EOI, wanted, atol=1e-4)


def test_packed_experts_are_unpacked_where_they_are_used(monkeypatch):
    """Neither all at once, nor with a copy of the rows for each expert; forward and backward."""
    E, N, width = 64, 512, 128
    monkeypatch.setattr("jaxtune.model.ragged.CACHED", 4 * 4 * width * width)  # four dense matrices
    stack = jax.vmap(lambda w: quant.quantize(w, "nf4"))(jax.random.normal(jax.random.key(0), (E, width, width)))
    x_NI, sizes_E = jnp.ones((N, width)), jnp.full(E, N // E)

    def loss(x, stack):
        return jnp.sum(grouped(stack, x, sizes_E) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(x_NI, stack).compile()
    rows, dense = N * width * 4, E * width * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * rows < dense
    dense_EOI = jax.vmap(lambda w: w.dense(jnp.float32))(stack)
    np.testing.assert_allclose(compiled(x_NI, stack), jax.grad(loss)(x_NI, dense_EOI), rtol=1e-4, atol=1e-2)

"""Quantised matrices: round trips, bitsandbytes' edge cases, and a product whose gradient is that of the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import ModelError
from jaxtune.model import quant
from jaxtune.model.weight import dense, grouped, linear

RNG = np.random.default_rng(0)
CODE = np.asarray(quant.NF4_CODE, np.float32)


def matrix(out, width):
    return RNG.standard_normal((out, width)).astype(np.float32)


def unpack(codes):
    return np.asarray(quant.unpack(jnp.asarray(codes), 64)).T.reshape(-1)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("shape", [(8, 128), (6, 96), (5, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_the_nearest_value_of_their_block(shape, block_size, kind):
    """Against a search over all 16 values; except for ties and the order of FP4's two zeros, which do not affect the values."""
    w = matrix(*shape)
    leaf = quant.quantize(w, kind, block_size)
    flat = np.pad(w.reshape(-1), (0, -w.size % block_size)).reshape(-1, block_size)
    absmax = np.abs(flat).max(-1, keepdims=True)
    code = np.asarray(quant.CODES[kind], np.float32)
    nearest = code[np.abs(flat[..., None] / absmax[..., None] - code).argmin(-1)] * absmax
    np.testing.assert_allclose(dense(leaf).reshape(-1), nearest.reshape(-1)[: w.size], rtol=1e-6, atol=1e-7)


def test_packing_puts_the_first_half_low_and_ties_go_down():
    w = np.ones((1, 64), np.float32)
    w[0, [0, 32]] = [-1, 1]
    assert np.asarray(quant.quantize(w, "nf4").codes)[0, 0] == 0xF0
    w[0, 0] = (CODE[3] + CODE[4]) / np.float32(2)
    assert unpack(quant.quantize(w, "nf4").codes)[0] == 3


def test_selecting_is_looking_up():
    """The TPU's way, which no test machine uses."""
    codes = jnp.arange(16, dtype=jnp.uint8)
    for kind, values in quant.CODES.items():
        np.testing.assert_array_equal(quant._select(codes, values), np.asarray(values, np.float32), err_msg=kind)


def test_exact_values_come_back():
    codes = RNG.integers(0, 16, (4, 128))
    codes[:, ::64] = 15  # each block holds its absmax
    w = CODE[codes] * np.repeat(RNG.random((4, 2)).astype(np.float32) + 0.5, 64, axis=1)
    leaf = quant.quantize(w, "nf4")
    np.testing.assert_array_equal(unpack(leaf.codes), codes.reshape(-1))
    np.testing.assert_array_equal(dense(leaf), w)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_a_block_of_zeros_stays_zero(kind):
    w = matrix(4, 128)
    w[1, :64] = 0
    leaf = quant.quantize(w, kind)
    assert np.all(unpack(leaf.codes)[128:192] == 7)
    assert np.all(np.asarray(dense(leaf))[1, :64] == 0)


def test_a_partial_block_of_zeros_has_the_least_scale():
    leaf = quant.quantize(np.zeros((1, 70), np.float32), "nf4")
    np.testing.assert_array_equal(np.asarray(leaf.absmax).reshape(-1), np.float32([0, 1e-38]))


def test_equal_scales_are_exact_when_quantised_twice():
    w = matrix(4, 128)
    w = w / np.abs(w.reshape(-1, 64)).max(-1).repeat(64).reshape(w.shape)
    leaf = quant.quantize(w, "nf4-dq")
    assert np.all(np.asarray(leaf.nested_absmax) < 1e-6)
    np.testing.assert_allclose(dense(leaf), dense(quant.quantize(w, "nf4")), rtol=1e-6)


def test_double_quantisation_keeps_codes_and_nears_scales():
    w = matrix(64, 1024)
    once, twice = quant.quantize(w, "nf4"), quant.quantize(w, "nf4-dq")
    np.testing.assert_array_equal(once.codes, twice.codes)
    assert twice.absmax.dtype == jnp.uint8 and twice.nested_absmax.shape == (4,)
    step = np.diff(quant.dynamic_map()).max() / 2
    assert np.all(np.abs(np.asarray(twice.scales()) - np.asarray(once.absmax)) <= step * float(twice.nested_absmax.max()) + 1e-6)


def test_dynamic_map_is_sorted_and_lopsided():
    table = quant.dynamic_map()
    assert table.shape == (256,) and np.all(np.diff(table) > 0)
    assert table[-1] == 1.0 and table[0] > -1.0 and table[127] == 0.0


def test_int8_errs_by_half_a_step_at_most():
    w = matrix(8, 64)
    w[3] = 0
    leaf = quant.quantize(w, "int8")
    half = np.abs(w).max(-1, keepdims=True) / 127 / 2
    assert np.all(np.abs(np.asarray(dense(leaf)) - w) <= half + 2e-3 * np.abs(w))  # float16 comes first
    assert np.all(np.asarray(dense(leaf))[3] == 0)


@pytest.mark.parametrize("shape", [(24, 128), (10, 96)])
@pytest.mark.parametrize("kind", quant.QUANTIZERS)
def test_products_and_gradients_are_those_of_the_dense_matrix(kind, shape):
    leaf, x = quant.quantize(matrix(*shape), kind), matrix(3, shape[1])
    full = dense(leaf)
    np.testing.assert_allclose(linear(leaf, x), x @ full.T, rtol=1e-5, atol=1e-5)
    left, right = (jax.grad(lambda x, w=w: jnp.square(linear(w, x)).sum())(jnp.asarray(x)) for w in (leaf, full))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_second_derivatives_are_right_or_an_error(kind):
    """Of a loop over layers, where jax confuses the residuals of a 4-bit matrix."""
    stack, x = jax.tree.map(lambda leaf: leaf[None], quant.quantize(matrix(64, 64), kind)), jnp.asarray(matrix(2, 64))

    def second(stack):
        def value(x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(linear(w, x)), None), x, stack)[0].sum()

        return jax.grad(lambda x: jnp.square(jax.grad(value)(x)).sum())(x)

    if kind == "int8":
        np.testing.assert_allclose(second(stack), second(dense(stack)), rtol=1e-4, atol=1e-3)
    else:
        with pytest.raises(ModelError, match="no second derivative is taken through a 4-bit matrix"):
            second(stack)


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_packed_experts_are_their_dense_matrices(kind):
    leaves = [quant.quantize(matrix(24, 128), kind) for _ in range(3)]
    packed, sizes, x = jax.tree.map(lambda *parts: jnp.stack(parts), *leaves), jnp.asarray([2, 0, 5]), matrix(7, 128)
    wanted = np.concatenate([x[:2] @ dense(leaves[0]).T, x[2:] @ dense(leaves[2]).T])
    np.testing.assert_allclose(grouped(packed, x, sizes), wanted, rtol=1e-5, atol=1e-5)
    left, right = (jax.grad(lambda x, w=w: jnp.square(grouped(w, x, sizes)).sum())(jnp.asarray(x)) for w in (packed, dense(packed)))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 128), (10, 96)])
@pytest.mark.parametrize("kind", quant.QUANTIZERS)
def test_abstract_is_the_leaf_without_its_numbers(kind, shape):
    def shapes(leaf):
        return jax.tree.map(lambda x: (x.shape, x.dtype), leaf)

    assert shapes(quant.abstract(kind, shape)) == shapes(quant.quantize(matrix(*shape), kind))


def test_block_sizes_are_bitsandbytes():
    with pytest.raises(ValueError, match="48"):
        quant.quantize(matrix(2, 96), "nf4", 48)

"""Products with 4-bit matrices by the TPU kernel, interpreted: the numbers of `NF4.dense`, forward and backward, alone and in a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtune import parallel
from jaxtune.config import LoraConfig, MeshConfig
from jaxtune.errors import ConfigError, JaxtuneError
from jaxtune.model import nf4_kernel, quant
from jaxtune.model.decoder import hidden
from jaxtune.model.families import from_hf
from jaxtune.model.spec import spec
from jaxtune.model.weight import linear
from jaxtune.peft import lora
from jaxtune.tree import unflatten


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The kernel interpreted; records which products it computed."""
    asked, kernel = [], nf4_kernel.product

    def interpreted(x, codes, scales, number, **how):
        asked.append((codes.shape, how["back"]))
        return kernel(x, codes, scales, number, **how, interpret=True)

    monkeypatch.setattr(nf4_kernel, "product", interpreted)
    return asked


def stack(out, width, kind, block_size=64, layers=2):
    """Layers of one random matrix each, quantised and stacked, and the function that gives a layer's leaf its place in the stack."""
    w = np.random.default_rng(0).standard_normal((layers, out, width)).astype(np.float32)
    leaves = [quant.quantize(one, kind, block_size) for one in w]
    rest, put = nf4_kernel.split_codes(jax.tree.map(lambda *x: jnp.stack(x), *leaves))
    return leaves, lambda n: put(jax.tree.map(lambda x: x[n], rest), jnp.int32(n))


@pytest.mark.parametrize(("kind", "block_size", "dtype"), [("nf4-dq", 64, "bfloat16"), ("fp4", 128, "float32")])
def test_an_unpacked_tile_is_the_dense_matrix_bit_for_bit(kind, block_size, dtype):
    """Times the identity, whose sums consist of zeros and one number."""
    leaves, held = stack(384, 128, kind, block_size)
    dense = jax.jit(lambda leaf: leaf.dense(jnp.dtype(dtype)))(leaves[1])
    np.testing.assert_array_equal(held(1).product(jnp.eye(128, dtype=dtype)), dense.T)
    np.testing.assert_array_equal(held(1).product(jnp.eye(384, dtype=dtype), back=True), dense)


@pytest.mark.parametrize(
    ("tokens", "out", "width"),
    [
        (1100, 128, 192),  # two tiles of tokens; inputs taken whole forward, two tiles of them, the last half full, backward
        (40, 512, 640),  # tiles of inputs that extend beyond the scales
    ],
)
def test_products_and_gradients(calls, tokens, out, width):
    leaves, held = stack(out, width, "nf4-dq")
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((tokens, side)), jnp.float32) for side in (width, out))

    def both(leaf, x, dy):
        y, pull = jax.vjp(lambda x: linear(leaf, x), x)
        return y, *pull(dy)

    for ours, theirs in zip(jax.jit(both)(held(1), x, dy), jax.jit(both)(leaves[1], x, dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))
    assert [back for _, back in calls] == [False, True]


@pytest.mark.parametrize(("out", "width", "block_size"), [(96, 128, 64), (128, 96, 64), (128, 128, 32), (128, 1088, 64)])
def test_what_has_no_tiles_goes_the_other_way(calls, out, width, block_size):
    """A side below 128, blocks that do not end with the rows, small blocks, a summed side without a divisor."""
    leaves, held = stack(out, width, "nf4", block_size)
    x = jnp.ones((2, width), jnp.bfloat16)
    np.testing.assert_array_equal(held(1).product(x), leaves[1].product(x))
    np.testing.assert_array_equal(held(0).dense(jnp.float32), leaves[0].dense(jnp.float32))
    assert not calls


def gradients(sizes, kernel):
    """Loss and gradients of a LoRA adapter over a quantised model of two layers, on a mesh of (data, fsdp, tensor, sequence)."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    mesh = parallel.make_mesh(MeshConfig(**dict(zip(parallel.AXES, sizes, strict=True))), jax.devices()[: int(np.prod(sizes))])
    config = from_hf(tiny.LLAMA | shape | {"num_hidden_layers": 2, "attention_bias": False})
    config = dataclasses.replace(config, mesh=mesh, quantization_kernel=kernel, remat="full")
    keys = iter(jax.random.split(jax.random.key(0), 50))
    params = {path: 0.1 * jax.random.normal(next(keys), row.shape) for path, row in spec(config).items()}
    pack = functools.partial(quant._quantize_4bit, kind="nf4", nested=False, block_size=64)
    for path in spec(config):
        if path.endswith(("/q", "/down")):  # two of seven, to save compilation time
            params[path] = jax.tree.map(lambda *x: jnp.stack(x), *[pack(w) for w in params[path]])
    params = unflatten(params)
    params = jax.device_put(params, parallel.param_shardings(mesh, config, params))
    adapter = lora.init(next(keys), config, params, LoraConfig(r=2))
    adapter = adapter.replace(params=jax.tree.map(lambda x: x + 0.1, adapter.params))
    tokens = jax.random.randint(next(keys), (4, 16), 0, 96)

    def loss(adapter, params, tokens):
        return jnp.square(hidden(config, lora.compose(params, adapter), tokens).hidden_BTD[..., :7]).sum()

    loss, gradient = jax.jit(jax.value_and_grad(loss))(adapter, params, tokens)
    return [loss, *jax.tree.leaves(gradient)]


def test_a_model_by_the_kernel(calls):
    """One device, and tokens split over four, two of which hold parts of each matrix."""
    expected = gradients((1, 1, 1, 1), "xla")
    assert not calls
    for sizes, layers in (((1, 1, 1, 1), 2), ((1, 2, 1, 2), 1)):
        calls.clear()
        for one, other in zip(gradients(sizes, "pallas"), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))
        assert {shape[0] for shape, _ in calls} == {layers} and {back for _, back in calls} == {False, True}


def test_a_device_that_computes_something_else_is_found_out(monkeypatch):
    nf4_kernel.verify()
    monkeypatch.setattr(nf4_kernel, "CODES", {"nf4": (*quant.NF4_CODE[:5], -0.18, *quant.NF4_CODE[6:])})
    with pytest.raises(JaxtuneError, match="write quantization_kernel: xla"):
        nf4_kernel.verify()


def test_the_kernel_is_for_tpus():
    assert [nf4_kernel.choose_kernel("auto", platform) for platform in ("cpu", "gpu", "tpu")] == ["xla", "xla", "pallas"]
    assert nf4_kernel.choose_kernel("xla", "tpu") == "xla"
    with pytest.raises(ConfigError, match="write auto or xla"):
        nf4_kernel.choose_kernel("pallas", "cpu")

"""The kernels for GPU and TPU, interpreted on a CPU, against the XLA implementation and transformers: values and gradients, whatever hides
a key.

tests/targets/test_bytes.py tests that they compile for chips.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from jaxtune import parallel
from jaxtune.config import MeshConfig
from jaxtune.model import block, decoder, flash, splash
from jaxtune.model.attention import attend
from jaxtune.model.attention_mask import Keys
from jaxtune.model.block import Place
from jaxtune.model.families import from_hf

B, T, H, K = 2, 45, 6, 2
# two documents that continue the first; one that fills its blocks alone, one, and padding that is not a whole block
SEGMENTS = np.stack([np.repeat([1, 2, 3], 15), np.repeat([1, 2, 0], [16, 14, 15])]).astype(np.int32)
SLOTS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
POSITIONS = SLOTS - np.stack([np.repeat([0, 15, 30], 15), np.repeat([0, 16, 30], [16, 14, 15])]).astype(np.int32)
PARENTS = np.where(SEGMENTS == 3, 1, 0).astype(np.int32)
CASES = {"segments": (0, 0.0, None), "all": (12, 1.5, PARENTS)}



@pytest.fixture(params=["flash", "splash"])
def form(request, monkeypatch):
    """A kernel, interpreted, with tiles so small that a row has many, and different sizes for a block's queries and its keys."""
    module = {"flash": flash, "splash": splash}[request.param]
    monkeypatch.setattr(module, "INTERPRET", True)
    monkeypatch.setattr(module, "BLOCK", 16)
    if module is flash:
        monkeypatch.setattr(flash, "SIZES", {128: (flash._Size(16, 8, 4, 1), flash._Size(8, 16, 4, 1))})
    else:
        monkeypatch.setattr(splash, "LANES", 8)
    return request.param


def arrays(h):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, heads, h)).astype(np.float32) for heads in (H, K, K, H)]


def computed(form, q, k, v, out, window, cap, parents):  # with sinks where all else is there too
    """The result, and the derivatives of its product with `out`; the window is traced, as in a layer."""
    queries = Keys(SLOTS, POSITIONS, SEGMENTS, parents)

    sinks = None if parents is None else jnp.linspace(-1.0, 2.0, H)

    @jax.jit
    def both(q, k, v, window):
        def function(q, k, v):
            keys = queries._replace(parents=None)
            return attend(q, k, v, queries, keys, scale=0.3, window=window, cap=cap, form=form, sinks_H=sinks)

        result, back = jax.vjp(function, q, k, v)
        return result, *back(out)

    return [np.asarray(x) for x in both(q, k, v, jnp.asarray(window))]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(form, case):
    given = *arrays(12 if case == "all" else 16), *CASES[case]  # 12: padded to 16 if a tile must have a power of two as its width
    for found, wanted in zip(computed(form, *given), computed("xla", *given), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.all(found[1, 30:] == 0)  # padding


def test_a_query_that_is_no_number_gives_none(form):
    """And those of other heads and tokens are unchanged."""
    q, k, v, _ = arrays(16)
    tokens = Keys(SLOTS, POSITIONS, SEGMENTS)
    result = jax.jit(lambda q, form: attend(q, k, v, tokens, tokens, scale=0.3, form=form), static_argnums=1)
    wanted = result(q, "xla")
    q[0, 20, 1, 3] = np.nan
    found = np.asarray(result(q, form))
    assert np.all(np.isnan(found[0, 20, 1])) and np.isnan(found).sum() == 16
    np.testing.assert_allclose(np.where(np.isnan(found), wanted, found), wanted, atol=1e-5)


def test_against_transformers(form):
    golden = references.load("gemma2")  # soft caps, and a window on every other layer
    config = dataclasses.replace(from_hf(golden.config), attention=form)
    batch = references.layout(golden.documents, "packed")
    logits = jax.jit(decoder.forward, static_argnums=0)(config, references.tree(config, golden.tensors), *batch[:3])
    for found, wanted in zip(batch.documents_of(logits), golden.logits["alone"], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_on_a_mesh(form):
    """Rows, heads and tokens over eight devices: the result and derivatives of one."""
    config = dataclasses.replace(from_hf(references.load("gemma2").config), num_heads=H, num_kv_heads=K, attention_scale=0.3)
    mesh = parallel.make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
    tokens = Keys(*(jnp.asarray(x[:, :44]) for x in (SLOTS, POSITIONS, SEGMENTS)))
    place = Place(*arrays(4)[:2], jnp.asarray(12), tokens, tokens, jnp.asarray(0))
    q, k, v, out = (x[:, :44] for x in arrays(16))

    def both(config, form):
        result, back = jax.vjp(lambda *x: block._attend(config, *x, place, form), q, k, v, jnp.linspace(-1.0, 2.0, H))
        return result, *back(out)

    both = jax.jit(both, static_argnums=(0, 1))
    found = both(dataclasses.replace(config, mesh=mesh), form)
    assert tuple(found[0].sharding.spec)[:3] == ("data", "sequence", "tensor")
    for one, other in zip(found, both(config, "xla"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
